"""Recursive (KFRA): the averaged output curvature itself is passed back, layer by layer (methods 4.2)."""

from __future__ import annotations

import torch

from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("recursive")
class Recursive(Estimator):
    """``Ĝ_l = (W̄ᵀ Ĝ_{l+1} W̄) ∘ (Φ Φᵀ / N)`` on each minibatch; exact for N = 1, linear networks and the last layer.

    Needs a chain of linear maps and elementwise activations on rows, and a Kronecker structure.
    """

    name = "recursive"
    averages = True

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        chain = observation.chain or observation.require_chain()
        factor = likelihood.summed_curvature(widened(observation.outputs), observation.targets) / observation.count
        remaining = sum(link.call is not None for link in chain.links)
        for link in reversed(chain.links):
            if link.weight is not None:
                if link.call is not None:
                    remaining -= 1
                    for block in observation.blocks_of(link.call):
                        sink.add_output_factor(block.name, factor * observation.count)
                if remaining == 0:
                    break
                weight = link.weight.to(factor.dtype)
                factor = weight.T @ factor @ weight
            else:
                assert link.slope is not None
                slope = link.slope.whole().to(factor.dtype)
                factor = factor * (slope.T @ slope / observation.count)
