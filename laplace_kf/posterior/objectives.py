"""What tuning minimises on validation data: scores by example where there are such, else one number for all.

A new objective is one function ``(prediction, targets) -> (N,) scores or 0-dim``, lower is better, registered in
:data:`OBJECTIVES`. Scores by example let the search tell a difference from the noise of the validation set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.likelihoods import Prediction
from laplace_kf.registry import Registry

__all__ = [
    "OBJECTIVES",
    "OODContrast",
    "Objective",
    "WithinTolerance",
    "brier",
    "ece",
    "missing_entropy",
    "nll",
    "scored_alone",
]

Objective = Callable[[Prediction, Any], "Tensor | float"]
OBJECTIVES: Registry[Objective] = Registry("tuning objective")

BINS = 15


@OBJECTIVES.register("nll")
def nll(prediction: Prediction, targets: Any) -> Tensor:
    """Negative log predictive density in nats, ``(M,)`` for the M ≤ N examples with a target that is not ignored."""
    scores = -prediction.log_prob(targets)
    if not isinstance(targets, Tensor) or targets.shape[:1] != scores.shape:
        return scores
    return scores[prediction.kept(targets).reshape(len(scores), -1).any(1)]


@OBJECTIVES.register("brier")
def brier(prediction: Prediction, targets: Any) -> Tensor:
    """Squared distance between class probabilities ``(N, C)`` and the one-hot (or binary) targets, ``(N,)``.

    With several positions per example the mean over those that are not ignored, ``(M,)`` for the M ≤ N examples that
    have any. Binary targets are ignored one output at a time.

    Raises:
        IncompatiblePair: if the prediction has no probabilities.
    """
    probs = _probabilities(prediction, "brier")
    if probs.shape == targets.shape:
        targets = prediction.channel_last(targets)
    probs = prediction.channel_last(probs)
    if targets.dtype == torch.long and targets.shape == probs.shape[:-1]:
        keep = prediction.kept(targets)
        wanted = torch.nn.functional.one_hot(targets.where(keep, 0), probs.shape[-1]).to(probs.dtype)
        squares = (probs - wanted).square().sum(-1)
    else:
        used = prediction.kept(targets)
        squares = (probs - targets.to(probs.dtype)).square().where(used, 0.0).sum(-1)
        keep = used.any(-1)
    keep, squares = keep.reshape(len(probs), -1), squares.reshape(len(probs), -1)
    count = keep.sum(1)
    return (squares.where(keep, 0.0).sum(1) / count)[count > 0]


@OBJECTIVES.register("ece")
def ece(prediction: Prediction, targets: Any) -> Tensor:
    """Expected calibration error of the most probable class over 15 equal bins of confidence, 0-dim in [0, 1].

    Not a proper score (a constant prediction of the class frequencies has none): use it to compare, not to train.

    Raises:
        IncompatiblePair: if the prediction has no class probabilities.
    """
    probs = prediction.channel_last(_probabilities(prediction, "ece"))
    if targets.dtype != torch.long or targets.shape != probs.shape[:-1]:
        raise IncompatiblePair('objective "ece" needs class labels; use "nll" or "brier" for this likelihood')
    keep = prediction.kept(targets)
    confidence, label = probs[keep].max(-1)
    gap = confidence - (label == targets[keep]).to(confidence.dtype)
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    return gap.new_zeros(BINS).index_add_(0, place, gap).abs().sum() / max(1, gap.numel())


def missing_entropy(prediction: Prediction) -> Tensor:
    """Entropy that a prediction lacks to the largest possible, its KL divergence from uniform: ``(N,)`` nats ≥ 0.

    Raises:
        IncompatiblePair: if the prediction has no probabilities.
    """
    probs = prediction.channel_last(_probabilities(prediction, "ood"))
    entropy = prediction.entropy
    each = math.log(probs.shape[-1]) if _sums_to_one(probs) else probs.shape[-1] * math.log(2)
    positions = prediction.position_entropy.numel() / max(1, entropy.numel())
    return each * positions - entropy


@dataclass(frozen=True, eq=False)
class OODContrast:
    """Mean validation NLL plus ``weight`` times the mean KL divergence from uniform on out-of-distribution inputs.

    Confident where the data are, ignorant where they are not. The second term is that of outlier exposure (Hendrycks
    et al. 2019, equation 1) in the direction that stays bounded (at most ``log C`` nats), with their weight.

    Args:
        inputs: loader or tensor of inputs far from the data; targets in its batches are not looked at.
        weight: of the second term, > 0.
    """

    inputs: Iterable[Any]
    weight: float = 0.5

    def __call__(self, prediction: Prediction, targets: Any) -> Tensor:
        """The score on validation data, ``(N,)``: :func:`nll`."""
        return -prediction.log_prob(targets)

    def outside(self, prediction: Prediction) -> Tensor:
        """The score at the other inputs, ``(N,)``: :func:`missing_entropy` times the weight."""
        return self.weight * missing_entropy(prediction)


@dataclass(frozen=True, eq=False)
class WithinTolerance:
    """The largest variance of the weights at which a score is as good as the trained weights' up to a tolerance.

    The smallest λ of a grid, at one N, is taken such that from the largest λ down to it no score exceeds MAP's by more
    than ``tolerance``. The rule by which weights that were trained without a posterior, adapters of language models
    above all, are given one (Shi et al. 2024, "Training-Free Bayesianization for Low-Rank Adapters", section 3.2). It
    asks for as much doubt as the validation data allow; the best score is what the other objectives ask for.

    Args:
        tolerance: by how much the score may be worse, in its own unit (nats of ``"nll"``), ≥ 0.
        of: the score: a registered name or a function like one.
    """

    tolerance: float = 0.01
    of: str | Objective = "nll"

    def __post_init__(self) -> None:
        if not (isinstance(self.tolerance, (int, float)) and 0 <= self.tolerance < math.inf):
            raise InvalidArgument(f"tolerance must be a number ≥ 0, got {self.tolerance!r}")
        if isinstance(self.of, str):
            _ = OBJECTIVES[self.of]

    def __call__(self, prediction: Prediction, targets: Any) -> Tensor | float:
        """The score on validation data, ``(N,)`` or 0-dim, lower is better."""
        score = OBJECTIVES[self.of] if isinstance(self.of, str) else self.of
        return score(prediction, targets)


def scored_alone(objective: Objective) -> bool:
    """Whether the score of an example is known not to depend on the others that it is scored with."""
    if isinstance(objective, WithinTolerance):
        objective = OBJECTIVES[objective.of] if isinstance(objective.of, str) else objective.of
    return isinstance(objective, OODContrast) or any(objective is each for each in (nll, brier))


def _probabilities(prediction: Prediction, what: str) -> Tensor:
    try:
        return prediction.probs
    except AttributeError as error:
        raise IncompatiblePair(
            f'objective "{what}" needs predicted probabilities, which this likelihood does not have; use "nll"'
        ) from error


def _sums_to_one(probs: Tensor) -> bool:
    total = probs.sum(-1)
    return probs.shape[-1] > 1 and bool(torch.allclose(total, torch.ones_like(total), atol=1e-3))
