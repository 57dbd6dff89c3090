"""Linear maps of rows ``(N, I)`` or sequences ``(N, T, ..., I)``: ``F.linear``, ``x @ W``, ``addmm``.

The projections of attention and the cells of recurrent layers are ``F.linear`` calls, too
(:mod:`laplace_kf.layers.parts`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, WithParameter, functions_of, register


class LinearRule(MatrixRule):
    """``W (O, I)`` is its own matrix; every leading axis enumerates rows."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - 1

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
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


LINEAR = register(
    LinearRule(
        "linear",
        (F.linear,),
        (
            "nn.Linear", "nn.MultiheadAttention", "nn.TransformerEncoderLayer", "nn.TransformerDecoderLayer", "nn.RNN",
            "nn.GRU", "nn.LSTM", "nn.RNNCell", "nn.GRUCell", "nn.LSTMCell",
        ),
        {"input": None, "weight": None, "bias": None},
        (lambda: (nn.Linear(3, 4), torch.randn(5, 3)), lambda: (nn.Linear(3, 2, bias=False), torch.randn(5, 2, 3))),
    )
)  # fmt: skip


class MatmulRule(LinearRule):
    """``weight (I, O)`` on the right of its input; every leading axis enumerates rows."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Collection[int] = ()) -> BoundCall:
        if set(kwargs) - {"beta", "alpha"}:  # operands by keyword have other names in every function
            return BoundCall({"input": None, "weight": None, "bias": None})
        return super().bind(args, kwargs, parameters)

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        weight = call["weight"]
        if not isinstance(weight, Tensor) or weight.dim() != 2 or call["input"].dim() < 2:
            return "a matrix product with other than a two-dimensional weight on the right"
        if call.values.get("beta", 1) != 1 or call.values.get("alpha", 1) != 1:
            return "a matrix product with factors"
        bias = call.values.get("bias")
        if isinstance(bias, Tensor) and bias.shape != output.shape[-1:]:
            return "a matrix product with a bias that is no vector"
        return None

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        inp, out = weight.shape
        return MatrixView((1, inp, out), (0, 2, 1), (1, out, inp))


MATMUL = register(
    MatmulRule(
        "matmul",
        functions_of(*((owner, name) for name in ("matmul", "mm", "__matmul__") for owner in (torch, Tensor))),
        ("x @ W",),
        {"input": None, "weight": None},
        (lambda: (WithParameter(lambda x, w: x @ w, 3, 4), torch.randn(5, 3)),),
    )
)
ADDMM = register(
    MatmulRule(
        "addmm",
        functions_of((torch, "addmm"), (Tensor, "addmm")),
        ("transformers.Conv1D",),
        {"bias": None, "input": None, "weight": None, "beta": 1, "alpha": 1},
        (lambda: (WithParameter(lambda x, w: torch.addmm(torch.ones(2).to(x), x, w), 3, 2), torch.randn(5, 3)),),
    )
)
