"""The input of a prediction, looked at before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from laplace_kf import conventions
from laplace_kf.batches import Forward, leaves_of, predicted, to_tensors
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Prediction
from laplace_kf.models import preserved
from laplace_kf.replica import stage

__all__ = ["asked", "labelled"]


def asked(model: nn.Module, forward: Forward | None, x: Any) -> Any:
    """The input with tensors for arrays, refused where it cannot be what it has to be.

    A tensor ``(N, ...)`` that goes through the user's ``forward=`` is tried with another number of rows first, two at
    most three: a forward that reads it as a batch (``batch[0]`` is its first example) gives as many rows as before,
    which shows also where that number is N by chance.

    Args:
        model: the network; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        x: what ``predict`` was given.

    Raises:
        ShapeMismatch: if a tensor is read as a batch, if it holds no tensor, or for a data set without a loader.
    """
    if isinstance(x, Dataset):
        raise ShapeMismatch(
            f"predict was given {type(x).__name__}; wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)"
        )
    if isinstance(x, (list, tuple)) and len(x) and all(isinstance(leaf, (int, float, bool)) for leaf in leaves_of(x)):
        raise ShapeMismatch(
            f"predict was given a {type(x).__name__} of numbers; make it a tensor or an array: torch.tensor(x)"
        )
    x = to_tensors(x, model)
    by_user = forward is not None and not hasattr(forward, "outputs_at")
    if by_user and isinstance(x, Tensor) and x.dim() and x.shape[0]:
        rows = torch.zeros(2 if x.shape[0] != 2 else 3, dtype=torch.long, device=x.device)
        with stage(model, forward) as (standing, own), preserved(standing), torch.no_grad():
            predicted(standing, x.detach()[rows], own)  # checks its rows
    return x


def labelled(model: nn.Module, forward: Forward | None, x: Any, prediction: Prediction) -> Prediction:
    """The prediction, whose ``log_prob`` takes labels as a batch of the form of ``x`` has them.

    For a mapping given to a causal language model of transformers these are the batch's ``labels (N, T)``, of which
    label t + 1 belongs to position t; for everything else they stand beside the outputs.
    """
    if forward is not None or not isinstance(x, Mapping) or not conventions.is_causal(model):
        return prediction
    return replace(prediction, density=partial(_density_of_labels, model, prediction.density))


def _density_of_labels(model: nn.Module, density: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    return density(conventions.targets(model, labels))
