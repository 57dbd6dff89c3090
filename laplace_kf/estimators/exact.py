"""Exact (KFLR): every column of the output curvature's root (methods 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@dataclass(frozen=True)
class _OutputCurvature:
    """A likelihood's curvature at the outputs ``(N, ...)`` of one minibatch."""

    likelihood: Likelihood
    outputs: Tensor
    targets: Any

    def total(self) -> Tensor:
        return self.likelihood.summed_curvature(self.outputs, self.targets)

    def diagonal(self) -> Tensor:
        return self.likelihood.curvature_diagonal(self.outputs, self.targets)

    def rows(self, output: int) -> Tensor:
        return self.likelihood.curvature_rows(output, self.outputs, self.targets)


@ESTIMATORS.register("exact")
class Exact(Estimator):
    """Back-propagates ``Σ_v r_v r_vᵀ = H_L`` exactly: C−1 columns for a softmax, T times as many for sequences.

    A layer whose output is the network's output needs no columns: its sums are closed forms of the output curvature.
    """

    name = "exact"

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        outputs = widened(observation.outputs)
        closed: set[str] = set()
        if sink.takes_output_signals():
            curvature = _OutputCurvature(likelihood, outputs, observation.targets)
            found = observation.output_signals(likelihood.to_positions, curvature)
            if found:
                sink.add_columns(found)
            closed = set(found)
        if observation.block_names() <= closed:
            return
        root = likelihood.root(outputs, observation.targets)
        places = root.places()  # columns of targets that are ignored are not sent back
        total = root.count * places.shape[1]
        sink.expect_columns(total, observation)
        step = sink.columns_at_once(observation)
        for start in range(0, total, step):
            chunk = likelihood.from_positions(root.columns(start, start + step, places), outputs)
            signals = observation.signals(chunk)
            sink.add_columns({name: signal for name, signal in signals.items() if name not in closed})
