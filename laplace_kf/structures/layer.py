"""Layer: one dense matrix per block, every correlation inside a layer and none between layers (methods 9.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.operators import Blockwise, DenseBlock, DiagonalBlock, Matrix
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals
from laplace_kf.tape.grams import symmetrised


@STRUCTURES.register("layer")
class Layerwise(Structure):
    """The dense Gauss-Newton matrix ``(P_b, P_b)`` of every block in canonical order."""

    name = "layer"

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return 3 * sum(block.size**2 for block in blocks.values()) * itemsize

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        return [block.size for block in blocks.values() if not block.unused]

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return True

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return max((block.size for block in blocks.values()), default=0) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name not in sums:
                shape = block.shape if block.unused else (block.size, block.size)
                sums[name] = (zeros(like, *shape),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            signal.add_outer(sums[name][0])

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        return {n: (sums[n][0] if block.unused else symmetrised(sums[n][0]),) for n, block in blocks.items()}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        entries: list[tuple[Block, Matrix]] = []
        for name, block in blocks.items():
            kind = DiagonalBlock if block.unused else DenseBlock
            entries.append((block, kind(means[name][0], name)))
        return Blockwise(layout, entries)
