"""All of a Gaussian family: what the best of its settings could do, and the best that validation data do not rule out.

Tuning sees validation points alone, which lie where the training data do. How well any ``(N, λ)`` does further out is a
bound on every way of tuning; and where the best of those settings that the validation points cannot tell from the tuned
one still misses a level, no tuning on these points reaches it but by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior import LaplacePosterior

__all__ = ["ALLOWED", "Setting", "allowed", "best", "settings"]

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


def settings(
    posterior: LaplacePosterior, n_data: Sequence[float], prior_precisions: Sequence[float],
    predict: Callable[[], Prediction], targets: Tensor, cut: int,
) -> list[Setting]:  # fmt: skip
    """Every pair of the two grids; the posterior is left with its own N and λ.

    Args:
        posterior: fitted.
        n_data, prior_precisions: the grids.
        predict: its prediction at the inputs, with the same draws every time.
        targets: ``(V + G, C)``, validation points first.
        cut: V.
    """
    before = posterior.n_data, posterior.prior_precision
    found = []
    try:
        for n in n_data:
            for prior in prior_precisions:
                posterior.n_data, posterior.prior_precision = n, prior
                lost = -predict().log_prob(targets).detach()
                found.append(Setting(n, prior, lost[:cut], float(lost[cut:].mean())))
    finally:
        posterior.n_data, posterior.prior_precision = before
    return found


def best(found: Sequence[Setting]) -> Setting:
    """The one with the lowest loss on the grid."""
    return min(found, key=lambda one: one.grid)


def allowed(found: Sequence[Setting]) -> list[Setting]:
    """Those that validation does not rule out against its own best one; that one included."""
    chosen = min(found, key=lambda one: float(one.val.mean()))

    def excess(one: Setting) -> bool:
        difference = one.val - chosen.val
        error = difference.std() / len(difference) ** 0.5
        return bool(difference.mean() <= ALLOWED * torch.nan_to_num(error))

    return [one for one in found if one is chosen or excess(one)]
