"""Factor estimators: auto, exact, sampled, projection, importance, recursive, empirical. One file each."""

from laplace_kf.estimators import auto, empirical, exact, importance, projection, recursive, sampled
from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, Estimator, Sink

__all__ = [
    "ESTIMATORS",
    "ColumnEstimator",
    "Estimator",
    "Sink",
    "auto",
    "empirical",
    "exact",
    "importance",
    "projection",
    "recursive",
    "sampled",
]
