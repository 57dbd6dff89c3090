"""Noise scales of a likelihood: parameters of the density that are not outputs of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods.reading import Reading
from laplace_kf.outputs.weighted import WeightedTargets

__all__ = ["Noise", "no_moments"]

Self = TypeVar("Self", bound="Noise")


def no_moments() -> Tensor:
    """Moments of a likelihood without a noise scale, ``(0,)`` float64."""
    return torch.zeros(0, dtype=torch.float64)


class Noise(Reading):
    """The part of a likelihood that knows its noise scale; most have none."""

    def _counts(self, targets: Any) -> Tensor:
        """``(N,)`` float64: how many scalar densities make up ``log_prob`` of an example, ignored ones left out."""
        kept = torch.ones_like(targets, dtype=torch.bool)
        if self.ignore_index is not None:
            kept = targets != self.ignore_index
        if targets.is_floating_point():
            kept = kept & ~torch.isnan(targets)
        return kept.reshape(targets.shape[0], -1).sum(1, dtype=torch.float64)

    def terms(self, targets: Any) -> float:
        """How many scalar densities make up :meth:`log_prob` of these targets (of any shape), ignored ones left out.

        With weights of examples, each example's number times its weight.
        """
        if isinstance(targets, WeightedTargets):
            return float((self._counts(targets.targets) * targets.weights).sum())
        return float(self._counts(targets).sum())

    def moments(self, outputs: Tensor, targets: Any) -> Tensor:
        """What :meth:`rescaled` needs of a minibatch to change the noise scale later; sums over its examples.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            targets: as ``log_prob`` takes them.

        Returns:
            ``(K,)`` float64; empty for a likelihood without a noise scale.
        """
        return no_moments()

    def rescaled(
        self, fitted: Mapping[str, float], log_likelihood: Tensor, terms: float, moments: Tensor
    ) -> tuple[float | Tensor, Tensor]:
        """What a noise parameter that was changed since a fit does to curvature and log likelihood.

        Args:
            fitted: :meth:`parameters` at the time of the fit.
            log_likelihood: sum of ``log p`` at that time, 0-dim.
            terms: sum of :meth:`terms` over the data.
            moments: sum of :meth:`moments` over the data ``(K,)``; empty in files of earlier versions.

        Returns:
            The factor on the curvature (1.0 by default) and the log likelihood now, 0-dim.

        Raises:
            IncompatiblePair: for a change that is no factor on the curvature; the posterior has to be fitted again.
        """
        return 1.0, log_likelihood

    def parameters(self) -> dict[str, float]:
        """Numeric parameters of the density that are not network outputs (a noise scale); empty for most."""
        return {}

    @property
    def noise_scale(self) -> float | None:
        """Standard deviation of noise that is the same for all examples and can be tuned; None where there is none."""
        return None

    def with_noise_scale(self: Self, value: float | Tensor) -> Self:
        """A copy with another noise scale (> 0, a number or 0-dim, in the units of the outputs).

        Raises:
            IncompatiblePair: for a likelihood without one.
        """
        raise IncompatiblePair(f"{self!r} has no noise scale to tune; leave noise out, or use the Gaussian likelihood")
