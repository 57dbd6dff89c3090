"""Predictive distributions from a posterior over weights."""

from laplace_kf.predictive.linearized import Linearization
from laplace_kf.predictive.methods import METHODS, Request
from laplace_kf.predictive.montecarlo import draw_seeds, outputs_at, sampled_outputs, shifted, weight_noise

__all__ = [
    "METHODS",
    "Linearization",
    "Request",
    "draw_seeds",
    "outputs_at",
    "sampled_outputs",
    "shifted",
    "weight_noise",
]
