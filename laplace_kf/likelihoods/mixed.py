"""Predictions of several networks as one: the weighted mixture of their densities, position by position.

As the mixture over the draws of one posterior is (methods 10.1): classes have the mean of the probabilities; real
targets the mixture of the densities, whose mean and variance follow from the law of total variance. The mutual
information is that of the target with weights *and* component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
)

from laplace_kf.errors import ShapeMismatch, UnknownAttribute
from laplace_kf.likelihoods.prediction import NO_INFORMATION, Prediction, gaussian_entropy, of_logits

__all__ = ["mixed"]

BISECTIONS = 80


class Mixing(Protocol):
    """What is needed of a likelihood."""

    def predict(self, outputs: Tensor) -> Prediction:
        """From sampled outputs ``(S, N, ...)``."""

    def mixed_outputs(self, parts: Sequence[Prediction], log_weights: Tensor) -> Tensor | None:
        """Outputs ``(N, ...)`` whose prediction is the mixture, if there are such."""

    def mixed_entropy(self, parts: Sequence[Prediction], weights: Tensor) -> Tensor | None:
        """Entropy of the mixture by position, where its moments or probabilities are not enough."""


def mixed(
    likelihood: Mixing,
    parts: Sequence[Prediction],
    weights: Sequence[float],
    relabelled: Callable[[Prediction], Prediction] = lambda prediction: prediction,
) -> Prediction:
    """The mixture of predictions of one likelihood at the same inputs.

    Args:
        likelihood: of the targets.
        parts: one prediction a component; samples among them are put one after the other.
        weights: of the components, adding up to 1; those of weight 0 are left out.
        relabelled: what a prediction made anew from outputs goes through, as the parts have.

    Raises:
        ShapeMismatch: if the components do not have the same outputs.
    """
    used = [k for k, weight in enumerate(weights) if weight > 0]
    parts, weights = [parts[k] for k in used], [weights[k] for k in used]
    same_outputs(parts)
    if len(parts) == 1:
        return parts[0]
    own = parts[0].values  # empty for distributions without moments, whose density is all there is
    like = next((value for name, value in own.items() if name != "samples"), None)
    share = torch.tensor(weights, dtype=torch.float64, device=None if like is None else like.device)
    log_weights = (share / share.sum()).log()
    values = _moments(parts, log_weights.exp())
    if all("samples" in part.values for part in parts):
        values["samples"] = torch.cat([part.values["samples"] for part in parts])
    outputs = likelihood.mixed_outputs(parts, log_weights)
    if outputs is not None:
        found = relabelled(likelihood.predict(outputs[None]))
        values["probs"] = found.values["probs"]
        total: Callable[[], Tensor] = partial(_position_entropy, found)
    else:
        found = replace(parts[0], density=partial(_density, tuple(part.density for part in parts), log_weights))
        total = partial(_total, likelihood, tuple(parts), log_weights.exp(), values)
    normal = "mean" in values and outputs is None
    return replace(
        found,
        values=values,
        entropies=partial(_entropies, total, tuple(parts), log_weights.exp()),
        information=partial(_information, total, tuple(parts), log_weights.exp()),
        build=found.build if outputs is not None else partial(_distribution, tuple(parts), log_weights),
        quantiles=partial(_quantiles, tuple(parts), log_weights, values) if normal and _all_normal(parts) else None,
        calibration=None,
        independent_samples=any(part.independent_samples for part in parts),
    )


def same_outputs(parts: Sequence[Prediction]) -> None:
    """Refuses predictions of outputs of several shapes."""
    shapes = [{n: tuple(v.shape) for n, v in part.values.items() if n != "samples"} for part in parts]
    for k, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ShapeMismatch(
                f"component {k} predicts {_described(shape)} where component 0 predicts {_described(shapes[0])}: the "
                "components of a mixture need the same outputs, in number and layout, at the same inputs"
            )


def _described(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def log_mixture(values: Tensor, log_weights: Tensor) -> Tensor:
    """``log Σ_m w_m exp v_m`` over the first dimension of ``(M, ...)``; 0 where all are 0, exactly."""
    w = log_weights.to(values).reshape(-1, *[1] * (values.dim() - 1))
    return torch.logsumexp(values + w, 0) - torch.logsumexp(w, 0)


def _weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.einsum("m,m...->...", weights.to(tensors[0]), torch.stack(list(tensors)))


def _moments(parts: Sequence[Prediction], weights: Tensor) -> dict[str, Tensor]:
    """Probabilities, mean and variances of the mixture, in the layout of the parts."""
    values: dict[str, Tensor] = {}
    for name in ("probs", "mean"):
        if name in parts[0].values:
            values[name] = _weighted([part.values[name] for part in parts], weights)
    if "mean" in values:
        between = _weighted([(part.values["mean"] - values["mean"]).square() for part in parts], weights)
        for name in ("variance", "epistemic_variance"):
            if name in parts[0].values:
                values[name] = _weighted([part.values[name] for part in parts], weights) + between
    return values


def _density(densities: Sequence[Callable[[Any], Tensor]], log_weights: Tensor, targets: Any) -> Tensor:
    return log_mixture(torch.stack([density(targets) for density in densities]), log_weights)


# ------------------------------------------------------------------------------------------------- entropies


def _position_entropy(prediction: Prediction) -> Tensor:
    return prediction.position_entropy


def _total(likelihood: Mixing, parts: Sequence[Prediction], weights: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Entropy of the mixture by position."""
    shape = parts[0].position_entropy.shape  # raises where a likelihood has none
    found = likelihood.mixed_entropy(parts, weights)
    if found is not None:
        return found.reshape(shape)
    name = "probs" if "probs" in values else "variance"
    if name not in values:
        raise UnknownAttribute(
            Prediction, "entropy", why="The entropy of this mixture is not known: its components have no variance."
        )
    value = values[name] if values[name].shape == shape else parts[0].channel_last(values[name])
    rows = value.flatten(len(shape)) if value.dim() > len(shape) else value[..., None]
    if name == "variance":
        return gaussian_entropy(rows).sum(-1)
    if rows.shape[-1] > 1 and bool((rows.detach().sum(-1) - 1).abs().max() < 1e-3):
        return -torch.special.xlogy(rows, rows).sum(-1)
    rest = (1 - rows).clamp_min(0.0)
    return -(torch.special.xlogy(rows, rows) + torch.special.xlogy(rest, rest)).sum(-1)


def _entropies(total: Callable[[], Tensor], parts: Sequence[Prediction], weights: Tensor) -> Any:
    """Entropy of the mixture, and mean entropy of what it is made of, if all components know that."""
    within = [part.entropies()[1] for part in parts]
    known = [each for each in within if each is not None]
    return total(), _weighted(known, weights) if len(known) == len(within) else None


def _information(total: Callable[[], Tensor], parts: Sequence[Prediction], weights: Tensor) -> Tensor:
    """Information in the component, plus the mean of that in its weights."""
    own = []
    for part in parts:
        entropy, conditional = part.entropies()
        if conditional is None and part.information is None:
            raise UnknownAttribute(Prediction, "mutual_information", why=NO_INFORMATION)
        own.append(part.information() if conditional is None else entropy - conditional)  # type: ignore[misc]
    return total() - _weighted([part.position_entropy for part in parts], weights) + _weighted(own, weights)


# ---------------------------------------------------------------------------------------- distributions and quantiles


def _components(prediction: Prediction) -> tuple[Tensor, Distribution]:
    """Log weights ``(*batch, S)`` of a prediction's mixture, and its components with that batch shape."""
    found = prediction.distribution
    if isinstance(found, MixtureSameFamily):
        logits: Tensor = found.mixture_distribution.logits
        return logits - torch.logsumexp(logits, -1, keepdim=True), found.component_distribution
    batch = found.batch_shape
    like = next(iter(prediction.values.values()), torch.empty(()))
    return torch.zeros(*batch, 1, dtype=like.dtype, device=like.device), _widened(found, len(batch))


PARAMETERS = {
    MultivariateNormal: ("loc", "covariance_matrix"),
    Normal: ("loc", "scale"),
    Poisson: ("rate",),
    Categorical: ("logits",),
    Bernoulli: ("logits",),
}


def _made(like: Distribution, change: Callable[[str], Tensor]) -> Distribution:
    names = PARAMETERS.get(type(like))
    if names is None:
        raise UnknownAttribute(
            Prediction, "distribution", why=f"a mixture of several posteriors has no common {type(like).__name__}"
        )
    kind: Any = type(like)
    values = {name: change(name) for name in names}
    some = all(value.numel() for value in values.values())  # torch cannot check none
    made: Distribution = kind(**values, validate_args=None if some else False)
    return made


def _widened(found: Distribution, axis: int) -> Distribution:
    """With one more batch dimension of size 1 at ``axis``."""
    if isinstance(found, Independent):
        return Independent(_widened(found.base_dist, axis), found.reinterpreted_batch_ndims)
    return _made(found, lambda name: getattr(found, name).unsqueeze(axis))


def _joined(found: Sequence[Distribution], axis: int) -> Distribution:
    """Components of several mixtures, along their batch dimension ``axis``."""
    first = found[0]
    if isinstance(first, Independent):
        bases = [each.base_dist for each in found]  # type: ignore[attr-defined]
        return Independent(_joined(bases, axis), first.reinterpreted_batch_ndims)
    return _made(first, lambda name: torch.cat([getattr(each, name) for each in found], axis))


def _distribution(parts: Sequence[Prediction], log_weights: Tensor) -> Distribution:
    """All components of all parts as one mixture."""
    opened = [_components(part) for part in parts]
    kinds = {type(each.base_dist if isinstance(each, Independent) else each) for _, each in opened}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnknownAttribute(
            Prediction,
            "distribution",
            why=f"components of several kinds ({names}) have no common torch distribution; log_prob, mean and variance "
            "are exact",
        )
    axis = opened[0][0].dim() - 1
    logits = torch.cat([log + weight.to(log) for (log, _), weight in zip(opened, log_weights, strict=True)], axis)
    return MixtureSameFamily(of_logits(logits), _joined([each for _, each in opened], axis))


def _normals(prediction: Prediction) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights ``(*batch, S)``, means and deviations ``(*batch, S, E)`` of the normals of a prediction."""
    logs, components = _components(prediction)
    if isinstance(components, Independent):
        components = components.base_dist
    if isinstance(components, MultivariateNormal):
        return logs, components.loc, components.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    assert isinstance(components, Normal)
    return logs, components.loc, components.scale


def _all_normal(parts: Sequence[Prediction]) -> bool:
    for part in parts:
        try:
            _, components = _components(part)
        except (AttributeError, NotImplementedError):
            return False
        opened = components.base_dist if isinstance(components, Independent) else components
        if not isinstance(opened, (Normal, MultivariateNormal)) or len(components.event_shape) != 1:
            return False
    return True


def _quantiles(parts: Sequence[Prediction], log_weights: Tensor, values: dict[str, Tensor], q: float) -> Tensor:
    """The ``q``-quantile of every output, in the layout of the mean: by bisection of the distribution function."""
    opened = [_normals(part) for part in parts]
    logs = torch.cat([log + weight.to(log) for (log, _, _), weight in zip(opened, log_weights, strict=True)], -1)
    loc = torch.cat([each for _, each, _ in opened], -2).double()
    scale = torch.cat([each for _, _, each in opened], -2).double()
    share = logs.double().softmax(-1).unsqueeze(-1)
    far = 2.0 + abs(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)).item())
    low, high = (loc - far * scale).amin(-2), (loc + far * scale).amax(-2)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = (share * torch.special.ndtr((middle.unsqueeze(-2) - loc) / scale)).sum(-2) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found, mean = (low + high) / 2, values["mean"]  # (*batch, E), the channel last
    laid = found.reshape(parts[0].channel_last(mean).shape)
    first = mean.dim() > 3 if parts[0].channel is None else parts[0].channel == 1
    return (laid.movedim(-1, 1) if first else laid).to(mean)


def poisson_entropy(parts: Sequence[Prediction], weights: Tensor, largest: float) -> Tensor:
    """Entropy by position of a mixture of Poisson mixtures, ``(*batch,)``: the sum of its outputs' marginals.

    Sums over the counts where no rate is above ``largest``, else that of a normal variable with the same variance.
    """
    logs, components = zip(*(_components(part) for part in parts), strict=True)
    share = torch.cat([log + weight.log().to(log) for log, weight in zip(logs, weights, strict=True)], -1).softmax(-1)
    rate = torch.cat([each.base_dist.rate for each in components], -2)  # (*batch, S, E)
    share = share.to(rate).unsqueeze(-1)
    mean = (share * rate).sum(-2)
    normal = gaussian_entropy(mean + (share * (rate - mean.unsqueeze(-2)).square()).sum(-2))
    small = rate.amax(-2) <= largest
    if not bool(small.any()):
        return normal.sum(-1)
    bounded = torch.where(small.unsqueeze(-2), rate, torch.ones_like(rate))
    top = float(bounded.detach().max())
    summed = torch.zeros_like(normal)
    for k in range(math.ceil(top + 12.0 * math.sqrt(top) + 24.0)):
        log_p = k * bounded.log() - bounded - math.lgamma(k + 1.0)
        p = (share * log_p.exp()).sum(-2)
        summed = summed - torch.special.xlogy(p, p)
    return torch.where(small, summed, normal).sum(-1)
