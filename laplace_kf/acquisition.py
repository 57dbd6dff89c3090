"""Which points to label next: BALD, BatchBALD and EPIG, from joint distributions of the linearised network's outputs.

All are mutual informations in nats under ``f(x) + J(x) ε`` with ``ε ~ N(0, Λ⁻¹)``. With Gaussian noise they have a
closed form. With classes the outputs of S functions, one draw of the weights each over all points, give them up to
Monte Carlo error; those of a mixture are shared out among its components. Of a batch, labels are drawn point after
point once their combinations are too many to list (Kirsch et al. 2019, section 3.3), so that nothing grows with the
number of combinations.

BALD: Houlsby et al. 2011; BatchBALD: Kirsch et al. 2019; EPIG: Bickford Smith et al. 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Bernoulli, Categorical, Gaussian
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.operators import fresh_generator
from laplace_kf.posterior import LaplacePosterior, Mixture
from laplace_kf.posterior.components import shared_out
from laplace_kf.predictive import Linearization
from laplace_kf.predictive.functions import function_draws
from laplace_kf.predictive.loaders import refuse_loader
from laplace_kf.replica import stage

__all__ = ["Batch", "bald", "batch_bald", "epig"]

CONFIGURATIONS = 2000  # combinations of labels that are kept side by side
BITS = 6  # Bernoulli outputs whose combinations count as classes
VALUES = 2**24  # numbers of one part of a table of pairs


@dataclass(frozen=True)
class Batch:
    """A batch of points to label together, B of them: tensors ``(B,)``.

    Attributes:
        indices: positions in the pool, ``(size,)``, in the order in which they were chosen.
        scores: information about the function of the first 1 … size labels together, ``(size,)``, in nats.
    """

    indices: Tensor
    scores: Tensor


@typed
@lasting()
@explained
def bald(
    posterior: LaplacePosterior | Mixture, pool: Any, samples: int = 200, generator: torch.Generator | None = None
) -> Tensor:
    """Information of each point's label about the function, ``(N,)`` in nats.

    Args:
        posterior: fitted; its likelihood categorical, Bernoulli or Gaussian. A mixture of several networks' posteriors,
            with classes, differs in its functions' networks as well as in their weights.
        pool: inputs as for ``predict``, N examples.
        samples: functions S, for classes.
        generator: random numbers of the functions.

    Raises:
        NotFitted: before ``fit``.
        IncompatiblePair: for another likelihood, and for a mixture with Gaussian noise.
        ShapeMismatch: for outputs with several positions.
    """
    normal = _normal(posterior)
    if normal is not None:
        return _log_ratio(normal[0].functional_covariance(pool), normal[1])
    probabilities = _functions(posterior, [pool], samples, generator)[0]
    return _entropy(probabilities.mean(0)) - _entropy(probabilities).mean(0)


@typed
@lasting()
@explained
def batch_bald(
    posterior: LaplacePosterior | Mixture,
    pool: Any,
    size: int,
    samples: int = 200,
    generator: torch.Generator | None = None,
    *,
    configurations: int = CONFIGURATIONS,
) -> Batch:
    """The batch of points, ``(B,)``, whose labels together inform most about the function, chosen greedily.

    Args:
        posterior, pool, samples, generator: as of :func:`bald`; information of more than ``log S`` nats cannot be told,
            so that large batches need many functions.
        size: of the batch, at most N.
        configurations: combinations of labels that are kept; all of them while they are so few.

    Raises:
        ValueError: for a size that is not between 1 and N.
        NotFitted, IncompatiblePair, ShapeMismatch: as :func:`bald`.
    """
    normal = _normal(posterior)
    if normal is not None:
        single, noise = normal
        covariance = single.functional_covariance(pool, joint=True)
        return _gaussian_batch(covariance, noise.to(covariance), _size(size, len(covariance) // len(noise)))
    source = generator if generator is not None else fresh_generator()
    p = _functions(posterior, [pool], samples, source)[0]
    return _class_batch(p, _size(size, p.shape[1]), configurations, source)


@typed
@lasting()
@explained
def epig(
    posterior: LaplacePosterior | Mixture,
    pool: Any,
    targets: Any,
    samples: int = 200,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Information of each point's label about the labels at other points, mean over those, ``(N,)`` in nats.

    Args:
        posterior, pool, samples, generator: as of :func:`bald`.
        targets: inputs ``(T, ...)`` where predictions are wanted, of the form of ``pool``.

    Raises:
        NotFitted, IncompatiblePair, ShapeMismatch: as :func:`bald`.
    """
    normal = _normal(posterior)
    if normal is None:
        p, q = _functions(posterior, [pool, targets], samples, generator)
        return _pairs(p, q)
    single, noise = normal
    joint = single.functional_covariance(_together(pool, targets), joint=True)
    c = len(noise)
    n = _count(pool)
    blocks = joint.reshape(len(joint) // c, c, -1, c).transpose(1, 2)
    own = torch.diag_embed(noise.to(joint))
    known = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1) + own
    between = blocks[:n, n:]  # (N, T, C, C)
    factor = torch.linalg.cholesky(known)
    left = torch.linalg.solve_triangular(factor[:n, None], between, upper=False)
    white = torch.linalg.solve_triangular(factor[None, n:], left.mT, upper=False)
    eye = torch.eye(c, dtype=joint.dtype, device=joint.device)
    return -torch.linalg.slogdet(eye - white.mT @ white)[1].mean(1) / 2


# -- Gaussian noise ----------------------------------------------------------------------------------------------------


def _normal(posterior: LaplacePosterior | Mixture) -> tuple[LaplacePosterior, Tensor] | None:
    """The posterior and the variances of its noise ``(C,)``; ``None`` for classes."""
    likelihood = posterior.likelihood
    if isinstance(likelihood, (Categorical, Bernoulli)):
        return None
    if not isinstance(likelihood, Gaussian):
        raise IncompatiblePair(
            f"information about labels is known for the likelihoods 'categorical', 'bernoulli' and 'gaussian', not for "
            f"{likelihood!r}"
        )
    if isinstance(posterior, Mixture):
        raise IncompatiblePair(
            "information about labels with Gaussian noise has a closed form for one posterior, not for a mixture; give "
            "one component, mixture.posteriors[0]"
        )
    statistics = posterior.statistics
    if statistics.terms % statistics.count:
        raise ShapeMismatch("the outputs of an example have different numbers of positions; acquisition needs (N, C)")
    scale = torch.as_tensor(likelihood.scale).detach().double()
    return posterior, (scale**2).expand(round(statistics.terms / statistics.count))


def _log_ratio(covariance: Tensor, noise: Tensor) -> Tensor:
    """``½ log |I + Σ / σ²|`` of ``(..., C, C)``."""
    root = noise.to(covariance).rsqrt()
    scaled = root[:, None] * covariance * root
    return torch.linalg.slogdet(torch.eye(len(root)).to(scaled) + scaled)[1] / 2


def _gaussian_batch(covariance: Tensor, noise: Tensor, size: int) -> Batch:
    c = len(noise)
    left = covariance.clone()
    count = len(left) // c
    chosen: list[int] = []
    gains = []
    for _ in range(size):
        blocks = left.reshape(count, c, count, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        scores = _log_ratio(blocks, noise)
        scores[chosen] = -math.inf
        best = int(scores.argmax())
        chosen.append(best)
        gains.append(scores[best])
        own = slice(best * c, best * c + c)
        known = torch.linalg.cholesky(left[own, own] + torch.diag(noise))
        left = left - left[:, own] @ torch.cholesky_solve(left[own], known)
    return Batch(torch.tensor(chosen), torch.stack(gains).cumsum(0))


# -- classes -----------------------------------------------------------------------------------------------------------


def _functions(
    posterior: LaplacePosterior | Mixture, inputs: list[Any], samples: int, generator: torch.Generator | None
) -> list[Tensor]:
    """Probabilities ``(S, N, C)`` of the same S functions at several inputs."""
    if samples < 2:
        raise InvalidArgument(f"samples must be at least 2, got {samples}")
    sizes = [_count(x) for x in inputs]
    x = inputs[0]
    for more in inputs[1:]:
        x = _together(x, more)
    if isinstance(posterior, Mixture):
        counts = shared_out(samples, posterior.weights.tolist())
        parts = [_drawn_from(member, x, count, generator)
                 for member, count in zip(posterior.posteriors, counts, strict=True) if count]  # fmt: skip
        outputs = torch.cat(parts)
    else:
        outputs = _drawn_from(posterior, x, samples, generator)
    outputs = outputs.double() if outputs.dtype == torch.float64 else outputs.float()
    if isinstance(posterior.likelihood, Bernoulli):
        return list(_combinations(outputs).split(sizes, 1))
    return list(outputs.softmax(-1).split(sizes, 1))


def _drawn_from(posterior: LaplacePosterior, x: Any, samples: int, generator: torch.Generator | None) -> Tensor:
    """Outputs ``(S, N, C)`` of S functions of one linearised network."""
    with torch.no_grad(), stage(posterior.model, posterior.forward) as (model, forward):
        x = posterior.checked_input(model, forward, x)
        network = Linearization(model, forward, posterior.mean, x, keep=False)
        if network.outputs.dim() != 2:
            raise ShapeMismatch(
                f"acquisition needs outputs (N, C), got {tuple(network.outputs.shape)}: there is one label a point"
            )
        return function_draws(network, posterior.precision, samples, generator)


def _combinations(logits: Tensor) -> Tensor:
    """Probabilities ``(S, N, 2^C)`` of all combinations of C independent labels."""
    if logits.shape[-1] > BITS:
        raise ShapeMismatch(
            f"information of {logits.shape[-1]} Bernoulli labels a point would need all their combinations; at most "
            f"{BITS} are taken"
        )
    found = torch.ones_like(logits[..., :1])
    for one in logits.unbind(-1):
        both = torch.stack([torch.sigmoid(-one), torch.sigmoid(one)], -1)
        found = (found[..., :, None] * both[..., None, :]).flatten(-2)
    return found


def _class_batch(p: Tensor, size: int, configurations: int, generator: torch.Generator) -> Batch:
    samples, count, classes = p.shape
    conditional = _entropy(p).mean(0)  # (N,)
    # `weights` (M,) of the combinations of labels so far, and their probability under every function (M, S)
    weights, under = p.new_ones(1), p.new_ones(1, samples)
    chosen: list[int] = []
    scores = []
    known = p.new_zeros(())
    for _ in range(size):
        marginal = under.mean(1)  # (M,)
        share = weights[:, None] * under / (samples * marginal[:, None])
        gained = torch.empty_like(conditional)
        step = max(1, VALUES // (len(weights) * classes))
        for start in range(0, count, step):
            some = slice(start, min(start + step, count))
            joint = torch.einsum("ms,snc->mnc", under / samples, p[:, some])
            conditionals = torch.einsum("ms,snc->mnc", share, p[:, some])
            gained[some] = -(torch.where(conditionals > 0, conditionals * joint.log(), 0.0)).sum((0, 2))
        scores_now = gained - known - conditional
        scores_now[chosen] = -math.inf
        best = int(scores_now.argmax())
        chosen.append(best)
        scores.append(scores_now[best])
        known = known + conditional[best]
        if len(weights) * classes <= configurations:
            following = under[:, None, :] * p[:, best].T[None]  # (M, C, S)
            weights = (weights[:, None] * following.mean(-1) / marginal[:, None]).flatten()
            under = following.flatten(0, 1)
        else:
            if len(weights) < configurations:
                picked = _drawn(weights[None].expand(configurations, -1), generator)
                under, weights = under[picked], weights.new_full((configurations,), 1 / configurations)
            labels = _drawn(under @ p[:, best], generator)
            under = under * p[:, best, labels].T
        alive = (weights > 0) & (under.mean(1) > 0)
        under, weights = under[alive], weights[alive]
        scale = under.mean(1, keepdim=True)
        if bool((scale < 1e-30).any()):
            raise ShapeMismatch(
                f"the labels of {len(chosen)} points together are too improbable to be told apart; ask for fewer"
            )
    return Batch(torch.tensor(chosen), torch.stack(scores))


def _drawn(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row of ``(M, K)`` in proportion to the weights."""
    levels = weights.cumsum(-1)
    uniform = torch.rand(len(weights), 1, generator=generator, device=generator.device).to(levels)
    return torch.searchsorted(levels.contiguous(), uniform * levels[:, -1:])[:, 0].clamp_max(weights.shape[1] - 1)


def _pairs(p: Tensor, q: Tensor) -> Tensor:
    """Mean over targets of ``I(y; y*)`` from functions ``(S, N, C)`` and ``(S, T, C)``."""
    samples, count, classes = p.shape
    alone = _entropy(p.mean(0)), _entropy(q.mean(0)).mean()
    out = torch.empty_like(alone[0])
    step = max(1, VALUES // (classes * classes * q.shape[1]))
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        joint = torch.einsum("snc,stk->ntck", p[:, some], q) / samples
        out[some] = alone[0][some] + alone[1] - _entropy(joint.flatten(2)).mean(1)
    return out


def _entropy(p: Tensor) -> Tensor:
    """Over the last axis, in nats."""
    return torch.special.entr(p).sum(-1)


# -- inputs ------------------------------------------------------------------------------------------------------------


def _size(size: int, count: int) -> int:
    if not 1 <= size <= count:
        raise InvalidArgument(f"size must be between 1 and the {count} points of the pool, got {size}")
    return size


def _count(x: Any) -> int:
    refuse_loader(x)
    if isinstance(x, Tensor):
        return x.shape[0]
    if isinstance(x, Mapping):
        return _count(next(iter(x.values())))
    if isinstance(x, (tuple, list)):
        return _count(x[0])
    return len(x)


def _together(one: Any, other: Any) -> Any:
    """The examples of two inputs of one form."""
    refuse_loader(one)
    refuse_loader(other)
    if isinstance(one, Mapping):
        return {name: _together(value, other[name]) for name, value in one.items()}
    if isinstance(one, (tuple, list)):
        return type(one)(_together(a, b) for a, b in zip(one, other, strict=True))
    first, second = torch.as_tensor(one), torch.as_tensor(other)
    if first.shape[1:] != second.shape[1:]:
        raise ShapeMismatch(
            f"pool and targets are inputs of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return torch.cat([first, second.to(first)])
