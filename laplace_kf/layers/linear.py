"""``F.linear``: fully connected layers, on rows ``(N, I)`` or sequences ``(N, T, ..., I)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, register


class LinearRule(MatrixRule):
    """``W (O, I)`` is its own matrix; every leading axis enumerates rows."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - 1

    def refuses(self, call: BoundCall) -> str | None:
        if call["weight"].dim() != 2:
            return "F.linear with a one-dimensional weight"
        return None

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        shape = (1, weight.shape[0], weight.shape[1])
        return MatrixView(shape, (0, 1, 2), shape)

    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        return rows[:, None, None, :]

    def outputs(self, rows: Tensor, call: BoundCall, groups: int) -> Tensor:
        return rows[..., None, None, :]


LINEAR = register(LinearRule("linear", (F.linear,), ("nn.Linear",), {"input": None, "weight": None, "bias": None}))
