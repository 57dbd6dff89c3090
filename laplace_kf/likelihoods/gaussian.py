"""Regression with a known noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods.base import LIKELIHOODS
from laplace_kf.likelihoods.elementwise import ElementwiseLikelihood
from laplace_kf.likelihoods.prediction import LOG_2PI, GaussianOutputs, Link, Prediction, normal_mixture, normal_outputs
from laplace_kf.outputs.checks import refuse_nonfinite_parameters
from laplace_kf.outputs.layout import from_positions

__all__ = ["Gaussian"]


def _as_float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


@LIKELIHOODS.register("gaussian")
class Gaussian(ElementwiseLikelihood):
    """Squared error with noise: every output is the mean of an independent normal variable.

    Targets have the shape of the outputs. ``-log p = (z - y)² / (2 σ²) + log σ + ½ log 2π`` per output, with curvature
    ``I / σ²`` (methods 3; squared error in Martens 2016, Table 4.1, is σ = 1).

    Args:
        scale: standard deviation σ > 0 of the noise: a number, or a 0-dim tensor in which everything computed from
            this likelihood is then differentiable. The attribute ``scale`` can be set.
        ignore_index: targets equal to it contribute nothing, one output at a time; off by default, because every real
            number is a possible target.
    """

    def __init__(self, scale: float | Tensor = 1.0, ignore_index: int | None = None) -> None:
        super().__init__(ignore_index)
        self.scale = scale

    @property
    def scale(self) -> float | Tensor:
        """Standard deviation of the noise, a number or a 0-dim tensor in the units of the outputs."""
        return self._scale

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor) and value.ndim:
            raise ShapeMismatch(f"Gaussian: scale must be a number or a 0-dim tensor, got shape {tuple(value.shape)}.")
        number = _as_float(value)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"Gaussian: scale {number} is outside (0, inf); it is a standard deviation.")
        self._scale: float | Tensor = value if isinstance(value, Tensor) else number

    def _sigma(self, z: Tensor) -> Tensor:
        return torch.as_tensor(self.scale, dtype=z.dtype, device=z.device)

    def _check_values(self, y: Tensor) -> None:
        """Every finite number is allowed."""

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        sigma = self._sigma(z)
        return -0.5 * ((y - z) / sigma).square() - sigma.log() - 0.5 * LOG_2PI

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        return (y - z) / self._sigma(z).square()

    def _root_diagonal(self, z: Tensor) -> Tensor:
        return self._sigma(z).reciprocal().expand_as(z)

    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        refuse_nonfinite_parameters("Gaussian", z)
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        return from_positions(z + self._sigma(z) * noise, shape)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        return normal_mixture(z, 2.0 * self._sigma(z).log(), shape, partial(self._density, tuple(shape), z.dtype))

    def links(self) -> dict[str, Link]:
        """``"exact"`` (``N(f, V + σ²)``, joint over outputs), ``"probit"`` (its marginals) and ``"mc"``."""
        return {"exact": Link(self._exact, False), "probit": Link(self._exact, True), **super().links()}

    def _exact(self, outputs: GaussianOutputs) -> Prediction:
        density = partial(self._density, tuple(outputs.shape), outputs.mean.dtype)
        return normal_outputs(outputs, self._sigma(outputs.mean).square(), density)

    @property
    def noise_scale(self) -> float:
        """σ as a number."""
        return _as_float(self.scale)

    def with_noise_scale(self, value: float | Tensor) -> Gaussian:
        """A copy with another σ; this object keeps its own."""
        return Gaussian(value, self.ignore_index)

    def parameters(self) -> dict[str, float]:
        """``{"scale": σ}``."""
        return {"scale": _as_float(self.scale)}

    def _settings(self) -> dict[str, Any]:
        return {"scale": _as_float(self.scale), "ignore_index": self.ignore_index}

    def rescaled(
        self, fitted: Mapping[str, float], log_likelihood: Tensor, terms: float
    ) -> tuple[float | Tensor, Tensor]:
        """As the base class: the curvature goes with ``1/σ²``, the likelihood through the squared error it contains."""
        before, now = fitted["scale"], torch.as_tensor(self.scale, dtype=log_likelihood.dtype)
        if not now.requires_grad and float(now) == before:
            return 1.0, log_likelihood
        squares = -2 * before**2 * (log_likelihood + terms * (math.log(before) + 0.5 * LOG_2PI))
        likelihood = -squares / (2 * now.square()) - terms * (now.log() + 0.5 * LOG_2PI)
        return before**2 / now.square(), likelihood
