"""Predictive distributions from a posterior over weights."""

from laplace_kf.predictive.asked import asked, labelled
from laplace_kf.predictive.calls import outputs_at, over_draws
from laplace_kf.predictive.draws import DRAWS, draw_seeds
from laplace_kf.predictive.dropout import MCDropout, mc_dropout
from laplace_kf.predictive.linearized import Linearization
from laplace_kf.predictive.methods import PREDICTION_METHODS, Request
from laplace_kf.predictive.montecarlo import SPACES, Predictor, monte_carlo, sampled_outputs, shifted, weight_noise
from laplace_kf.predictive.weights import at_once

__all__ = [
    "DRAWS",
    "PREDICTION_METHODS",
    "SPACES",
    "Linearization",
    "MCDropout",
    "Predictor",
    "Request",
    "asked",
    "at_once",
    "draw_seeds",
    "labelled",
    "mc_dropout",
    "monte_carlo",
    "outputs_at",
    "over_draws",
    "sampled_outputs",
    "shifted",
    "weight_noise",
]
