"""Exact (KFLR): every column of the output curvature's root (methods 4.2)."""

from __future__ import annotations

import torch

from laplace_kf.columns import OutputCurvature, at_closed_forms, send_all
from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("exact")
class Exact(Estimator):
    """Back-propagates ``Σ_v r_v r_vᵀ = H_L`` exactly: C−1 columns for a softmax, T times as many for sequences.

    A layer whose output is the network's output needs no columns: its sums are closed forms of the output curvature.
    """

    name = "exact"

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        outputs = widened(observation.outputs)
        closed = at_closed_forms(observation, OutputCurvature(likelihood, outputs, observation.targets), sink)
        if observation.block_names() <= closed:
            return
        send_all(observation, likelihood, outputs, likelihood.root(outputs, observation.targets), sink, closed)
