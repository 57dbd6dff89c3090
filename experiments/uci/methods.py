"""Predictive densities of networks and mixtures of networks, with settings that are chosen together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.common import training
from laplace_kf.likelihoods import Gaussian, HeteroscedasticGaussian, Likelihood
from laplace_kf.posterior import LaplacePosterior

__all__ = ["HEADS", "Chosen", "Member", "choose", "log_density", "loss", "member"]

Pair = tuple[Tensor, Tensor]
HEADS: dict[str, int] = {"constant": 1, "heteroscedastic": 2}
"""Noise models by name, and how many outputs they need."""
LOG_2PI = math.log(2 * math.pi)
RATIOS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SIZES = (0.0, *(10 ** (k / 2) for k in range(-6, 5)))
NOISES = tuple(10 ** (k / 20) for k in range(-60, 5))
"""Noise scales in standard deviations of the target: tables without noise (yacht, naval) need a hundredth."""
FACTORS = tuple(10 ** (k / 20) for k in range(-6, 13))
"""Factors on the noise that a network predicts, which is too small where the network fits its training rows closely."""


def likelihood(head: str, noise: float = 1.0) -> Likelihood:
    """The package's likelihood of a head."""
    return Gaussian(noise) if head == "constant" else HeteroscedasticGaussian()


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Means over minibatches, ``(M,)``, of outputs ``(M, B, 1 or 2)`` and targets ``(M, B, 1)``.

    Half the squared error, or the negative log density where the network has its own log variance.
    """
    errors = (outputs[..., :1] - targets).square()
    if outputs.shape[-1] == 2:
        spread = outputs[..., 1:].clamp(-12.0, 6.0)
        errors = errors * (-spread).exp() + spread
    return errors.mean((1, 2)) / 2


@dataclass(frozen=True)
class Member:
    """What one network says of some inputs.

    Args:
        mean: ``(N,)``.
        noise: log variance of its own ``(N,)``, or None.
        variances: of mean and log variance, ``(R, N, 1 or 2)``, for the ratios R at N = 1; empty without a posterior.
    """

    mean: Tensor
    noise: Tensor | None
    variances: Tensor


@dataclass(frozen=True)
class Chosen:
    """Ratio λ/N (its number), size of the covariance (0: none), and noise scale or factor, of all members."""

    ratio: int
    size: float
    noise: float


def member(model: nn.Module, head: str, data: Pair | None, x: Tensor) -> Member:
    """A network's word on inputs ``(N, D)``; with a dense Gauss-Newton matrix of ``data`` if that is given."""
    outputs = training.outputs(model, x)
    noise = outputs[:, 1].clamp(-12.0, 6.0) if head == "heteroscedastic" else None
    if data is None:
        return Member(outputs[:, 0], noise, torch.zeros(0, *outputs.shape))
    posterior = LaplacePosterior(model, likelihood(head), structure="full").fit(data)
    posterior.n_data = 1.0
    found = []
    for ratio in RATIOS:
        posterior.prior_precision = ratio
        found.append(posterior.functional_covariance(x, diagonal_only=True))
    return Member(outputs[:, 0], noise, torch.stack(found))


def log_density(members: Sequence[Member], chosen: Chosen, targets: Tensor) -> Tensor:
    """Log density ``(N,)`` of targets ``(N, 1)``: the equal mixture of the members' normal variables."""
    return _densities(members, chosen.ratio, chosen.size, torch.tensor([chosen.noise]), targets)[0]


def _densities(members: Sequence[Member], ratio: int, size: float, noises: Tensor, targets: Tensor) -> Tensor:
    """Log densities ``(K, N)`` at K noise scales."""
    each = []
    for one in members:
        spread = size * one.variances[ratio] if size else torch.zeros(len(one.mean), 2)
        own = torch.ones(()) if one.noise is None else (one.noise + spread[:, 1] / 2).exp()
        total = spread[:, 0] + noises[:, None].square() * own
        each.append(-0.5 * ((targets[:, 0] - one.mean).square() / total + total.log() + LOG_2PI))
    return torch.stack(each).logsumexp(0) - math.log(len(each))


def choose(members: Sequence[Member], targets: Tensor, count: int) -> Chosen:
    """The settings with the best mean log density of validation targets ``(N, 1)``; MAP's among them.

    Args:
        members: with or without posteriors.
        targets: of the validation rows.
        count: training rows, the unit of the sizes.
    """
    own = members[0].noise is not None
    noises = torch.tensor(FACTORS if own else NOISES)
    best, chosen = -math.inf, Chosen(0, 0.0, 1.0)
    for ratio, size in [(0, 0.0), *((r, s / count) for r in range(len(members[0].variances)) for s in SIZES[1:])]:
        found = _densities(members, ratio, size, noises, targets).mean(1)  # of every noise scale at once
        value, place = found.nan_to_num(-math.inf).max(0)
        if float(value) > best:
            best, chosen = float(value), Chosen(ratio, size, float(noises[place]))
    return chosen
