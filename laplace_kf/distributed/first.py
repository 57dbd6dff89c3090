"""What processes have to decide alike at their first minibatches, which may tell them different things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_kf.callers import warn_user
from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood
from laplace_kf.structures.base import STRUCTURES, Structure
from laplace_kf.tape import FlatLayout

__all__ = ["First"]


@dataclass(frozen=True)
class First:
    """The first minibatch of one process.

    Attributes:
        structure: name and options of what it would gather, and why.
        needs: bytes that this takes; the least wins where processes differ.
        layout: flat order of the selected parameters.
        outputs: layout of the outputs that the targets showed.
        dtype: type of the sums.
        trace: a checksum of the outputs.
    """

    structure: tuple[str, dict[str, Any], str]
    needs: int
    layout: FlatLayout
    outputs: str | None
    dtype: torch.dtype
    trace: int

    @classmethod
    def of(
        cls,
        structure: Structure,
        needs: int,
        layout: FlatLayout,
        likelihood: Likelihood,
        dtype: torch.dtype,
        outputs: Tensor,
    ) -> First:
        """Of outputs ``(N, ...)``."""
        trace = hash(tuple(outputs.detach().double().flatten()[:256].tolist()))
        chosen = structure.name, structure.options(), structure.reason
        return cls(chosen, needs, replace(layout, held=()), getattr(likelihood, "layout", None), dtype, trace)

    @staticmethod
    def common(everyone: Sequence[First | None]) -> First | None:
        """What all of them go by; ``None`` where no process has a minibatch.

        Raises:
            IncompatiblePair: if they select other parameters, read outputs in other layouts, or sum in other types.
        """
        found = [(rank, each) for rank, each in enumerate(everyone) if each is not None]
        if not found:
            return None
        rank, first = found[0]
        for other, each in found[1:]:
            if each.layout != first.layout:
                raise IncompatiblePair(
                    f"processes {rank} and {other} select different parameters: {_gap(first.layout, each.layout)}"
                )
            if (each.outputs, each.dtype) != (first.outputs, first.dtype):
                raise IncompatiblePair(
                    f"processes {rank} and {other} read the model's outputs differently (layout {first.outputs!r} in "
                    f"{first.dtype}, and {each.outputs!r} in {each.dtype}): say which, layout=... and dtype=..."
                )
        if len(found) > 1 and len({each.trace for _, each in found}) == 1:
            warn_user(
                "all processes begin with the same minibatch: every process has to be given its own share of the data, "
                "DataLoader(dataset, sampler=DistributedSampler(dataset)), or examples count several times"
            )
        return min((each for _, each in found), key=lambda each: each.needs)

    def read_by(self, likelihood: Likelihood) -> Likelihood:
        """A likelihood that reads outputs as this says."""
        return likelihood if self.outputs is None else likelihood.with_layout(self.outputs)

    def settled(self, own: Structure, decided: bool, like: Tensor) -> Structure:
        """The structure that all gather, for a process that has its ``own``.

        Args:
            own: of this process.
            decided: whether it is decided at a minibatch; else there was none.
            like: type and device of the sums (any shape).
        """
        name, options, reason = self.structure
        if own.name == name:
            return own if decided else own.settled({}, self.layout, like.reshape(1, 1), like)
        chosen = STRUCTURES[name](**options)
        chosen.reason = reason
        return chosen


def _gap(one: FlatLayout, other: FlatLayout) -> str:
    mine, theirs = dict(zip(one.names, one.shapes, strict=True)), dict(zip(other.names, other.shapes, strict=True))
    name = next(iter(sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))), "in another order")
    return f"{name!r} of shape {mine.get(name, 'none')} and {theirs.get(name, 'none')}"
