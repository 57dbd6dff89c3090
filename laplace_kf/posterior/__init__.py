"""The Laplace posterior: fit, tune, sample, predict, keep."""

from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.mixture import Mixture
from laplace_kf.posterior.planning import Plan
from laplace_kf.posterior.plans import plan
from laplace_kf.posterior.tuning import TuningResult

__all__ = ["LaplacePosterior", "Mixture", "Plan", "TuningResult", "plan"]
