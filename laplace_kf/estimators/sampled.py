"""Sampled (KFAC): scores of targets drawn from the model; unbiased for the Fisher (methods 4.2, 2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_kf.draws import ExampleDraws
from laplace_kf.errors import InvalidArgument
from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("sampled")
class Sampled(ColumnEstimator):
    """``S`` columns ``∇ log p(y_s) / √S`` with fresh ``y_s ~ p(y | outputs)`` for every minibatch.

    Args:
        samples: number of draws ``S`` per example.
    """

    name = "sampled"
    draws = True
    by_example = True

    def __init__(self, samples: int = 1) -> None:
        if samples < 1:
            raise InvalidArgument(f"samples must be at least 1, got {samples}")
        self.samples = samples

    def options(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def columns(
        self,
        observation: Observation,
        likelihood: Likelihood,
        generator: torch.Generator | ExampleDraws,
        at_once: int,
    ) -> Iterator[Tensor]:
        outputs = widened(observation.outputs)
        for start in range(0, self.samples, at_once):
            chunk = [
                likelihood.drawn_score(outputs, observation.targets, generator)
                for _ in range(start, min(start + at_once, self.samples))
            ]
            yield torch.stack(chunk) / self.samples**0.5
