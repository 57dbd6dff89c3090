"""Continual learning: tasks one after another, and what keeps a network from forgetting the earlier ones."""

from laplace_kf.continual.base import Learner
from laplace_kf.continual.callback import Callback
from laplace_kf.continual.chained import EWC, NonOnlineLaplace, OnlineLaplace
from laplace_kf.continual.intelligence import SynapticIntelligence
from laplace_kf.continual.metrics import accuracy, average_accuracy, forgetting, forward_transfer
from laplace_kf.continual.reference import FineTuning, JointTraining
from laplace_kf.continual.schedule import EarlyStopping, decayed_rate

__all__ = [
    "EWC",
    "Callback",
    "EarlyStopping",
    "FineTuning",
    "JointTraining",
    "Learner",
    "NonOnlineLaplace",
    "OnlineLaplace",
    "SynapticIntelligence",
    "accuracy",
    "average_accuracy",
    "decayed_rate",
    "forgetting",
    "forward_transfer",
]
