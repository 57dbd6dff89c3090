"""The statistics of all processes from those of each: one exchange of what was seen, one sum of the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_kf.distributed.ranks import Ranks
from laplace_kf.errors import IncompatiblePair
from laplace_kf.structures.base import Structure, Sums
from laplace_kf.tape import Block, FlatLayout

__all__ = ["Seen", "added_up", "merged"]

WHERE = "the sum of the statistics"


@dataclass(frozen=True)
class Seen:
    """What one process saw of the data, beside the sums.

    Attributes:
        blocks: the blocks its minibatches met, in that order.
        layout: of the selected parameters.
        unseen: selected parameters that it did not meet.
        count: examples that count.
        met: whether a minibatch came at all.
        log_likelihood, terms, moments: as of :class:`~laplace_kf.structures.base.Statistics`.
    """

    blocks: Mapping[str, Block]
    layout: FlatLayout
    unseen: Sequence[str]
    count: float
    met: bool
    log_likelihood: float
    terms: float
    moments: Sequence[float]


def merged(everyone: Sequence[Seen]) -> Seen:
    """What all processes saw together.

    Rows of tables that are constants (padding) are those that every process that used the table says are.

    Raises:
        IncompatiblePair: if processes keep the same parameters in blocks of different forms.
    """
    blocks: dict[str, Block] = {}
    owner: dict[str, int] = {}
    for rank, seen in enumerate(everyone):
        for name, block in seen.blocks.items():
            if blocks.setdefault(name, block) != block:
                raise IncompatiblePair(_two_forms(name, owner[name], rank, blocks[name], block))
            owner.setdefault(name, rank)
    for name, block in blocks.items():
        for other in blocks.values():
            shared = set(block.parameters) & set(other.parameters)
            if other is not block and shared and not (block.pieces and other.pieces):
                raise IncompatiblePair(_two_forms(shared.pop(), owner[name], owner[other.name], block, other))
    unseen = [name for name in everyone[0].layout.names if all(name in seen.unseen for seen in everyone)]
    held = dict.fromkeys(place for seen in everyone for place in seen.layout.held)
    users = {name: [seen for seen in everyone if seen.met and name not in seen.unseen] for name, _, _ in held}
    kept = tuple(place for place in held if all(place in seen.layout.held for seen in users[place[0]]))
    moments = [torch.tensor(list(seen.moments), dtype=torch.float64) for seen in everyone if len(seen.moments)]
    return Seen(
        blocks,
        replace(everyone[0].layout, held=kept),
        unseen,
        sum(seen.count for seen in everyone),
        any(seen.met for seen in everyone),
        sum(seen.log_likelihood for seen in everyone),
        sum(seen.terms for seen in everyone),
        torch.stack(moments).sum(0).tolist() if moments else [],
    )


def _two_forms(name: str, one: int, two: int, mine: Block, theirs: Block) -> str:
    def shown(block: Block) -> str:
        kind = "factors" if block.factorises else "gradients of single examples"
        return f"{block.name!r} {block.shape} by {kind}" + (f" ({block.note})" if block.note else "")

    return (
        f"processes {one} and {two} use {name!r} in different ways, so that their curvature cannot be added: "
        f"{shown(mine)}, and {shown(theirs)}. Leave these parameters out (parameters=[patterns]), or give every "
        "process minibatches of every kind"
    )


def added_up(ranks: Ranks, structure: Structure, sums: Sums, order: Sequence[str]) -> Sums:
    """Sums of all processes, from those of this one; blocks of the same names and shapes in all of them.

    What a structure knew before the pass (:meth:`Structure.known`) is the same everywhere, and does not travel.

    Args:
        ranks: the processes.
        structure: of the sums.
        sums: of this process, finished.
        order: of the blocks, the same in all of them.

    Raises:
        DistributedFailure: if a process is lost.
    """
    names = [name for name in order if name in sums] + sorted(set(sums) - set(order))
    own: list[Tensor] = []
    for name in names:
        own += sums[name][structure.known(name) :]
    total = iter(ranks.add_up(own, WHERE))
    out: Sums = {}
    for name in names:
        known = sums[name][: structure.known(name)]
        out[name] = (*known, *(next(total) for _ in sums[name][len(known) :]))
    return out
