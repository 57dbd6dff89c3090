"""Layer: one dense matrix per block, every correlation inside a layer and none between layers (methods 9.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.operators import Blockwise, DenseBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals
from laplace_kf.tape.signals import symmetrised


@STRUCTURES.register("layer")
class Layerwise(Structure):
    """The dense Gauss-Newton matrix ``(P_b, P_b)`` of every block in canonical order."""

    name = "layer"

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return 3 * sum(block.size**2 for block in blocks.values()) * itemsize

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return True

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return max((block.size for block in blocks.values()), default=0) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name not in sums:
                sums[name] = (zeros(like, block.size, block.size),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            signal.add_outer(sums[name][0])

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        return {name: (symmetrised(sums[name][0]),) for name in blocks}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return Blockwise(layout, [(block, DenseBlock(means[name][0], name)) for name, block in blocks.items()])
