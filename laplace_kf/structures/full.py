"""Full: one dense matrix over all selected parameters, cross-layer blocks included (methods 9.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators import Blockwise, DenseBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals
from laplace_kf.tape.signals import add_gram, symmetrised

MEMORY_LIMIT = 16 * 2**30  # bytes; a larger matrix is refused rather than attempted


@STRUCTURES.register("full")
class Full(Structure):
    """The dense Gauss-Newton matrix ``(P, P)``, accumulated block after block and kept in flat order."""

    name = "full"
    KEY = "all"

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return sum(block.size for block in blocks.values()) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        if self.KEY not in sums:
            needed = layout.size**2 * like.element_size()
            if needed > MEMORY_LIMIT:
                raise IncompatiblePair(
                    f'structure="full" over {layout.size} parameters needs {needed / 2**30:.1f} GiB for its matrix '
                    f'alone; use structure="kron" or "diag", or select fewer parameters (parameters="last_layer")'
                )
            sums[self.KEY] = (zeros(like, layout.size, layout.size),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        total = sums[self.KEY][0]
        (first, *more) = blocks.values()
        if not more and first.size == total.shape[0] and first.name in signals:
            signals[first.name].add_outer(total)
            return
        rows = [signal.jacobian().to(total.dtype) for signal in signals.values()]
        # blocks take their place in the order in which they were met; a block absent here contributes zeros
        jacobian = total.new_zeros(rows[0].shape[0], total.shape[0])
        start = 0
        for name, block in blocks.items():
            if name in signals:
                jacobian[:, start : start + block.size] = rows[list(signals).index(name)]
            start += block.size
        add_gram(total, jacobian)

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        total = symmetrised(sums[self.KEY][0])
        order = torch.cat([layout.positions(block) for block in blocks.values()]).to(total.device)
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return {self.KEY: (total,)}
        place = torch.argsort(order)
        return {self.KEY: (total[place[:, None], place[None, :]],)}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        whole = Block(self.KEY, layout.names, layout.shapes, (1, layout.size, 1), None, False)
        return Blockwise(layout, [(whole, DenseBlock(means[self.KEY][0], self.KEY))])
