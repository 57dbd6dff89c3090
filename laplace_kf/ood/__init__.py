"""How strange an input is to a fitted posterior: scores, and references that make them comparable."""

from laplace_kf.ood.leverage import Leverage
from laplace_kf.ood.references import References, combined
from laplace_kf.ood.scores import BY_LAYERS, KINDS, Subject, score

__all__ = ["BY_LAYERS", "KINDS", "Leverage", "References", "Subject", "combined", "score"]
