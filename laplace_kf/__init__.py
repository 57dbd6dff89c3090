"""Bayesian deep learning for PyTorch: a trained network goes in, calibrated uncertainty comes out."""

from laplace_kf import attribution, bridges, continual, curvature, errors, graphs, likelihoods, optim, reports
from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior import LaplacePosterior, TuningResult
from laplace_kf.subnetwork import Subnetwork
from laplace_kf.support import support_table
from laplace_kf.version import __version__

__all__ = [
    "LaplacePosterior",
    "Prediction",
    "Subnetwork",
    "TuningResult",
    "__version__",
    "attribution",
    "bridges",
    "continual",
    "curvature",
    "errors",
    "graphs",
    "likelihoods",
    "optim",
    "reports",
    "support_table",
]
