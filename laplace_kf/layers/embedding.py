"""``F.embedding`` and bags: a linear map of one-hot inputs, whose input factor is diagonal (token counts).

The row of ``padding_idx`` is a constant: no gradient reaches it, so no draw moves it (:attr:`FlatLayout.held`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.layers.base import BoundCall, MatrixRule, MatrixView, register
from laplace_kf.lookups import lookup


class EmbeddingRule(MatrixRule):
    """``W = weightᵀ (O = dimension, I = vocabulary)``; the input at a position is the one-hot vector of its token."""

    one_hot = True

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - 1

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

    def constant_row(self, call: BoundCall) -> int | None:
        padding = call["padding_idx"]
        return None if padding is None else int(padding) % int(call["weight"].shape[0])


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
# what laplace_kf.lookups makes of a bag: its places without a token are -1
register(
    EmbeddingRule(
        "embedding_bag", (lookup,), ("nn.EmbeddingBag",), {"input": None, "weight": None, "padding_idx": None}
    )
)
