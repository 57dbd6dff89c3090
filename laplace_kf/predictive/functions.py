"""Draws of functions from a linearised network: ``f(x) + J(x) ε`` with one ``ε ~ N(0, Λ⁻¹)`` for all inputs.

So a sample is correlated over inputs and outputs as the posterior says, and no covariance of inputs is ever made: a
draw is one Jacobian-vector product, of the part of the network that depends on the weights (forward mode; where an
operation has none, two backward passes). Where neither can be had, draws come from the joint covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from laplace_kf.batches import run
from laplace_kf.errors import LaplaceKFError
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise, standard_normal
from laplace_kf.outputs.derivatives import one_jacobian, pushed_twice
from laplace_kf.outputs.spread import covariance_root
from laplace_kf.predictive.calls import over_draws
from laplace_kf.predictive.draws import draw_seeds
from laplace_kf.predictive.linearized import Linearization, Stand
from laplace_kf.sequences import read

__all__ = ["function_draws"]

MEMORY_BYTES = 128 * 2**20  # weights of the draws that are made at once

Weights = dict[str, Tensor]


def function_draws(
    network: Linearization, precision: Blockwise, samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Outputs ``(S, N, ...)`` of S functions at the network's inputs.

    Args:
        network: linearised at the mean.
        precision: Λ over the mean's parameters.
        samples: S.
        generator: random numbers; a fresh private one by default.

    Raises:
        NotPositiveDefinite: if the precision is singular.
        IncompatiblePair: where only the joint covariance is left and it would be larger than 4 GiB.
    """
    seeds = draw_seeds(samples, generator)
    mean = {name: value.detach() for name, value in network.forward.weights.items()}
    each = sum(value.numel() * value.element_size() for value in mean.values())
    size = max(1, min(samples, MEMORY_BYTES // max(1, 3 * each)))
    for rule in (_forward_mode, _two_backward):
        try:
            with preserved(network.model), torch.no_grad():
                parts = []
                for start in range(0, samples, size):
                    drawn = precision.draws(seeds[start : start + size])
                    stacked = {n: drawn[n].to(value) for n, value in mean.items()}
                    parts.append(over_draws(network.model, rule(network, mean), stacked, rule.__name__))
                    first = {name: value[0] for name, value in stacked.items()}
                    if start == 0 and rule is _forward_mode and not _agrees(network, mean, first, parts[0][0]):
                        break
                else:
                    return network.outputs + torch.cat(parts)
        except LaplaceKFError:
            raise
        except (RuntimeError, NotImplementedError):  # an operation has no such derivative
            continue
    return _from_covariance(network, precision, samples, seeds[0])


def _at(network: Linearization, weights: Mapping[str, Tensor]) -> Tensor:
    """Outputs ``(N, ...)`` at other weights."""
    return run(network.model, network.x, Stand(network.model, network.forward.forward, weights))[0]


def _forward_mode(network: Linearization, mean: Weights) -> Callable[[Weights], Tensor]:
    def product(noise: Weights) -> Tensor:
        found: Tensor = torch.func.jvp(lambda weights: _at(network, weights), (mean,), (noise,))[1]
        return found

    return product


def _agrees(network: Linearization, mean: Weights, noise: Weights, pushed: Tensor) -> bool:
    """Whether ``J ε (N, ...)`` by forward mode is the product that a backward pass says it is."""
    if network.forward.plain and read(network.model) is not None:
        return True  # nothing in a list of torch's own modules could hide a derivative
    with torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in mean.items()}
        outputs = _at(network, leaves)
    return one_jacobian([outputs], list(leaves.values()), [pushed], list(noise.values())) is not False


def _two_backward(network: Linearization, mean: Weights) -> Callable[[Weights], Tensor]:
    """``J ε`` is the derivative of ``(Jᵀ u) · ε`` with respect to ``u``."""

    def product(noise: Weights) -> Tensor:
        with torch.enable_grad():
            leaves = {name: value.clone().requires_grad_() for name, value in mean.items()}
            outputs = _at(network, leaves)
            ((found,),) = pushed_twice([outputs], list(leaves.values()), [[noise[name] for name in leaves]])
            return found

    return product


def _from_covariance(network: Linearization, precision: Blockwise, samples: int, seed: int) -> Tensor:
    root = covariance_root(network.covariance(precision, joint=True))
    noise = standard_normal((samples, len(root)), root, torch.Generator().manual_seed(seed))
    return network.outputs + (noise @ root.T).to(network.outputs).reshape(samples, *network.outputs.shape)
