"""How good attributions are: the linear datamodelling score, and how early wrong labels come in an order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area", "correlations", "datamodelling_score", "found"]


def datamodelling_score(scores: Tensor, subsets: Tensor, losses: Tensor) -> Tensor:
    """Spearman correlation, query by query, of summed scores and losses of networks trained on subsets (Park et al.
    2023, section 2): how well the order of the subsets is predicted.

    Args:
        scores: ``(Q, N)``, positive = helpful.
        subsets: ``(K, N)``, true for the examples that a network was trained on.
        losses: ``(K, Q)``, of the queries.

    Returns:
        ``(Q,)``.
    """
    return correlations(subsets.to(scores) @ scores.T, -losses)


def correlations(predicted: Tensor, measured: Tensor) -> Tensor:
    """Spearman correlations ``(Q,)`` along the first dimension of two ``(K, Q)``; 0 where one of them is constant."""
    first, second = _ranks(predicted), _ranks(measured)
    first, second = first - first.mean(0), second - second.mean(0)
    sizes = first.norm(dim=0) * second.norm(dim=0)
    return torch.where(sizes > 0, (first * second).sum(0) / sizes, 0.0)


def _ranks(values: Tensor) -> Tensor:
    """Places along the first dimension, from 0; equal values share the mean of theirs."""
    columns = values.T.contiguous()
    first = torch.stack([torch.searchsorted(column.sort().values, column) for column in columns], 1)
    last = torch.stack([torch.searchsorted(column.sort().values, column, right=True) for column in columns], 1)
    return (first + last - 1).double() / 2


def found(order: Tensor, wrong: Tensor, share: float) -> float:
    """Which part of the wrong ones ``wrong (N,)`` is among the first ``share`` of ``order (N,)``."""
    first = order[: round(share * len(order))]
    return float(wrong[first].sum() / wrong.sum())


def area(scores: Tensor, wrong: Tensor) -> float:
    """Area under the ROC curve of ``scores (N,)``: how often a wrong one ``wrong (N,)`` has more than a right one."""
    ranks, count = _ranks(scores[:, None])[:, 0], int(wrong.sum())
    return float((ranks[wrong].sum() - count * (count - 1) / 2) / (count * (len(wrong) - count)))
