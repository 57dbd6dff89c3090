"""Diagonal: ``diag(C̄)``, exact for every layer (methods 4.7)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.operators import Blockwise, DiagonalBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals


@STRUCTURES.register("diag")
class Diagonal(Structure):
    """One value per parameter: the sum over examples and columns of squared per-example gradients."""

    name = "diag"

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return True

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name not in sums:
                sums[name] = (zeros(like, *block.shape),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            signal.add_squares(sums[name][0])

    def with_diagonal(self, sums: Sums, values: Mapping[str, Tensor]) -> Sums:
        return {name: (own + values[name],) for name, (own,) in sums.items()}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return Blockwise(layout, [(block, DiagonalBlock(means[name][0], name)) for name, block in blocks.items()])
