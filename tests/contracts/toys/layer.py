"""A layer rule: one matrix for every head, ``y[n, h] = W[h] x[n, h]``, by a function of our own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, WithParameter, register


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """``(N, H, I)`` and ``(H, I, O)`` to ``(N, H, O)``."""
    if has_torch_function_variadic(x, weight):  # a Python function has to show itself to the tape, as torch's own do
        return handle_torch_function(per_head, (x, weight), x, weight)
    return torch.einsum("nhi,hio->nho", x, weight)


class PerHeadRule(MatrixRule):
    """The heads are groups ``R``; the weight's memory holds ``(R, I, O)``."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return 1  # (N, H, O): one axis of rows

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        heads, inp, out = weight.shape
        return MatrixView((heads, inp, out), (0, 2, 1), (heads, out, inp))

    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        return rows[:, None]  # (B, T = 1, R, I)

    def outputs(self, rows: Tensor, call: BoundCall, groups: int) -> Tensor:
        return rows.unsqueeze(-3)  # (..., B, T = 1, R, O)


register(
    PerHeadRule(
        "per_head",
        (per_head,),
        ("per_head(x, w)",),
        {"input": None, "weight": None},
        (lambda: (WithParameter(per_head, 2, 3, 2), torch.randn(4, 2, 3)),),
    )
)
