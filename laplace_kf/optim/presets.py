"""Named optimisers: rows of one table of settings (methods 6.1, 6.2, 13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from laplace_kf.estimators import ESTIMATORS
from laplace_kf.likelihoods import Likelihood
from laplace_kf.optim.arguments import check_arguments
from laplace_kf.optim.cg import Progress
from laplace_kf.optim.damping import GreedySearch, LevenbergMarquardt
from laplace_kf.optim.gauss_newton import CONCERNS, GaussNewton
from laplace_kf.optim.newton_cg import CONCERNS as HESSIAN_FREE
from laplace_kf.optim.newton_cg import HessianFree
from laplace_kf.optim.recipes import Recipe, last
from laplace_kf.optim.settings import Curvature, DiagonalPreset, GaussNewtonPreset, HessianFreeSettings, shows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["diagonal", "ekfac", "kfac", "kflr", "kfra", "natural_gradient"]

F = TypeVar("F", bound=Callable[..., Any])

MARTENS: dict[str, Any] = {
    "momentum": True,
    "l2": 1e-5,
    "ema": 0.95,
    "refresh": 20,
    "curvature_fraction": (1 / 8, 1 / 4),
    "tau_rule": LevenbergMarquardt(low=0.25, high=0.75),
    "zeta_rule": GreedySearch(scaling="gamma"),
}


KFAC: dict[str, Any] = {"estimator": "sampled", "low_rank": None, **MARTENS}
KFLR: dict[str, Any] = {"estimator": "exact", "l2": 1e-5}
KFRA: dict[str, Any] = {"estimator": "recursive", "l2": 1e-5}
EKFAC: dict[str, Any] = {**MARTENS, "estimator": "sampled", "structure": "ekfac", "damping": "exact"}
DIAGONAL: dict[str, Any] = {"estimator": "sampled", "structure": "diag", "damping": "exact", "ema": 0.95}
NATURAL: dict[str, Any] = {"momentum": False, "preconditioner": "none"}


def _shows(row: dict[str, Any]) -> Callable[[F], F]:
    """The arguments of :class:`GaussNewton` with a preset's defaults; ``samples`` where its estimator draws."""
    estimator = row["estimator"] if ESTIMATORS[row["estimator"]].draws else None
    return shows(Curvature, *CONCERNS, drawn_by=estimator, **row)


@_shows(KFAC)
def kfac(model: nn.Module, likelihood: str | Likelihood, **settings: Unpack[GaussNewtonPreset]) -> GaussNewton:
    """K-FAC of Martens (methods 6.2): sampled targets, optimal momentum, inverses every 20 steps, sub-sampling.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
    """
    return GaussNewton(model, likelihood, **{**KFAC, **settings})


@_shows(KFLR)
def kflr(model: nn.Module, likelihood: str | Likelihood, **settings: Unpack[GaussNewtonPreset]) -> GaussNewton:
    """KFLR steps of Botev (methods 6.1): exact factors.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
    """
    return GaussNewton(model, likelihood, **{**KFLR, **settings})


@_shows(KFRA)
def kfra(model: nn.Module, likelihood: str | Likelihood, **settings: Unpack[GaussNewtonPreset]) -> GaussNewton:
    """KFRA steps of Botev (methods 6.1): recursive factors (chains only).

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
    """
    return GaussNewton(model, likelihood, **{**KFRA, **settings})


@_shows(EKFAC)
def ekfac(model: nn.Module, likelihood: str | Likelihood, **settings: Unpack[GaussNewtonPreset]) -> GaussNewton:
    """K-FAC with exact second moments along the Kronecker eigenbases.

    The second moments are measured at every step, the bases that they are measured along follow the running factors
    every ``refresh`` steps (George et al. 2018, EKFAC-ra).

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
    """
    return GaussNewton(model, likelihood, **{**EKFAC, **settings})


@_shows(DIAGONAL)
def diagonal(
    model: nn.Module,
    likelihood: str | Likelihood,
    power: float = 0.75,
    **settings: Unpack[DiagonalPreset],
) -> GaussNewton:
    """Steps along ``(diag C̄ + ζ)^-power ∇`` (methods 8.2): 1 LeCun, ½ AdaGrad and Adam, ¾ the HF preconditioner.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
        power: ξ.
    """
    return GaussNewton(model, likelihood, **{**DIAGONAL, "power": power, **settings})


@shows(
    *HESSIAN_FREE,
    options="of a preconditioner's structure and estimator.",
    without=("recipe", "termination"),
    **NATURAL,
)
def natural_gradient(
    model: nn.Module,
    likelihood: str | Likelihood,
    steps: int = 50,
    tolerance: float = 1e-4,
    **settings: Unpack[HessianFreeSettings],
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
    """
    check_arguments({"steps": steps, "tolerance": tolerance})
    row = {**NATURAL, "recipe": Recipe(limit=steps, choose=last), "termination": Progress(tolerance)}
    return HessianFree(model, likelihood, **{**row, **settings})
