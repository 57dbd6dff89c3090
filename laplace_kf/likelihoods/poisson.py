"""Counts with a log link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily
from torch.distributions import Poisson as TorchPoisson

from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import LIKELIHOODS
from laplace_kf.likelihoods.elementwise import ElementwiseLikelihood
from laplace_kf.likelihoods.mixed import poisson_entropy
from laplace_kf.likelihoods.normal import GaussianOutputs, Link, with_moments
from laplace_kf.likelihoods.prediction import (
    Prediction,
    by_position,
    gaussian_entropy,
    log_mean_exp,
    mixture_batch,
    uniform_mixture,
)
from laplace_kf.outputs.checks import refuse_nonfinite_parameters, refuse_values
from laplace_kf.outputs.layout import from_positions, masked, scalar_shape

__all__ = ["Poisson"]

#: Rates up to here have their entropy summed over the counts; above, a normal with the same variance is as good (the
#: entropy of a Poisson variable then differs from it by about 1 / (12 rate)).
_ENUMERATED_RATE = 256.0
_CHUNK_ELEMENTS = 1 << 21


def _log_prob(z: Tensor, y: Tensor) -> Tensor:
    return y * z - z.exp() - torch.lgamma(y + 1.0)


def _density(z: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    return log_mean_exp(masked(_log_prob(z, y), keep).sum(-1))


def _distribution(z: Tensor, shape: Sequence[int]) -> Distribution:
    rate = mixture_batch(z.exp(), shape)
    weights = uniform_mixture(scalar_shape(shape), z.shape[0], rate)
    return MixtureSameFamily(weights, Independent(TorchPoisson(rate), 1))


def _entropies(z: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    rate = z.exp()
    small = rate.amax(0) <= _ENUMERATED_RATE
    total = gaussian_entropy(rate.mean(0) + rate.var(0, correction=0))
    conditional = gaussian_entropy(rate).mean(0)
    if bool(small.any()):
        bounded = torch.where(small, z, torch.zeros_like(z))
        largest = float(bounded.detach().exp().max())
        counts = math.ceil(largest + 12.0 * math.sqrt(largest) + 24.0)  # the tail beyond carries less than 1e-20
        chunk = max(1, _CHUNK_ELEMENTS // max(1, z.numel()))
        mixed, single = torch.zeros_like(total), torch.zeros_like(total)
        for start in range(0, counts, chunk):
            k = torch.arange(start, min(start + chunk, counts), dtype=z.dtype, device=z.device)
            log_p = _log_prob(bounded.unsqueeze(1), k.reshape(1, -1, *[1] * (z.ndim - 1)))  # (S, k, N, T, C)
            log_mean = log_mean_exp(log_p)
            mixed = mixed - (log_mean.exp() * log_mean).sum(0)
            single = single - (log_p.exp() * log_p).sum(1).mean(0)
        total, conditional = torch.where(small, mixed, total), torch.where(small, single, conditional)
    return by_position(total.sum(-1), shape), by_position(conditional.sum(-1), shape)


@LIKELIHOODS.register("poisson")
@explained
class Poisson(ElementwiseLikelihood):
    """Counts: every output is the log rate of an independent Poisson variable, ``-log p = eᶻ - y z + log y!``.

    Targets have the shape of the outputs and are non-negative whole numbers (or ``ignore_index``). The output
    curvature is ``diag(eᶻ)`` (methods 3).

    Predictions hold a mixture of Poisson variables: ``mean``, ``variance`` (rate plus ``epistemic_variance``).
    Entropies are sums over the counts where every sampled rate is at most 256 and the entropy of a normal variable
    with the same variance above; an example's entropy adds those of its outputs' marginals.

    Args:
        ignore_index: targets equal to it contribute nothing, one output at a time; None for no such value.
    """

    inverse_links: ClassVar[Mapping[str, tuple[str, str, str]]] = {
        "ExpBackward0": ("exp", "log", "log rates"),
        "SoftplusBackward0": ("softplus", "log", "log rates"),
    }

    def _check_values(self, y: Tensor) -> None:
        bad = (y < 0) | (y != y.floor())
        refuse_values("Poisson", y, bad, f"the counts 0, 1, 2, ... (ignore_index={self.ignore_index})")

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return _log_prob(z, y)

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        return y - z.exp()

    def _root_diagonal(self, z: Tensor) -> Tensor:
        return (0.5 * z).exp()

    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        rate = z.exp()
        refuse_nonfinite_parameters("Poisson", rate)
        return from_positions(torch.poisson(rate, generator=generator), shape)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        rate = z.exp()
        epistemic = rate.var(0, correction=0)
        return Prediction(
            values={
                "mean": from_positions(rate.mean(0), shape),
                "variance": from_positions(rate.mean(0) + epistemic, shape),
                "epistemic_variance": from_positions(epistemic, shape),
            },
            density=partial(self._density, tuple(shape), z.dtype, partial(_density, z)),
            entropies=partial(_entropies, z, tuple(shape)),
            build=partial(_distribution, z, tuple(shape)),
        )

    def mixed_entropy(self, parts: Sequence[Prediction], weights: Tensor) -> Tensor | None:
        """Sums over the counts, as of one prediction; weights ``(M,)``."""
        return poisson_entropy(parts, weights, _ENUMERATED_RATE)

    def links(self) -> dict[str, Link]:
        """``"exact"`` (moments of the log-normal rates; density from draws), the same as ``"probit"``, and ``"mc"``."""
        return {"exact": Link(self._exact, False), "probit": Link(self._exact, True), **super().links()}

    def _exact(self, outputs: GaussianOutputs) -> Prediction:
        """``E[eᶻ] = exp(f + V/2)`` and ``Var[eᶻ] = E[eᶻ]² (eⱽ − 1)``."""
        mean = (outputs.mean + outputs.variance / 2).exp()
        epistemic = mean.square() * outputs.variance.expm1()
        return with_moments(self._predict_draws(outputs), mean, mean + epistemic, epistemic, outputs.shape)
