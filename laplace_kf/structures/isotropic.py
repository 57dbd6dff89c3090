"""Isotropic: one curvature value for all selected parameters, the mean of the exact diagonal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise, DiagonalBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals


@STRUCTURES.register("isotropic")
class IsotropicCurvature(Structure):
    """``tr(C̄)/P · I``: the trace is the one thing kept of every block.

    P counts parameters: entries that are held or that took no part in any forward pass have curvature 0.
    """

    name = "isotropic"

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return True

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name in blocks:
            if name not in sums:
                sums[name] = (zeros(like),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            squares = zeros(sums[name][0], *blocks[name].shape)
            signal.add_squares(squares)
            sums[name][0].add_(squares.sum())

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        total = torch.stack([part for (part,) in means.values()]).sum()
        free = {name: layout.free(block).to(total) for name, block in blocks.items()}
        value = total / torch.stack([part.sum() for part in free.values()]).sum().clamp_min(1)
        entries = [(block, DiagonalBlock(value * free[name], name)) for name, block in blocks.items()]
        return Blockwise(layout, entries)
