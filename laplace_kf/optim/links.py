"""A Kronecker structure that also keeps the factors between consecutive layers (methods 4.1, last line).

Needed by the block-tridiagonal inverse only. Layers are linked in the order of the forward pass where both use their
weight once per example (no shared positions, no groups); other layers stand alone there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators import Blockwise, CrossFactors
from laplace_kf.structures import Structure, Sums
from laplace_kf.structures.base import Statistics, zeros
from laplace_kf.tape import Block, FlatLayout, MatrixSignals, OuterSignals, Signals

__all__ = ["Linked"]

ARROW = " → "  # between the two block names of a pair's key


class Linked(Structure):
    """Another structure plus ``A_{i,i+1}`` and ``G_{i,i+1}`` of every pair of consecutive layers.

    Args:
        inner: the structure of the diagonal blocks.
    """

    name = "kron_linked"
    takes_damping = True

    inputs_first = True  # which pairs of layers are linked is seen from their inputs

    def __init__(self, inner: Structure) -> None:
        self.inner = inner

    @property
    def counts_positions(self) -> bool:  # type: ignore[override]
        """As the structure of the diagonal blocks."""
        return self.inner.counts_positions

    def options(self) -> dict[str, Any]:
        return self.inner.options()

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        return self.inner.poorer(blocks)

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        shapes = [block.shape for block in blocks.values() if block.factorises]
        between = sum(o1 * o2 + i1 * i2 for (_, o1, i1), (_, o2, i2) in pairwise(shapes))
        return self.inner.memory(blocks, layout, itemsize) + between * itemsize

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return self.inner.column_bytes(blocks, count, itemsize)

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        self.inner.prepare(sums, blocks, layout, like)

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        self.inner.add_inputs(sums, signals)
        for one, two in pairwise(signals.values()):
            if not (_once(one, sums) and _once(two, sums)):
                continue
            assert isinstance(one, OuterSignals) and isinstance(two, OuterSignals)
            key = one.block.name + ARROW + two.block.name
            (_, o1, i1), (_, o2, i2) = one.block.shape, two.block.shape
            if key not in sums:
                like = sums[one.block.name][0]
                sums[key] = (zeros(like, i1, i2), zeros(like, o1, o2))
            total = sums[key][0]
            left, right = (s.input_rows(0).to(total.dtype) for s in (one, two))
            w1, w2 = left.shape[1], right.shape[1]
            total[:w1, :w2].addmm_(left.T, right)
            if two.has_constant:
                total[:w1, w2] += left.sum(0)
            if one.has_constant:
                total[w1, :w2] += right.sum(0)
            if one.has_constant and two.has_constant:
                total[w1, w2] += left.shape[0]

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        self.inner.add_columns(sums, signals, blocks)
        for key, parts in sums.items():
            if ARROW not in key:
                continue
            one, two = (signals[name] for name in key.split(ARROW))
            assert isinstance(one, OuterSignals) and isinstance(two, OuterSignals)
            left, right = (s.g.reshape(-1, s.g.shape[-1]).to(parts[1].dtype) for s in (one, two))
            parts[1].addmm_(left.T, right)

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        raise IncompatiblePair(
            'inverse="block_tridiagonal" needs back-propagated columns, which estimator="recursive" does not have; use '
            'estimator="sampled", "projection", "importance" or "exact", or inverse="block_diagonal"'
        )

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        out = self.inner.finished({k: v for k, v in sums.items() if ARROW not in k}, blocks, layout)
        return {**out, **{key: parts for key, parts in sums.items() if ARROW in key}}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        """The diagonal blocks."""
        return self.inner.matrix({k: v for k, v in means.items() if ARROW not in k}, blocks, layout)

    def links(self, statistics: Statistics) -> list[CrossFactors]:
        """The mean factors between layers: ``A (I_i, I_{i+1})`` and ``G (O_i, O_{i+1})`` of every pair."""
        pairs = [(key.split(ARROW), parts) for key, parts in statistics.sums.items() if ARROW in key]
        return [CrossFactors(one, two, a / statistics.count, g / statistics.count) for (one, two), (a, g) in pairs]

    def unlinked(self, statistics: Statistics) -> Statistics:
        """The statistics of the diagonal blocks alone."""
        sums = {name: parts for name, parts in statistics.sums.items() if ARROW not in name}
        return replace(statistics, structure=self.inner, sums=sums)


def _once(signal: MatrixSignals, sums: Sums) -> bool:
    """Whether a layer uses its weight once per example, has one group, and keeps both factors whole."""
    if not isinstance(signal, OuterSignals) or signal.a.shape[1] != 1 or signal.block.shape[0] != 1:
        return False
    factors = sums[signal.block.name]
    return len(factors) == 3 and all(part.dim() == 3 for part in factors[:2])
