"""The Laplace posterior: fit, tune, sample, predict, keep."""

from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.mixture import Mixture
from laplace_kf.posterior.tuning import TuningResult

__all__ = ["LaplacePosterior", "Mixture", "TuningResult"]
