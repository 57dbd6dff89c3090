"""Work of a fit that every process could do, dealt out: eigenbases by cost, and only they travel."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.distributed.assignment import assigned
from laplace_kf.distributed.ranks import Ranks
from laplace_kf.linalg import eigh
from laplace_kf.operators import Blockwise, CurvatureBlock
from laplace_kf.structures.base import Statistics, Structure, Work

__all__ = ["decomposed", "done"]


def done(ranks: Ranks, work: Mapping[str, Work], where: str) -> dict[str, tuple[Tensor, ...]]:
    """The results (tensors of any shapes) of all pieces of work, each done by one process.

    Args:
        ranks: the processes.
        work: by name, the same in all of them.
        where: for messages.

    Raises:
        DistributedFailure: where another process failed.
    """
    names = list(work)
    owners = assigned([work[name].cost for name in names], ranks.size)
    results: dict[str, tuple[Tensor, ...]] = {}
    with ranks.together(where):
        for name, owner in zip(names, owners, strict=True):
            if owner == ranks.rank:
                results[name] = work[name].run()
            else:
                results[name] = work[name].like()
    flat = [part for name in names for part in results[name]]
    whose = [owner for name, owner in zip(names, owners, strict=True) for _ in results[name]]
    handed = iter(ranks.hand_round(flat, whose, where))
    return {name: tuple(next(handed) for _ in results[name]) for name in names}


def decomposed(ranks: Ranks, curvature: Blockwise) -> None:
    """Gives every block of a curvature (the same in all processes) the eigenbasis that its precision needs.

    Raises:
        DistributedFailure: where another process failed.
    """
    work: dict[str, Work] = {}
    place: dict[str, tuple[CurvatureBlock, str]] = {}
    for number, (_, matrix) in enumerate(curvature.entries):
        assert isinstance(matrix, CurvatureBlock)
        for key, factor in matrix.undecomposed(many=False).items():
            name = f"{number} {key}"
            place[name] = matrix, key
            work[name] = Work(
                float(factor.shape[-1]) ** 3 * factor.shape[:-2].numel(),
                lambda factor=factor, label=matrix.label: eigh(factor, label),  # type: ignore[misc]
                lambda factor=factor: (factor.diagonal(dim1=-2, dim2=-1), factor),  # type: ignore[misc]
            )
    for name, (values, vectors) in done(ranks, work, "the decompositions").items():
        matrix, key = place[name]
        matrix.take_eigenbasis(key, values, vectors)


def refined(ranks: Ranks, structure: Structure, statistics: Statistics) -> Structure | None:
    """What to gather in the next pass, as :meth:`Structure.refined`, with the work for it dealt out."""
    work = structure.refinement(statistics)
    return structure.refined(statistics, done(ranks, work, "the bases of the next pass"))
