"""A structure: the dense matrix of every block, in a form of its own that the package knows nothing of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise, CurvatureBlock
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, Signals


class PlainBlock(CurvatureBlock):
    """A dense block ``(P_b, P_b)``: shape, label, and the methods without a default."""

    def __init__(self, values: Tensor, label: str) -> None:
        self.values, self.label, self.shape = values, label, (1, len(values), 1)

    def dense(self) -> Tensor:
        return self.values

    def scaled(self, factor: float | Tensor) -> PlainBlock:
        return PlainBlock(self.values * factor, self.label)

    def spectrum(self) -> Tensor:
        return torch.linalg.eigvalsh(self.values).clamp_min(0).reshape(self.shape)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> PlainBlock:
        added = torch.diag_embed(prior.reshape(-1).expand(self.size))
        return PlainBlock(n * self.values + added, self.label)


@STRUCTURES.register("plain_blocks")
class PlainBlocks(Structure):
    """``Σ JᵀJ`` of every block."""

    name = "plain_blocks"

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name not in sums:
                sums[name] = (zeros(like, block.size, block.size),)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            rows = signal.jacobian().to(sums[name][0])  # (V·N, P_b): columns times examples
            sums[name][0].addmm_(rows.T, rows)

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return Blockwise(layout, [(block, PlainBlock(means[name][0], name)) for name, block in blocks.items()])
