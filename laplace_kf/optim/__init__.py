"""Second-order optimisers on the posterior's engine: tape → estimators → structures → statistics → a step."""

from laplace_kf.optim.damping import GreedySearch, LevenbergMarquardt
from laplace_kf.optim.gauss_newton import GaussNewton
from laplace_kf.optim.initial import glorot_init_, sparse_init_
from laplace_kf.optim.newton_cg import HessianFree, hessian_free
from laplace_kf.optim.preconditioner import Preconditioner
from laplace_kf.optim.presets import diagonal, ekfac, kfac, kflr, kfra, natural_gradient
from laplace_kf.optim.recipes import Recipe
from laplace_kf.optim.reviewed import SGDQN, AdaptiveRates, MatrixMomentum, StochasticMetaDescent
from laplace_kf.optim.schedules import PUBLISHED_RATES, PUBLISHED_SHARES, batch_size, halving, nesterov_momentum

__all__ = [
    "PUBLISHED_RATES",
    "PUBLISHED_SHARES",
    "SGDQN",
    "AdaptiveRates",
    "GaussNewton",
    "GreedySearch",
    "HessianFree",
    "LevenbergMarquardt",
    "MatrixMomentum",
    "Preconditioner",
    "Recipe",
    "StochasticMetaDescent",
    "batch_size",
    "diagonal",
    "ekfac",
    "glorot_init_",
    "halving",
    "hessian_free",
    "kfac",
    "kflr",
    "kfra",
    "natural_gradient",
    "nesterov_momentum",
    "sparse_init_",
]
