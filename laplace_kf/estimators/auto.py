"""Auto: as many root columns as an error that is asked for needs, the last layer in closed form.

The error is the relative Frobenius error of ``Σ_n W_Lᵀ H_n W_L`` over a minibatch, the curvature after the last layer's
product, which every earlier layer's is made from: columns ``r`` are weighed by ``w = ‖W_Lᵀ r‖²``, kept with probability
``min(1, c w)``, and ``c`` is the smallest for which ``Σ (1/π − 1) w²`` stays below ``tolerance²`` times that squared.
On a trained classifier that is a fraction of a column per example; where it would be most of them (an untrained one, a
tight tolerance) all are sent back, and the result is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_kf.callers import warn_user
from laplace_kf.columns import (
    OutputCurvature,
    at_closed_forms,
    counted_columns,
    error_probabilities,
    inclusion_probabilities,
    send_all,
    send_chosen,
    systematic,
)
from laplace_kf.errors import InvalidArgument
from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.roots import Root
from laplace_kf.tape import Observation

__all__ = ["Automatic"]

MANY = 2048  # outputs above which norms are those of the columns themselves: W_L W_Lᵀ would be as large as a factor
WORTH = 0.8  # share of all columns up to which choosing is worth it


@ESTIMATORS.register("auto")
class Automatic(Estimator):
    """Root columns chosen for an error; exact where that takes most of them, and for the layer at the output.

    Args:
        tolerance: relative Frobenius error of a minibatch's curvature after the last layer, in root mean square over
            the draws. Errors of minibatches are independent, so that of a whole fit is smaller.
        most: mean number of columns per example that are sent back at most; where the tolerance needs more, the error
            is larger, which is warned of once.

    Raises:
        ValueError: for a tolerance that is not between 0 and 1, or a ``most`` that is not positive.
    """

    name = "auto"
    draws = True

    def __init__(self, tolerance: float = 0.01, most: float = 128.0) -> None:
        if not 0 < tolerance < 1:
            raise InvalidArgument(f"tolerance must be between 0 and 1, got {tolerance}")
        if not most > 0:
            raise InvalidArgument(f"most must be positive, got {most}")
        self.tolerance, self.most = tolerance, most
        self._told = False

    def options(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance, "most": self.most}

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        outputs = widened(observation.outputs)
        curvature = OutputCurvature(likelihood, outputs, observation.targets)
        closed = at_closed_forms(observation, curvature, sink)
        if observation.block_names() <= closed:
            return
        root = likelihood.root(outputs, observation.targets)
        place, examples = counted_columns(likelihood, outputs, observation.targets, root)
        weights, norm = _weighed(observation, curvature, root)
        weights = weights.reshape(-1)[place]
        probability = error_probabilities(weights, self.tolerance**2 * norm)
        wanted = float(probability.sum())
        live = int((weights > 0).sum())
        rows = 1 if observation.chain is not None else 2  # others go forward once more
        if rows * wanted > WORTH * live and live <= self.most * examples:
            send_all(observation, likelihood, outputs, root, sink, closed)
            return
        if wanted > self.most * examples:
            probability = inclusion_probabilities(weights, self.most * examples)
            self._tell(wanted / examples, weights, probability, norm)
        taken = systematic(probability, generator)
        if len(taken):
            scale = probability[taken].rsqrt().to(outputs.dtype)
            send_chosen(observation, likelihood, outputs, root, place[taken], scale, sink, closed)

    def _tell(self, wanted: float, weights: Tensor, probability: Tensor, norm: float) -> None:
        """Warns, once, of an error that is larger than asked for."""
        if self._told:
            return
        self._told = True
        kept = probability > 0
        error = float(((1 / probability[kept] - 1) * weights[kept].square()).sum()) / norm
        warn_user(
            f"tolerance={self.tolerance:g} needs {wanted:.3g} columns per example, and most={self.most:g} are sent "
            f"back: the error of a minibatch is about {error**0.5:.2g}. Raise most=, or tolerance="
        )


def _weighed(observation: Observation, curvature: OutputCurvature, root: Root) -> tuple[Tensor, float]:
    """Squared norms of all columns after the last layer, ``(N, T, K)``, and that of the curvature there."""
    width = root.shape[2]
    weight = observation.output_weight(curvature.likelihood.to_positions) if width <= MANY else None
    if width > MANY:  # no (C, C); the diagonal alone is no more than the whole
        diagonal = curvature.diagonal().double().sum((0, 1))
        return root.norms(), float(diagonal.square().sum())
    total = curvature.total().double()
    if weight is None:
        return root.norms(), float(total.square().sum())
    weight = weight.double()
    gram = weight @ weight.T
    product = total @ gram
    return root.norms_through(gram), float((product * product.T).sum())
