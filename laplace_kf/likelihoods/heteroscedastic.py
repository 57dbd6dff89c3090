"""Regression with a noise level that the network predicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from laplace_kf.draws import Source, normal
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import LIKELIHOODS
from laplace_kf.likelihoods.elementwise import DiagonalLikelihood
from laplace_kf.likelihoods.normal import GaussianOutputs, Link, normal_outputs
from laplace_kf.likelihoods.prediction import LOG_2PI, Prediction, normal_mixture
from laplace_kf.outputs.checks import refuse_nonfinite_parameters, refuse_shape
from laplace_kf.outputs.layout import from_positions, to_positions

__all__ = ["HeteroscedasticGaussian"]

_LOG_OF_LAST = "(lambda z: torch.cat([z[:, :1], z[:, 1:].log()], 1))({})"


@LIKELIHOODS.register("heteroscedastic_gaussian")
@explained
class HeteroscedasticGaussian(DiagonalLikelihood):
    """Normal target whose mean m and log-variance s are both outputs: ``-log p = ½ ((y-m)² e⁻ˢ + s + log 2π)``.

    Outputs ``(N, 2)`` = (mean, log-variance) with targets ``(N, 1)``; sequences ``(N, T, 2)`` with ``(N, T, 1)``;
    images ``(N, 2, H, W)`` with ``(N, 1, H, W)``. These are not natural parameters: ``hessian`` is the true Hessian,
    which depends on the target and can be indefinite; the PSD output curvature is the Fisher ``diag(e⁻ˢ, ½)``, its
    mean under the model (methods 2.6). A target that is NaN is missing and contributes nothing.

    Args:
        ignore_index: targets equal to it contribute nothing; off by default, because every real number is a possible
            target.
    """

    inverse_links: ClassVar[Mapping[str, tuple[str, str, str]]] = {
        f"{name}Backward0": (name.lower(), _LOG_OF_LAST, "a mean and a log-variance") for name in ("Exp", "Softplus")
    }
    linked_last: ClassVar[bool] = True
    nan_is_missing: ClassVar[bool] = True
    _channels: ClassVar[int | None] = 2

    def __init__(self, ignore_index: int | None = None) -> None:
        super().__init__(ignore_index)

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        expected = (shape[0], 1, *shape[2:]) if len(shape) > 3 else (*shape[:-1], 1)
        refuse_shape("HeteroscedasticGaussian", shape, targets, expected)
        y, keep = self._ignore_missing(targets if targets.is_floating_point() else targets.double())
        return to_positions(y), None if keep is None else to_positions(keep)

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = z[..., :1], z[..., 1:]
        return -0.5 * ((y - mean).square() * (-log_variance).exp() + log_variance + LOG_2PI)

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = z[..., :1], z[..., 1:]
        precision, residual = (-log_variance).exp(), y - mean
        return torch.cat([residual * precision, 0.5 * residual.square() * precision - 0.5], -1)

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        mean, log_variance = z.unbind(-1)
        residual = self._needed(y, "hessian").squeeze(-1) - mean
        precision = (-log_variance).exp()
        cross = residual * precision
        entries = [precision, cross, cross, 0.5 * residual * cross]
        return torch.stack(entries, -1).reshape(*mean.shape, 2, 2)

    def _root_diagonal(self, z: Tensor) -> Tensor:
        log_variance = z[..., 1]
        return torch.stack([(-0.5 * log_variance).exp(), torch.full_like(log_variance, 0.5**0.5)], -1)

    draws_by_row = True

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Source) -> Tensor:
        mean, log_variance = z[..., :1], z[..., 1:]
        scale = (0.5 * log_variance).exp()
        refuse_nonfinite_parameters("HeteroscedasticGaussian", mean + scale)
        noise = normal(mean.shape, generator, z.dtype)
        return from_positions(mean + scale * noise, shape)

    @property
    def has_temperature(self) -> bool:
        """True: what is less certain here is the noise."""
        return True

    def tempered(self, outputs: Tensor, temperature: float) -> Tensor:
        """The predicted standard deviations times the temperature (> 0); the means stay.

        A network that fits its training targets closely predicts too little noise; one factor on it is what a
        temperature is for classes, and what the noise scale is for :class:`~laplace_kf.likelihoods.Gaussian`.

        Args:
            outputs: ``(N, 2)``, ``(N, T, 2)`` or ``(N, 2, H, W)``.
            temperature: of the standard deviation.

        Returns:
            Outputs of the same shape, ``2 log T`` added to the log-variances.
        """
        z = self.to_positions(outputs)
        return self.from_positions(torch.cat([z[..., :1], z[..., 1:] + 2.0 * math.log(temperature)], -1), outputs)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        mean, log_variance = z[..., :1], z[..., 1:]
        return normal_mixture(mean, log_variance, shape, partial(self._density, tuple(shape), z.dtype))

    def links(self) -> dict[str, Link]:
        """``"exact"`` (the normal variable with the exact mean and variance), the same as ``"probit"``, and ``"mc"``.

        The predictive itself is a mixture over noise levels; ``"mc"`` draws it.
        """
        return {"exact": Link(self._exact, True), "probit": Link(self._exact, True), **super().links()}

    def _exact(self, outputs: GaussianOutputs) -> Prediction:
        """``N(m, V_m + E[eˢ])`` with ``E[eˢ] = exp(s + V_s / 2)``."""
        noise = (outputs.mean[..., 1:] + outputs.variance[..., 1:] / 2).exp()
        shape = tuple(outputs.shape)
        means = dataclasses.replace(outputs, mean=outputs.mean[..., :1], variance=outputs.variance[..., :1])
        return normal_outputs(means, noise, partial(self._density, shape, noise.dtype))
