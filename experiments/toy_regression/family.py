"""All of a Gaussian family: what the best of its settings could do, and the best that validation data do not rule out.

Tuning sees validation points alone, which lie where the training data do. How well any ``(N, λ)`` does further out is a
bound on every way of tuning; and where the best of those settings that the validation points cannot tell from the tuned
one still misses a level, no tuning on these points reaches it but by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.optimize import minimize
from torch import Tensor

from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior import LaplacePosterior

__all__ = ["ALLOWED", "Family", "Setting", "allowed", "behind", "best", "chosen", "reaching"]

ALLOWED = 2.0
"""Standard errors of the paired difference in validation log-likelihood within which a setting is not ruled out."""


@dataclass(frozen=True)
class Setting:
    """One member of the family.

    Args:
        n_data, prior_precision: N and λ.
        val: negative log-likelihoods ``(V,)`` of the validation points.
        grid: their mean on the grid.
    """

    n_data: float
    prior_precision: float
    val: Tensor
    grid: float


class Family:
    """A posterior under every N and λ, and what it loses there; it is left with its own N and λ.

    Args:
        posterior: fitted.
        predict: its prediction at the inputs, with the same draws every time.
        targets: ``(V + G, C)``, validation points first.
        cut: V.
    """

    def __init__(
        self, posterior: LaplacePosterior, predict: Callable[[], Prediction], targets: Tensor, cut: int
    ) -> None:
        self.posterior, self.predict, self.targets, self.cut = posterior, predict, targets, cut

    @contextmanager
    def using(self, n_data: float, prior_precision: float) -> Iterator[None]:
        """The posterior with these settings, for the length of the block."""
        before = self.posterior.n_data, self.posterior.prior_precision
        try:
            self.posterior.n_data, self.posterior.prior_precision = n_data, prior_precision
            yield
        finally:
            self.posterior.n_data, self.posterior.prior_precision = before

    def at(self, n_data: float, prior_precision: float) -> Setting:
        """One member."""
        with self.using(n_data, prior_precision):
            lost = -self.predict().log_prob(self.targets).detach()
        return Setting(n_data, prior_precision, lost[: self.cut], float(lost[self.cut :].mean()))

    def scan(self, n_data: Sequence[float], prior_precisions: Sequence[float]) -> list[Setting]:
        """Every pair of the two grids."""
        return [self.at(n, prior) for n in n_data for prior in prior_precisions]

    def refined(self, start: Setting, objective: Callable[[Setting], float], evaluations: int) -> Setting:
        """The best setting on a simplex search over ``ln N`` and ``ln λ`` from one, never worse than that one."""
        seen = [start]

        def value(point: Sequence[float]) -> float:
            seen.append(self.at(math.exp(point[0]), math.exp(point[1])))
            return objective(seen[-1])

        first = (math.log(start.n_data), math.log(start.prior_precision))
        steps = [first, (first[0] + 0.5, first[1]), (first[0], first[1] + 0.5)]
        minimize(value, first, method="Nelder-Mead", options={"maxfev": evaluations, "initial_simplex": steps})
        return min(seen, key=objective)


def best(found: Sequence[Setting]) -> Setting:
    """The one with the lowest loss on the grid."""
    return min(found, key=lambda one: one.grid)


def allowed(found: Sequence[Setting]) -> list[Setting]:
    """Those that validation does not rule out against its own best one; that one included."""
    first = chosen(found)

    def within(one: Setting) -> bool:
        difference, error = behind(one, first)
        return difference <= ALLOWED * error

    return [one for one in found if one is first or within(one)]


def chosen(found: Sequence[Setting]) -> Setting:
    """The one with the lowest loss on the validation points."""
    return min(found, key=lambda one: float(one.val.mean()))


def behind(one: Setting, other: Setting) -> tuple[float, float]:
    """By how much ``one`` loses more than ``other`` a validation point, and the standard error of that."""
    difference = one.val - other.val
    return float(difference.mean()), float(torch.nan_to_num(difference.std() / len(difference) ** 0.5))


def reaching(level: float) -> Callable[[Setting], float]:
    """Objective: the loss on the validation points, among settings whose loss on the grid is at most ``level``.

    Of those above it, the one nearest to it is the best.
    """

    def value(one: Setting) -> float:
        return float(one.val.mean()) if one.grid <= level else 1e6 + one.grid

    return value
