"""Importance-sampled root columns: back-propagates only the columns that carry the curvature.

On a trained classifier most root columns ``√p_k (e_k − p)`` are almost zero. A column with squared norm ``q`` is kept
with probability ``π = min(1, c q)`` and scaled by ``π^{-1/2}``, which is unbiased; ``c`` is set so that the expected
number kept is the budget. Selection is systematic in a random order, which keeps the number of columns fixed.
"""

from __future__ import annotations

from typing import Any

import torch

from laplace_kf.columns import counted_columns, inclusion_probabilities, send_chosen, systematic
from laplace_kf.errors import InvalidArgument
from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation

__all__ = ["Importance"]


@ESTIMATORS.register("importance")
class Importance(Estimator):
    """Root columns drawn with probabilities proportional to their squared norms, ``columns`` of them per example.

    Args:
        columns: expected number of root columns per example.
    """

    name = "importance"
    draws = True

    def __init__(self, columns: float = 1.0) -> None:
        if not columns > 0:
            raise InvalidArgument(f"columns must be positive, got {columns}")
        self.columns = columns

    def options(self) -> dict[str, Any]:
        return {"columns": self.columns}

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        outputs = widened(observation.outputs)
        root = likelihood.root(outputs, observation.targets)
        place, examples = counted_columns(likelihood, outputs, observation.targets, root)
        weights = root.norms().reshape(-1)[place]  # of (N, T, K)
        probability = inclusion_probabilities(weights, self.columns * examples)
        taken = systematic(probability, generator)
        if len(taken):
            scale = probability[taken].rsqrt().to(outputs.dtype)
            send_chosen(observation, likelihood, outputs, root, place[taken], scale, sink)
