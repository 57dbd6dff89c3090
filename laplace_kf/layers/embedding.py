"""``F.embedding``: a linear map of one-hot inputs, whose input factor is diagonal (token counts)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, register


class EmbeddingRule(MatrixRule):
    """``W = weightᵀ (O = dimension, I = vocabulary)``; the input at a position is the one-hot vector of its token."""

    one_hot = True

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - 1

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        if call["max_norm"] is not None:
            return "an embedding with max_norm, which rewrites its weight in the forward pass"
        if call["scale_grad_by_freq"]:
            return "an embedding with scale_grad_by_freq, whose gradient is not the derivative"
        if call["sparse"]:
            return "an embedding with sparse gradients"
        return None

    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        vocabulary, dimension = weight.shape
        return MatrixView((1, vocabulary, dimension), (0, 2, 1), (1, dimension, vocabulary))

    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        tokens = rows.reshape(-1, 1)
        padding = call["padding_idx"]
        if padding is None:
            return tokens
        # autograd gives the padding row no gradient, so its position carries no input either
        return torch.where(tokens == padding % call["weight"].shape[0], -1, tokens)

    def outputs(self, rows: Tensor, call: BoundCall, groups: int) -> Tensor:
        return rows[..., None, None, :]


EMBEDDING = register(
    EmbeddingRule(
        "embedding",
        (F.embedding,),
        ("nn.Embedding",),
        {
            "input": None, "weight": None, "padding_idx": None, "max_norm": None, "norm_type": 2.0,
            "scale_grad_by_freq": False, "sparse": False,
        },
        (lambda: (nn.Embedding(6, 3), torch.randint(6, (5, 2))),),
    )
)  # fmt: skip
