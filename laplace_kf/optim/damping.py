"""Damping as values: the Levenberg–Marquardt rule for τ, the greedy search for ζ, and their start values.

τ damps the exact curvature and sets the step length; ζ damps the approximate curvature and sets the direction
(methods 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.likelihoods import Likelihood
from laplace_kf.registry import Registry

__all__ = ["SCALINGS", "GreedySearch", "LevenbergMarquardt", "StartSearch", "ratio", "start_value"]

MANY_OUTPUTS = 100  # densities per example from which a loss counts as summed over many outputs


def start_value(likelihood: Likelihood, targets: Tensor, count: int) -> float:
    """Default of τ and ζ: 150 for losses summed over many outputs, 1 otherwise (methods 6.1, 15).

    Args:
        likelihood: counts the densities.
        targets: of one minibatch, as the likelihood takes them (any shape).
        count: number of examples in it.
    """
    return 150.0 if likelihood.terms(targets) >= MANY_OUTPUTS * count else 1.0


def ratio(before: float, after: float, predicted: float, dtype: torch.dtype) -> float | None:
    """``ρ``, the actual over the predicted change of the objective (methods 6.1).

    ``None`` if the prediction is below the rounding of an objective that was computed in ``dtype``; −∞ for a
    non-finite objective.
    """
    if not math.isfinite(after):
        return -math.inf
    if not predicted < -torch.finfo(dtype).eps * abs(before):
        return None
    return (after - before) / predicted


@dataclass(frozen=True)
class LevenbergMarquardt:
    """``ρ > high``: τ · factor; ``ρ < low``: τ / factor; between them nothing (methods 6.1, 6.2, 13).

    With ``low = high`` (Botev) τ moves at every adaptation, with ¾ and ¼ (Martens) there is a dead zone.

    Attributes:
        every: adapts at steps that are multiples of this.
        factor: below 1.
        low: threshold for more damping.
        high: threshold for less.
    """

    every: int = 5
    factor: float = 0.95**5
    low: float = 0.75
    high: float = 0.75

    def due(self, step: int) -> bool:
        """Whether step number ``step`` (1, 2, ...) adapts."""
        return step % self.every == 0

    def adapted(self, tau: float, rho: float | None) -> float:
        """τ after seeing ``ρ`` (``None``: unchanged)."""
        if rho is None or rho == self.high == self.low:
            return tau
        if rho > self.high:
            return tau * self.factor
        return tau / self.factor if rho < self.low else tau


Scaling = Callable[[float, float, float], float]
SCALINGS: Registry[Scaling] = Registry("scale of the approximate damping")


@SCALINGS.register("zeta")
def _zeta(zeta: float, l2: float, factor: float) -> float:
    """ζ itself is scaled (Botev)."""
    return zeta * factor


@SCALINGS.register("gamma")
def _gamma(zeta: float, l2: float, factor: float) -> float:
    """γ² = ζ + η is scaled (Martens: γ by the root of the factor)."""
    return (zeta + l2) * factor - l2


@dataclass(frozen=True)
class GreedySearch:
    """Every so often ζ, ζ·factor and ζ/factor are tried and the best kept (methods 6.1, 6.2).

    Attributes:
        every: searches at steps that are multiples of this.
        factor: on the damping; γ moves by its root.
        scaling: name in :data:`SCALINGS`, what is scaled.
    """

    every: int = 20
    factor: float = 0.95**20
    scaling: str = "zeta"

    def candidates(self, step: int, zeta: float, l2: float) -> list[float]:
        """The values to try at step number ``step``; the current one first, so that it wins ties."""
        if step % self.every:
            return [zeta]
        scale = SCALINGS[self.scaling]
        return [zeta, scale(zeta, l2, self.factor), scale(zeta, l2, 1 / self.factor)]


@dataclass(frozen=True)
class StartSearch:
    """Start values of τ and ζ by what they do: one update with every pair of a wide ladder is tried.

    Far above all curvature every ζ gives the gradient's direction, and the greedy search, which looks at neighbours
    only, learns nothing there and drifts; it can raise a ζ that is too small. So of the values that do about as well
    the smallest ζ is taken, and for it the largest τ that costs nothing.

    Attributes:
        values: on the ladder, from the default start value downwards.
        factor: between neighbours.
        enough: share of the largest decrease of the loss that a ζ has to reach with its best τ.
        harmless: share of the largest decrease with that ζ that a τ has to reach.
    """

    values: int = 6
    factor: float = 30.0
    enough: float = 0.9
    harmless: float = 0.99

    def ladder(self, start: float) -> list[float]:
        """The values to try, largest first."""
        return [start * self.factor**-k for k in range(self.values)]

    def chosen(self, decrease: Mapping[tuple[float, float], float]) -> tuple[float, float] | None:
        """A pair ``(τ, ζ)`` from the decrease of the loss by pair; ``None`` if no update made it smaller."""
        useful = {pair: value for pair, value in decrease.items() if math.isfinite(value) and value > 0}
        if not useful:
            return None
        zeta = min(pair[1] for pair, value in useful.items() if value >= self.enough * max(useful.values()))
        here = {tau: value for (tau, other), value in useful.items() if other == zeta}
        return max(tau for tau, value in here.items() if value >= self.harmless * max(here.values())), zeta
