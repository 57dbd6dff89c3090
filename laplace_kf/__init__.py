"""Bayesian deep learning for PyTorch: a trained network goes in, calibrated uncertainty comes out."""

from laplace_kf import bridges, continual, curvature, errors, likelihoods, optim, reports
from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior import LaplacePosterior, TuningResult
from laplace_kf.subnetwork import Subnetwork
from laplace_kf.support import support_table

__version__ = "0.1.0"

__all__ = [
    "LaplacePosterior",
    "Prediction",
    "Subnetwork",
    "TuningResult",
    "bridges",
    "continual",
    "curvature",
    "errors",
    "likelihoods",
    "optim",
    "reports",
    "support_table",
]
