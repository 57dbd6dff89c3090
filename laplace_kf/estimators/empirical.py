"""Empirical Fisher: scores of the observed targets. It is not the Gauss-Newton matrix (methods 2.6)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("empirical")
class Empirical(ColumnEstimator):
    """One column ``∇ log p(y)`` per example, at the targets of the data: rank ≤ N, no approximation of curvature.

    Weights of examples and classes multiply the outer product once, as they multiply every curvature: an example of
    weight 2 is one that stands twice (methods 17.11).
    """

    name = "empirical"
    is_ggn = False

    def columns(
        self, observation: Observation, likelihood: Likelihood, generator: torch.Generator, at_once: int
    ) -> Iterator[Tensor]:
        yield likelihood.root_score(widened(observation.outputs), observation.targets)[None]
