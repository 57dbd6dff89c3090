"""An estimator: the root of the output curvature written out, all its columns at once."""

from __future__ import annotations

import torch

from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("written_out")
class WrittenOut(Estimator):
    """Exact, for networks with few outputs."""

    name = "written_out"

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        columns = likelihood.hessian_root(widened(observation.outputs), observation.targets)  # (V, N, ...)
        sink.add_columns(observation.signals(columns))
