"""Predictions for graphs of different sizes: what stands in the places of padding has no entropy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_kf.batches import Forward
from laplace_kf.graphs import padding
from laplace_kf.likelihoods import Prediction

__all__ = ["without_padding"]

Entropies = tuple[Tensor, "Tensor | None"]


def without_padding(prediction: Prediction, inputs: Any, forward: Forward | None) -> Prediction:
    """The prediction of a batch of graphs with entropies that are sums over its nodes, not over the padding.

    Args:
        prediction: of outputs ``(N, T, C)``; any other one is returned as it is.
        inputs: what was predicted at.
        forward: the user's, which lays its outputs out by itself.
    """
    first = next(iter(prediction.values.values()), None)
    kept = None if forward is not None or first is None else padding(inputs, first.shape)
    if kept is None:
        return prediction
    return replace(prediction, entropies=partial(_entropies, prediction, kept))


def _entropies(prediction: Prediction, kept: Tensor) -> Entropies:
    total, conditional = prediction.entropies()
    where = kept.to(total.device)
    zero = torch.zeros((), dtype=total.dtype, device=total.device)
    return torch.where(where, total, zero), None if conditional is None else torch.where(where, conditional, zero)
