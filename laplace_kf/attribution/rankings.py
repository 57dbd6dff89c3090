"""Which training examples are labelled wrongly: scores that rank them, the most suspicious first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.attribution.gradients import at_mean, batches_of
from laplace_kf.attribution.scoring import self_influence
from laplace_kf.estimators.base import widened
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision
from laplace_kf.registry import Registry

__all__ = ["SUSPICIONS", "Ranking", "mislabelled"]

Suspicion = Callable[[LaplacePosterior, Any, "PriorPrecision | None"], Tensor]
SUSPICIONS: Registry[Suspicion] = Registry("score of mislabelled examples")


@dataclass(frozen=True)
class Ranking:
    """Training examples by how suspicious their labels are.

    Attributes:
        order: positions ``(N,)`` in the data, the most suspicious first.
        scores: ``(N,)`` in the order of the data, larger is more suspicious.
    """

    order: Tensor
    scores: Tensor


@SUSPICIONS.register("self_influence")
def _self_influence(posterior: LaplacePosterior, train: Any, damping: PriorPrecision | None) -> Tensor:
    return self_influence(posterior, train, damping=damping)


@SUSPICIONS.register("loss")
def _loss(posterior: LaplacePosterior, train: Any, damping: PriorPrecision | None) -> Tensor:
    """The loss at the trained weights."""
    parts = []
    with lasting(), torch.no_grad(), at_mean(posterior) as gradients:
        for index, batch in enumerate(batches_of(train, posterior, "training")):
            seen = gradients.observe(batch, index, "the training batch")
            parts.append(-posterior.likelihood.log_prob(widened(seen.outputs), seen.targets))
    return torch.cat(parts)


@SUSPICIONS.register("left_out")
def _left_out(posterior: LaplacePosterior, train: Any, damping: PriorPrecision | None) -> Tensor:
    """The loss plus the self-influence: to first order the loss of a network that was trained without the example."""
    return _loss(posterior, train, damping) + self_influence(posterior, train, damping=damping)


@typed
def mislabelled(
    posterior: LaplacePosterior, train: Any, score: str = "left_out", *, damping: PriorPrecision | None = None
) -> Ranking:
    """Ranks training examples, the most likely mislabelled first.

    Args:
        posterior: fitted on the data, wrong labels included.
        train: N training examples as ``fit`` takes them, in order.
        score: ``"self_influence"`` (:func:`self_influence`); ``"loss"`` at the trained weights; ``"left_out"``, their
            sum: to first order the loss of the network without the example.
        damping: λ in place of the posterior's ``prior_precision``.

    Returns:
        Order and scores, each ``(N,)``.

    Raises:
        UnknownName: for another score; otherwise as :func:`laplace_kf.attribution.influence`.
    """
    scores = SUSPICIONS[score](posterior, train, damping)
    return Ranking(scores.argsort(descending=True, stable=True), scores)
