"""Bayesian deep learning for PyTorch: a trained network goes in, calibrated uncertainty comes out."""

import logging
import sys
from typing import NoReturn

from laplace_kf import (
    acquisition,
    attacks,
    attribution,
    bridges,
    continual,
    curvature,
    diagnostics,
    errors,
    graphs,
    likelihoods,
    optim,
    pruning,
    reports,
)
from laplace_kf.evidence_training import EvidenceTraining, evidence_training
from laplace_kf.likelihoods import Prediction
from laplace_kf.outputs.top import TopClasses
from laplace_kf.posterior import LaplacePosterior, Mixture, Plan, TuningResult, plan
from laplace_kf.subnetwork import Subnetwork
from laplace_kf.support import support_table
from laplace_kf.version import __version__

# What fits, searches and files report goes nowhere unless the program asks for it: logging.basicConfig(level="INFO").
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "EvidenceTraining",
    "LaplacePosterior",
    "Mixture",
    "Plan",
    "Prediction",
    "Subnetwork",
    "TopClasses",
    "TuningResult",
    "__version__",
    "acquisition",
    "attacks",
    "attribution",
    "bridges",
    "continual",
    "curvature",
    "diagnostics",
    "errors",
    "evidence_training",
    "graphs",
    "likelihoods",
    "optim",
    "plan",
    "pruning",
    "reports",
    "support_table",
]


def __getattr__(name: str) -> NoReturn:
    """What other libraries have under this name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise errors.UnknownAttribute(sys.modules[__name__], name, "package")
