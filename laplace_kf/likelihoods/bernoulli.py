"""Independent binary outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from laplace_kf.draws import Source, bernoulli
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import LIKELIHOODS
from laplace_kf.likelihoods.elementwise import ElementwiseLikelihood
from laplace_kf.likelihoods.mixed import log_mixture
from laplace_kf.likelihoods.normal import GaussianOutputs, Link, without_components
from laplace_kf.likelihoods.prediction import Prediction, binary_mixture
from laplace_kf.outputs.checks import refuse_nonfinite_parameters, refuse_values
from laplace_kf.outputs.layout import from_positions

__all__ = ["Bernoulli"]


@LIKELIHOODS.register("bernoulli")
@explained
class Bernoulli(ElementwiseLikelihood):
    """Binary cross-entropy: every output is the logit of an independent Bernoulli variable.

    Targets have the shape of the outputs and values in [0, 1] (or ``ignore_index``). Values between 0 and 1 are soft
    targets (grey levels): they enter ``log_prob``, then a negative cross-entropy, and ``score``; drawn targets are
    always 0 or 1. The output curvature is ``diag(p (1 - p))`` (methods 3; Martens 2016, Table 4.1).

    Args:
        ignore_index: targets equal to it contribute nothing, one output at a time; None for no such value.
    """

    has_logits: ClassVar[bool] = True
    inverse_links: ClassVar[Mapping[str, tuple[str, str, str]]] = {
        f"{name}Backward0": (name.lower(), "logit", "logits") for name in ("Sigmoid", "Softmax")
    }
    linked_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def _check_values(self, y: Tensor) -> None:
        refuse_values("Bernoulli", y, (y < 0) | (y > 1), f"[0, 1] (ignore_index={self.ignore_index})")

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return y * logsigmoid(z) + (1.0 - y) * logsigmoid(-z)

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        return y * torch.sigmoid(-z) - (1.0 - y) * torch.sigmoid(z)

    def _root_diagonal(self, z: Tensor) -> Tensor:
        return (0.5 * (logsigmoid(z) + logsigmoid(-z))).exp()

    draws_by_row = True

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Source) -> Tensor:
        p = torch.sigmoid(z)
        refuse_nonfinite_parameters("Bernoulli", p)
        return from_positions(bernoulli(p, generator), shape)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        return binary_mixture(logsigmoid(z), logsigmoid(-z), shape, partial(self._density, tuple(shape), z.dtype))

    def mixed_outputs(self, parts: Sequence[Prediction], log_weights: Tensor) -> Tensor | None:
        """Log odds of the mean probabilities, ``(N, C)`` in the layout of the outputs."""
        logits = torch.stack([part.distribution.base_dist.logits for part in parts])  # type: ignore[attr-defined]
        one, zero = log_mixture(logsigmoid(logits), log_weights), log_mixture(logsigmoid(-logits), log_weights)
        return (one - zero).reshape(parts[0].probs.shape)

    def links(self) -> dict[str, Link]:
        """``"mc"`` (draws of the logits) and ``"probit"``; both need their variances only."""
        return {"mc": Link(self._predict_draws, True), "probit": Link(self._probit, True)}

    def _probit(self, outputs: GaussianOutputs) -> Prediction:
        """``sigmoid(f / √(1 + π/8 · var))`` (MacKay 1992, "The evidence framework applied to classification")."""
        z = outputs.mean / (1.0 + math.pi / 8.0 * outputs.variance).sqrt()
        return without_components(self._predict(z[None], outputs.shape), outputs, self._predict)
