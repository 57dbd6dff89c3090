"""Which process does which piece of work."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["assigned"]


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """The owner of every piece of work: longest processing time first (Graham 1969), so that all are done early.

    Pieces are dealt out from the dearest to the cheapest, each to whoever has least to do so far; of equals, the first.
    The last one is done at most 4/3 − 1/(3 ranks) times as late as in the best of all assignments. The result is a
    function of the arguments alone: processes that have the same need not speak.

    Args:
        costs: of every piece, not negative (of an eigendecomposition the cube of the side).
        ranks: number of processes.

    Returns:
        A number in ``range(ranks)`` for every piece.

    Raises:
        ValueError: for fewer than one process, or a cost that is negative or no number.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if not all(cost >= 0 for cost in costs):
        raise ValueError(f"costs must not be negative, got {[cost for cost in costs if not cost >= 0]}")
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[piece] = owner
        loads[owner] += costs[piece]
    return owners
