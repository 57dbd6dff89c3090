"""Full: one dense matrix over all selected parameters, cross-layer blocks included (methods 9.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise, DenseBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums
from laplace_kf.tape import Block, EntryLayout, FlatLayout, Signals
from laplace_kf.tape.grams import add_gram, symmetrised, triangles

ROWS = 256  # of a large matrix that are put into another order together


@STRUCTURES.register("full")
class Full(Structure):
    """The dense Gauss-Newton matrix ``(P, P)``, accumulated block after block and kept in flat order."""

    name = "full"
    KEY = "all"

    def of_entries(self, entries: EntryLayout) -> Structure:
        return DenseEntries(entries)

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return 3 * layout.size**2 * itemsize  # the sum, the eigenvectors and the room to compute them

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return [block.size for block in blocks.values()] == [layout.size]  # entries between blocks need columns

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        return [layout.size]

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return sum(block.size for block in blocks.values()) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        if self.KEY not in sums:
            sums[self.KEY] = (triangles(like, layout.size, layout.size),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        total = sums[self.KEY][0]
        (first, *more) = blocks.values()
        if not more and first.size == total.shape[0] and first.name in signals:
            signals[first.name].add_outer(total)
            return
        rows = [signal.jacobian().to(total) for signal in signals.values()]
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
        found = torch.empty_like(total)
        for start in range(0, len(place), ROWS):  # single entries take half as long again
            found[start : start + ROWS] = total[place[start : start + ROWS]].index_select(1, place)
        return {self.KEY: (found,)}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return Blockwise(layout, [(layout.whole(self.KEY), DenseBlock(means[self.KEY][0], self.KEY))])


class DenseEntries(Structure):
    """The dense Gauss-Newton matrix ``(k, k)`` of single weights (a subnetwork); the rest of the network is fixed.

    Args:
        entries: which weights.
    """

    name = "full"

    def __init__(self, entries: EntryLayout) -> None:
        self.entries = entries
        self._of_block: dict[str, tuple[Tensor, Tensor]] = {}  # canonical positions in a block, places in the matrix

    def first(self) -> Structure:
        return Full()

    def kept_layout(self, layout: FlatLayout) -> FlatLayout:
        return self.entries

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return 3 * self.entries.size**2 * itemsize

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        return [self.entries.size]

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return 2 * self.entries.size * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        size = self.entries.size
        if Full.KEY not in sums:
            sums[Full.KEY] = (triangles(like, size, size),)
        place: Tensor | None = None
        for name, block in blocks.items():
            if name in self._of_block:
                continue
            if place is None:
                place = torch.full((layout.size,), -1)
                place[self.entries.within(layout)] = torch.arange(size)
            mine = place[layout.positions(block)]
            index = (mine >= 0).nonzero()[:, 0]
            self._of_block[name] = (index.to(like.device), mine[index].to(like.device))

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        total = sums[Full.KEY][0]
        rows: Tensor | None = None
        for name, signal in signals.items():
            index, place = self._of_block[name]
            if not len(index):
                continue
            found = signal.entries(index, total.dtype).to(total.device)
            rows = total.new_zeros(found.shape[0], total.shape[0]) if rows is None else rows
            rows[:, place.to(total.device)] = found.to(total.device)
        if rows is not None:
            add_gram(total, rows)

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        return {Full.KEY: (symmetrised(sums[Full.KEY][0]),)}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return self.first().matrix(means, blocks, layout)
