"""Named optimisers: rows of one table of settings (methods 6.1, 6.2, 13)."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_kf.likelihoods import Likelihood
from laplace_kf.optim.arguments import check_arguments
from laplace_kf.optim.cg import Progress
from laplace_kf.optim.damping import GreedySearch, LevenbergMarquardt
from laplace_kf.optim.gauss_newton import GaussNewton
from laplace_kf.optim.newton_cg import HessianFree
from laplace_kf.optim.recipes import Recipe, last

__all__ = ["diagonal", "ekfac", "kfac", "kflr", "kfra", "natural_gradient"]

MARTENS: dict[str, Any] = {
    "momentum": True,
    "l2": 1e-5,
    "ema": 0.95,
    "refresh": 20,
    "curvature_fraction": (1 / 8, 1 / 4),
    "tau_rule": LevenbergMarquardt(low=0.25, high=0.75),
    "zeta_rule": GreedySearch(scaling="gamma"),
}


def kfac(model: nn.Module, likelihood: str | Likelihood, **settings: Any) -> GaussNewton:
    """K-FAC of Martens (methods 6.2): sampled targets, optimal momentum, inverses every 20 steps, sub-sampling.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
        **settings: any argument of :class:`GaussNewton`, in place of the preset's.
    """
    return GaussNewton(model, likelihood, **{"estimator": "sampled", **MARTENS, **settings})


def kflr(model: nn.Module, likelihood: str | Likelihood, **settings: Any) -> GaussNewton:
    """KFLR steps of Botev (methods 6.1): exact factors; arguments as :func:`kfac`."""
    return GaussNewton(model, likelihood, **{"estimator": "exact", "l2": 1e-5, **settings})


def kfra(model: nn.Module, likelihood: str | Likelihood, **settings: Any) -> GaussNewton:
    """KFRA steps of Botev (methods 6.1): recursive factors (chains only); arguments as :func:`kfac`."""
    return GaussNewton(model, likelihood, **{"estimator": "recursive", "l2": 1e-5, **settings})


def ekfac(model: nn.Module, likelihood: str | Likelihood, **settings: Any) -> GaussNewton:
    """K-FAC with exact second moments along the Kronecker eigenbases; arguments as :func:`kfac`.

    The second moments are measured at every step, the bases that they are measured along follow the running factors
    every ``refresh`` steps (George et al. 2018, EKFAC-ra).
    """
    row = {"estimator": "sampled", "structure": "ekfac", "damping": "exact"}
    return GaussNewton(model, likelihood, **{**MARTENS, **row, **settings})


def diagonal(model: nn.Module, likelihood: str | Likelihood, power: float = 0.75, **settings: Any) -> GaussNewton:
    """Steps along ``(diag C̄ + ζ)^-power ∇`` (methods 8.2): 1 LeCun, ½ AdaGrad and Adam, ¾ the HF preconditioner.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
        power: ξ.
        **settings: any other argument of :class:`GaussNewton`; ``estimator="sampled"`` by default.
    """
    row = {"estimator": "sampled", "structure": "diag", "damping": "exact", "power": power, "ema": 0.95}
    return GaussNewton(model, likelihood, **{**row, **settings})


def natural_gradient(
    model: nn.Module, likelihood: str | Likelihood, steps: int = 50, tolerance: float = 1e-4, **settings: Any
) -> HessianFree:
    """Damped natural gradient: ``(F + (λ + η) I)⁻¹ ∇`` by conjugate gradients on Fisher products (methods 8.3).

    For likelihoods whose Gauss-Newton matrix is the Fisher this is its matrix, exact and never formed. Every system is
    solved from zero without looking at the objective, so that with enough steps the direction is the natural gradient;
    λ follows the Levenberg–Marquardt rule.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
        steps: CG steps at most.
        tolerance: of CG, by relative progress (methods 7.3); 0 makes all steps.
        **settings: any other argument of :class:`HessianFree`, such as ``preconditioner="kronecker"``.
    """
    check_arguments({"steps": steps, "tolerance": tolerance})
    row: dict[str, Any] = {
        "recipe": Recipe(limit=steps, choose=last),
        "termination": Progress(tolerance),
        "momentum": False,
        "preconditioner": "none",
    }
    return HessianFree(model, likelihood, **{**row, **settings})
