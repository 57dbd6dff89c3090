"""Regression with a known noise level."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from laplace_kf.draws import Source, normal
from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidType, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import LIKELIHOODS
from laplace_kf.likelihoods.elementwise import ElementwiseLikelihood
from laplace_kf.likelihoods.normal import GaussianOutputs, Link, joint_outputs_density, normal_outputs
from laplace_kf.likelihoods.prediction import LOG_2PI, Prediction, normal_density, normal_mixture
from laplace_kf.likelihoods.reading import times
from laplace_kf.outputs.checks import refuse_nonfinite_parameters
from laplace_kf.outputs.layout import from_positions, masked
from laplace_kf.outputs.noise import known_noise
from laplace_kf.outputs.rows import leaves

__all__ = ["Gaussian"]


def _as_float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _numbers(value: Any) -> list[float]:
    """The numbers of a scale, one or C."""
    return [float(v) for v in value.detach().reshape(-1)] if isinstance(value, Tensor) else [float(value)]


@LIKELIHOODS.register("gaussian")
@explained
class Gaussian(ElementwiseLikelihood):
    """Squared error with noise: every output is the mean of an independent normal variable.

    Targets have the shape of the outputs. ``-log p = (z - y)² / (2 σ²) + log σ + ½ log 2π`` per output, with curvature
    ``I / σ²`` (methods 3; squared error in Martens 2016, Table 4.1, is σ = 1). A target that is NaN is missing: that
    output of that example contributes nothing to anything.

    Where the noise of every example is known, targets are pairs ``(y, scale)``: the standard deviations of the batch's
    own observations, > 0, ``(N,)``, or with one number a position or an output (``(N, C)`` for outputs ``(N, C)``, with
    1 for dimensions that share a number). They take the place of σ in densities and curvature; predictions of new
    observations keep σ, and are scored at the pair's.

    Args:
        scale: standard deviation σ > 0 of the noise: a number, or a 0-dim tensor in which everything computed from
            this likelihood is then differentiable; or a tensor ``(C,)`` with one for each output. The attribute
            ``scale`` can be set. ``tune`` moves all outputs' σ by one factor; a change after the fit that is not one
            factor changes the shape of the curvature and is refused until the next ``fit``.
        ignore_index: targets equal to it contribute nothing, one output at a time; off by default, because every real
            number is a possible target.
    """

    nan_is_missing: ClassVar[bool] = True

    def __init__(self, scale: float | Tensor | Sequence[float] = 1.0, ignore_index: int | None = None) -> None:
        super().__init__(ignore_index)
        self.scale = scale

    @classmethod
    def examples(cls) -> tuple[tuple[Gaussian, int], ...]:
        return ((cls(), 3), (cls(scale=[0.5, 1.5]), 2))

    @property
    def scale(self) -> float | Tensor:
        """Standard deviation of the noise, a number or a tensor, 0-dim or ``(C,)``, in the units of the outputs."""
        return self._scale

    @scale.setter
    def scale(self, value: float | Tensor | Sequence[float]) -> None:
        if not isinstance(value, Tensor):
            wrong = InvalidType(
                f"Gaussian: scale must be a number, or numbers (C,) in a tensor, an array or a list; got {value!r}."
            )
            if value is None or isinstance(value, (str, bool)):  # numpy makes numbers of them
                raise wrong
            try:
                value = torch.tensor(
                    value if isinstance(value, (list, tuple)) else np.asarray(value, np.float64)
                ).double()
            except (TypeError, ValueError) as error:
                raise wrong from error
            value = value if value.ndim else float(value)
        if isinstance(value, Tensor) and (value.ndim > 1 or value.numel() == 0):
            raise ShapeMismatch(
                f"Gaussian: scale must be a number, a 0-dim tensor or a tensor (C,), got shape {tuple(value.shape)}."
            )
        for number in _numbers(value):
            if not (math.isfinite(number) and number > 0):
                raise InvalidArgument(f"Gaussian: scale {number} is outside (0, inf); it is a standard deviation.")
        self._scale: float | Tensor = value if isinstance(value, Tensor) else float(value)
        self._moved: tuple[Tensor, Tensor] | None = None

    @property
    def differs_by_output(self) -> bool:
        """Whether the scale is a tensor ``(C,)``, one number for each output."""
        return isinstance(self.scale, Tensor) and self.scale.ndim == 1

    def _check_outputs(self, shape: Sequence[int]) -> None:
        super()._check_outputs(shape)
        channels = shape[1] if len(shape) > 3 else shape[-1]
        if self.differs_by_output and len(_numbers(self.scale)) != channels:
            raise ShapeMismatch(
                f"Gaussian: scale must have one number for each output; it has "
                f"{len(_numbers(self.scale))}, got outputs of shape {tuple(shape)} with {channels}."
            )

    def _sigma(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Broadcastable to ``z (..., C)``: the targets' own noise if they bring it, else σ."""
        if y is not None and y.shape[-1] == 2 * z.shape[-1]:
            return y[..., z.shape[-1] :]
        return torch.as_tensor(self.scale, dtype=z.dtype, device=z.device)

    def _read(self, z: Tensor, shape: Sequence[int], targets: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(targets, (tuple, list)):
            return super()._read(z, shape, targets)
        if len(targets) != 2 or not all(isinstance(t, Tensor) for t in targets):
            raise ShapeMismatch(
                "Gaussian: targets with known noise must be a pair (y, scale) of tensors, got "
                f"{type(targets).__name__} of "
                f"{[type(t).__name__ for t in targets]}."
            )
        y, keep = super()._read(z, shape, targets[0])
        noise = known_noise("Gaussian", targets[1], shape, keep)
        return torch.cat([y.to(z.dtype), noise.to(z.dtype).expand_as(y)], -1), keep  # read by _sigma and _value

    @staticmethod
    def _value(z: Tensor, y: Tensor) -> Tensor:
        return y[..., : z.shape[-1]]

    def _density(
        self, shape: Sequence[int], dtype: torch.dtype, density: Callable[[Tensor, Tensor | None], Tensor], targets: Any
    ) -> Tensor:
        like = torch.empty((), dtype=dtype, device=next(iter(leaves(targets))).device)
        y, keep = self._read(like, shape, targets)
        return density(y.to(dtype), keep)

    def _check_values(self, y: Tensor) -> None:
        """Every finite number is allowed."""

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.scale, float) and y.shape == z.shape:
            constant = math.log(self.scale) + 0.5 * LOG_2PI
            return -0.5 * ((y - z) / self.scale).square() - constant
        sigma = self._sigma(z, y)
        return -0.5 * ((self._value(z, y) - z) / sigma).square() - sigma.log() - 0.5 * LOG_2PI

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        return (self._value(z, y) - z) / self._sigma(z, y).square()

    def _root_diagonal(self, z: Tensor) -> Tensor:
        return self._sigma(z).reciprocal().expand_as(z)

    def _diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._sigma(z, y).reciprocal().expand_as(z)

    def _position_drawn_score(self, z: Tensor, y: Tensor, generator: Any) -> Tensor:
        drawn = (super()._drawn().sample(z, generator) - z) / self._sigma(z)  # standard normal
        return drawn / self._sigma(z, y)

    draws_by_row = True

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Source) -> Tensor:
        refuse_nonfinite_parameters("Gaussian", z)
        noise = normal(z.shape, generator, z.dtype)
        return from_positions(z + self._sigma(z) * noise, shape)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        prediction = normal_mixture(z, 2.0 * self._sigma(z).log(), shape, partial(self._density, tuple(shape), z.dtype))
        return replace(prediction, density=partial(self._mixture_density, prediction.density, z, tuple(shape)))

    def _mixture_density(self, own: Callable[[Any], Tensor], z: Tensor, shape: Sequence[int], targets: Any) -> Tensor:
        """At pairs ``(y, scale)`` the mixture with their noise, else that with σ."""
        if not isinstance(targets, (tuple, list)):
            return own(targets)
        y, keep = self._read(z[0], shape, targets)
        noise = 2.0 * self._sigma(z[0], y).log()
        return normal_density(z, noise, self._value(z[0], y), keep)

    def links(self) -> dict[str, Link]:
        """``"exact"`` (``N(f, V + σ²)``, joint over outputs), ``"probit"`` (its marginals) and ``"mc"``."""
        return {"exact": Link(self._exact, False), "probit": Link(self._exact, True), **super().links()}

    def _exact(self, outputs: GaussianOutputs) -> Prediction:
        density = partial(self._density, tuple(outputs.shape), outputs.mean.dtype)
        prediction = normal_outputs(outputs, self._sigma(outputs.mean).square(), density)
        return replace(prediction, density=partial(self._exact_density, prediction.density, outputs))

    def _exact_density(self, own: Callable[[Any], Tensor], outputs: GaussianOutputs, targets: Any) -> Tensor:
        if not isinstance(targets, (tuple, list)):
            return own(targets)
        y, keep = self._read(outputs.mean, outputs.shape, targets)
        noise = self._sigma(outputs.mean, y).square()
        value = self._value(outputs.mean, y)
        if outputs.covariance is None:
            return normal_density(outputs.mean[None], (outputs.variance + noise).log(), value, keep)
        return joint_outputs_density(outputs, noise, value, keep)

    @property
    def noise_scale(self) -> float:
        """σ as a number; of one σ for each output their geometric mean."""
        return (
            math.exp(statistics.fmean(map(math.log, _numbers(self.scale))))
            if self.differs_by_output
            else _as_float(self.scale)
        )

    def with_noise_scale(self, value: float | Tensor) -> Gaussian:
        """A copy with another σ; this object keeps its own. Several σ are multiplied by one factor."""
        other = copy.copy(self)  # in its layout
        if not self.differs_by_output or (isinstance(value, Tensor) and value.ndim):
            other.scale = value
            return other
        scales = torch.as_tensor(self.scale).detach()
        factor = torch.as_tensor(value, dtype=scales.dtype, device=scales.device) / self.noise_scale
        other.scale = scales * factor
        other._moved = scales, factor  # remembered because one factor can be differentiated, several scales cannot
        return other

    def parameters(self) -> dict[str, float]:
        """``{"scale": σ}``; with one for each output ``{"scale[0]": σ_0, ...}``."""
        if not self.differs_by_output:
            return {"scale": _as_float(self.scale)}
        return {f"scale[{k}]": number for k, number in enumerate(_numbers(self.scale))}

    def _settings(self) -> dict[str, Any]:
        scale = _numbers(self.scale) if self.differs_by_output else _as_float(self.scale)
        return {"scale": scale, "ignore_index": self.ignore_index}

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self._settings().items())
        return f"Gaussian({settings})"

    def _counts(self, targets: Any) -> Tensor:
        return super()._counts(targets[0] if isinstance(targets, (tuple, list)) else targets)

    def moments(self, outputs: Tensor, targets: Any) -> Tensor:
        """``(3,)``: squared residuals in units of σ, targets with noise σ, and targets with a noise of their own."""
        z, y, keep, weight = self._unpack(outputs, targets)
        assert y is not None
        own = torch.zeros_like(z) if y.shape[-1] == 2 * z.shape[-1] else torch.ones_like(z)
        squares = ((self._value(z, y) - z) / self._sigma(z)).square() * own
        found = torch.stack([squares, own, 1.0 - own]).detach().double()
        return masked(times(found, weight), keep).flatten(1).sum(1)

    def rescaled(
        self, fitted: Mapping[str, float], log_likelihood: Tensor, terms: float, moments: Tensor
    ) -> tuple[float | Tensor, Tensor]:
        """As the base class: the curvature goes with ``1/σ²``, the likelihood through the squared error it contains."""
        if isinstance(self.scale, float) and fitted == {"scale": self.scale}:
            return 1.0, log_likelihood
        before = torch.tensor(list(fitted.values()), dtype=torch.float64, device=log_likelihood.device)
        now = torch.as_tensor(self.scale, dtype=torch.float64, device=log_likelihood.device)
        if now.numel() != before.numel():
            raise IncompatiblePair(
                f"fit saw {len(fitted)} noise scales and now there are {now.numel()}; call fit again"
            )
        if not now.requires_grad and bool((now.reshape(-1) == before).all()):
            return 1.0, log_likelihood
        if not len(moments):  # all noise was σ
            squares = -2 * (log_likelihood.double() + terms * (before.log().mean() + 0.5 * LOG_2PI))
            moments = torch.stack([squares, squares.new_tensor(terms), squares.new_zeros(())])
        squares, own, others = moments.to(log_likelihood.device).unbind()
        if float(own) == 0.0:
            return 1.0, log_likelihood  # every target brought its own noise
        ratio = now.reshape(-1) / before
        if self._moved is not None:
            scales, factor = (part.to(before) for part in self._moved)
            ratio = scales / before * factor
        spread = float((ratio.detach() / ratio.detach()[0] - 1.0).abs().max())
        single = len(ratio) == 1 or self._moved is not None or not ratio.requires_grad
        if spread > 1e-9 or float(others) > 0.0 or not single:
            reason = "some of its targets brought a noise of their own" if float(others) > 0.0 else (
                "each output's noise scale has its own share of the curvature, and only a common factor can be changed "
                f"or differentiated afterwards (from {before.tolist()} to {now.detach().tolist()})"
            )  # fmt: skip
            raise IncompatiblePair(f"{self!r}: {reason}; set the scale before fit, or call fit again")
        ratio = ratio[0]
        likelihood = log_likelihood + 0.5 * squares * (1.0 - ratio.reciprocal().square()) - own * ratio.log()
        return ratio.reciprocal().square(), likelihood
