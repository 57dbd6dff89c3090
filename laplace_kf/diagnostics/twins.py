"""The same network in other coordinates: whether undamped Kronecker-factored steps see them (methods 5.8)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.batches import as_batches
from laplace_kf.diagnostics.base import repeatable
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnsupportedLayer
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting, preserved, usable
from laplace_kf.operators import fresh_generator
from laplace_kf.optim import GaussNewton
from laplace_kf.registry import Registry

__all__ = ["COORDINATES", "Invariance", "Twin", "invariance"]


@dataclass(frozen=True)
class Invariance:
    """What :func:`invariance` found.

    Attributes:
        deviation: largest absolute difference of outputs between the network and its twin, over all steps and inputs.
        by_step: the same after 0, 1, ... steps, ``(K + 1,)`` for K steps.
        losses: the network's objective before every step, ``(K,)``.
    """

    deviation: float
    by_step: Tensor
    losses: Tensor


class Twin(nn.Module):
    """A network with activities and pre-activations in other coordinates, and the same outputs (methods 5.8).

    ``h† = W† â†``, ``â† = Ω [φ(Φ h†); 1]`` and ``W = Φ W† Ω`` layer by layer; only the ``W†`` are parameters.

    Args:
        layers: linear layers.
        between: functions of activities ``(N, ...)`` before every layer, and after the last.
        outer: Φ of every layer, ``(O, O)``.
        inner: Ω of every layer's inputs, ``(I, I)`` with the 1 of a bias.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        between: list[Callable[[Tensor], Tensor]],
        outer: list[Tensor],
        inner: list[Tensor],
    ) -> None:
        super().__init__()
        self.between, self.outer, self.inner = between, outer, inner
        self.bias = [layer.bias is not None for layer in layers]
        weights = []
        for layer, phi, omega in zip(layers, outer, inner, strict=True):
            weight = layer.weight.detach()
            if layer.bias is not None:
                weight = torch.cat([weight, layer.bias.detach()[:, None]], 1)
            left = torch.linalg.solve(phi, weight)
            weights.append(nn.Parameter(torch.linalg.solve(omega.T, left.T).T.contiguous()))
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(N, C)`` for inputs ``(N, ...)``."""
        a = x
        for k, weight in enumerate(self.weights):
            a = self.between[k](a)
            if self.bias[k]:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
            a = F.linear(a @ self.inner[k].T, weight) @ self.outer[k].T
        return self.between[-1](a)


Made = Callable[[int, int, bool, Tensor, torch.Generator], "tuple[Tensor, Tensor]"]
COORDINATES: Registry[Made] = Registry("coordinates")


@COORDINATES.register("random")
def _random(out: int, inp: int, bias: bool, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random well-conditioned Φ and Ω, the constant 1 mixed in."""

    def drawn(size: int) -> Tensor:
        noise = torch.randn(size, size, generator=generator, device=generator.device, dtype=torch.float64)
        scales = 0.5 + 1.5 * torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
        return (torch.linalg.qr(noise).Q * scales).to(like)

    return drawn(out), drawn(inp + bias)


@COORDINATES.register("logistic")
def _logistic(out: int, inp: int, bias: bool, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Those of logistic units in the place of tanh: ``σ(s) = ½ tanh(s/2) + ½``."""
    if not bias:
        raise IncompatiblePair('coordinates="logistic" shifts the activities: every layer needs a bias')
    omega = torch.diag(torch.cat([like.new_full((inp,), 0.5), like.new_ones(1)]))
    omega[:-1, -1] = 0.5
    return torch.eye(out, dtype=like.dtype, device=like.device) / 2, omega


@lasting()
def invariance(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    steps: int = 10,
    damping: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    coordinates: str = "random",
    inverse: str = "block_diagonal",
    **settings: Any,
) -> Invariance:
    """Trains a network and its transformed twin side by side by Kronecker-factored steps (Martens 2016, 6.10 and B.4).

    Undamped block-diagonal and block-tridiagonal steps see no coordinates: the outputs stay the same up to rounding
    (float64 networks, minibatches larger than all layers are wide). Damping and first-order steps do see them.

    Args:
        model: ``nn.Sequential`` of ``nn.Linear`` and modules without parameters; a copy is trained.
        likelihood: registered name or object.
        data: loader, batches or a pair of tensors; a step takes one minibatch after the other, round and round.
        steps: how many.
        damping: ζ of the factors (:class:`laplace_kf.optim.GaussNewton`).
        generator: of the coordinates; a fresh private one by default.
        coordinates: ``"random"``, or ``"logistic"``: those in which tanh units are logistic units.
        inverse: ``"block_diagonal"`` or ``"block_tridiagonal"``.
        **settings: of the optimiser, other than its defaults here: exact factors of the minibatch alone, no l2, τ = 0.

    Raises:
        UnsupportedLayer: for another kind of network.
        NotPositiveDefinite: if a factor is singular without damping: take larger minibatches or narrower layers; that
            of a softmax is always, so give it a damping, or test with Gaussian or Bernoulli outputs. (One
            that is nearly so gets a jitter, with a warning; a jitter is a damping.)
        ShapeMismatch: if the data are empty, or ``steps`` is negative.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ShapeMismatch(f"steps must be a whole number of at least 0, got {steps!r}")
    generator = generator if generator is not None else fresh_generator()
    network = copy.deepcopy(usable(model)).eval()
    batches = list(as_batches(repeatable(data), network))
    if not batches:
        raise ShapeMismatch(
            "the data are empty: no batch was yielded; a generator that was read before is empty: give a list or a "
            "DataLoader"
        )
    made = COORDINATES[coordinates]
    layers, between = _parts(network)
    pairs = [
        made(layer.out_features, layer.in_features, layer.bias is not None, layer.weight.detach(), generator)
        for layer in layers
    ]
    twin = Twin(layers, between, [phi for phi, _ in pairs], [omega for _, omega in pairs]).eval()
    row: dict[str, Any] = {"l2": 0.0, "tau": 0.0, "zeta": damping, "adapt_tau": False, "adapt_zeta": False, "ema": 0.0}
    row |= {"max_rise": float("inf"), **settings}  # a refused step would be made with other damping
    optimisers = [
        GaussNewton(net, likelihood, "exact", "kron", **{"inverse": inverse, "damping": "factored", **row})
        for net in (network, twin)
    ]
    gaps, losses = [_difference(network, twin, batches)], []
    for batch in islice(cycle(batches), steps):
        found = [float(optimiser.step(*batch)) for optimiser in optimisers]
        losses.append(found[0])
        gaps.append(_difference(network, twin, batches))
    by_step = torch.tensor(gaps, dtype=torch.float64)
    return Invariance(float(by_step.max()), by_step, torch.tensor(losses, dtype=torch.float64))


def _parts(network: nn.Module) -> tuple[list[nn.Linear], list[Callable[[Tensor], Tensor]]]:
    """The linear layers of a sequence, and what stands before each of them and after the last."""
    if not isinstance(network, nn.Sequential):
        raise UnsupportedLayer(
            f"the twin is made of an nn.Sequential, got {type(network).__name__}; put the layers into one"
        )
    layers: list[nn.Linear] = []
    groups: list[list[nn.Module]] = [[]]
    for path, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            continue
        if isinstance(module, nn.Linear):
            layers.append(module)
            groups.append([])
        elif any(True for _ in module.parameters()) or any(True for _ in module.children()):
            raise UnsupportedLayer(
                f"module {path!r} ({type(module).__name__}) cannot be put into other coordinates; the twin is made of "
                "nn.Linear and modules without parameters in nn.Sequential"
            )
        else:
            groups[-1].append(module)
    if not layers:
        raise UnsupportedLayer("the network has no nn.Linear; a twin needs at least one")
    return layers, [_Applied(group) for group in groups]


class _Applied:
    """Modules without parameters, one after the other."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules:
            x = module(x)
        return x


def _difference(network: nn.Module, twin: nn.Module, batches: list[Any]) -> float:
    with preserved(network), preserved(twin), torch.no_grad():
        return max(float((network(batch[0]) - twin(batch[0])).abs().max()) for batch in batches)
