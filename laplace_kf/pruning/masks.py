"""Pruning by conditioning: which weights the posterior misses least, and what the others become without them.

Holding a weight at zero raises ``½ (θ−μ)ᵀ Λ (θ−μ)`` by ``w² / 2Σ_ii`` with ``Σ`` the covariance given what is held
already (optimal brain surgeon, Hassibi and Stork 1993). Weights are held in a few rounds, and after each the others
take their conditional mean and the saliencies are those of the conditional Gaussian: many weights together matter in
another way than each alone. No data are needed, and nothing is trained.

Between rounds, mean and variances are exact for diagonal, dense and low-rank blocks and for small ones; for larger
Kronecker and eigenvalue-corrected blocks they are those of every row given the other rows (``O(Σ_o |F_o|³)`` a round).
The weights that come out are the exact conditional mean in every case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidType, ShapeMismatch, UnknownName
from laplace_kf.keywords import explained
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.pruning.saliency import SCORES, Groups, Held
from laplace_kf.registry import Registry

__all__ = ["PATTERNS", "gradually", "heads", "masks", "prune"]


@typed
@lasting()
@explained
def prune(
    posterior: LaplacePosterior,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    per_layer: bool = False,
    rounds: int = 10,
    layers: Sequence[str] | None = None,
    groups: Groups | None = None,
    score: str = "posterior",
) -> nn.Module:
    """A pruned copy of the network: exact zeros, the other weights of the posterior at their conditional means.

    Args:
        posterior: fitted.
        sparsity: share of the weights that become zero, in [0, 1]: of the matrices and kernels that the posterior
            covers (biases and normalisation stay). Exactly ``round(sparsity · count)`` of them are zero. Of ``"rows"``,
            ``"heads"`` and ``groups`` whole groups, until the next would be more than that; of ``"n:m"`` it is given
            by the pattern.
        pattern: ``"unstructured"``; ``"rows"`` (whole outputs: neurons, channels); ``"heads"`` (of
            ``nn.MultiheadAttention``); ``"2:4"`` or any other ``"n:m"`` (at most n of m neighbours along a row, or
            along the input channels of a kernel, are not zero).
        per_layer: the share holds for every parameter; otherwise weights are chosen over all layers together.
        rounds: how often saliencies are made anew on the way to the sparsity.
        layers: name patterns of the parameters to prune; default all matrices and kernels.
        groups: by parameter name, an integer tensor of its shape: weights with one number are held together, over all
            parameters; negative numbers stay. Instead of ``pattern``.
        score: ``"posterior"``; ``"magnitude"`` ranks by ``|w|`` (the others still take their conditional means).

    Raises:
        NotFitted: before ``fit``.
        UnknownName: for another pattern or score, or a name pattern without a match.
        IncompatiblePair: without prunable weights; for a sparsity that the pattern does not have; for an ``n:m`` that
            does not divide a layer.
        NotPositiveDefinite: if the precision is singular.
    """
    chosen = _masks(posterior, sparsity, pattern, per_layer, rounds, layers, groups, score, {})
    return posterior.condition(0.0, chosen).model()


@typed
@lasting()
def masks(
    posterior: LaplacePosterior,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    per_layer: bool = False,
    rounds: int = 10,
    layers: Sequence[str] | None = None,
    groups: Groups | None = None,
    score: str = "posterior",
) -> dict[str, Tensor]:
    """Which weights :func:`prune` holds at zero, bool by parameter name in its shape; arguments and errors as there."""
    return _masks(posterior, sparsity, pattern, per_layer, rounds, layers, groups, score, {})


@typed
@lasting()
def gradually(
    posterior: LaplacePosterior,
    data: Any,
    sparsity: float,
    steps: int = 4,
    *,
    train: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> nn.Module:
    """A pruned copy in several steps, the curvature measured anew after each at the weights of then.

    Args:
        posterior: fitted; it and its model stay as they are.
        data: as ``fit`` takes them, to go through once a step: a loader or a pair ``(x (N, ...), y (N, ...))``.
        sparsity: at the end; the share of weights that are left falls by the same factor in every step.
        steps: how many.
        train: ``(model, data)``, trains the copy between the steps; weights that are zero stay so.
        generator: random numbers of the fits.
        **settings: ``pattern``, ``per_layer``, ``rounds``, ``layers``, ``groups``, ``score`` of :func:`prune`.

    Raises:
        IncompatiblePair: for a posterior chained to earlier tasks, and as :func:`prune`.
    """
    if steps < 1:
        raise InvalidArgument(f"steps must be at least 1, got {steps}")
    if posterior.chain_errors:
        raise IncompatiblePair(
            "a chained posterior has no data of its own that its curvature could be measured on again; prune it in one "
            "step: prune(posterior, sparsity)"
        )
    _share(sparsity)
    held: Held = {}
    now = posterior
    for step in range(1, steps + 1):
        share = 1 - (1 - sparsity) ** (step / steps)
        given = {"pattern": "unstructured", "per_layer": False, "rounds": 10, "layers": None, "groups": None,
                 "score": "posterior", **settings}  # fmt: skip
        held = _masks(now, share, held=held, **given)
        model = now.condition(0.0, held).model()
        if step == steps:
            break
        if train is not None:
            train(model, data)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in held:
                        parameter.masked_fill_(held[name].to(parameter.device), 0)
        now = _over(posterior, model).fit(data, n_data=posterior.n_data, generator=generator)
    return model


def _over(posterior: LaplacePosterior, model: nn.Module) -> LaplacePosterior:
    """An unfitted posterior of another network with the same settings."""
    return LaplacePosterior(
        model, posterior.likelihood, posterior.structure, posterior.estimator, posterior.parameters,
        posterior.prior_precision, posterior.damping, posterior.forward, dtype=posterior.dtype,
        weights=posterior.weights, unused=posterior.unused,
    )  # fmt: skip


def heads(model: nn.Module) -> dict[str, Tensor]:
    """Groups of the heads of every ``nn.MultiheadAttention``: integer tensors of the parameters' shapes, by name.

    A head is its rows of the query, key and value weights and its columns of the output weight.

    Raises:
        IncompatiblePair: if there is none; says how to give heads of other modules.
    """
    found: dict[str, Tensor] = {}
    first = 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        of_row = first + torch.arange(module.embed_dim) // module.head_dim
        prefix = f"{path}." if path else ""
        if module.in_proj_weight is not None:
            rows = of_row.repeat(3)[:, None]
            found[f"{prefix}in_proj_weight"] = rows.expand_as(module.in_proj_weight).clone()
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                found[f"{prefix}{name}"] = of_row[:, None].expand_as(getattr(module, name)).clone()
        found[f"{prefix}out_proj.weight"] = of_row[None].expand_as(module.out_proj.weight).clone()
        first += module.num_heads
    if not found:
        raise IncompatiblePair(
            "the model has no nn.MultiheadAttention, so that its heads are not known; give them as groups: "
            "prune(posterior, sparsity, groups={'name.weight': numbers}) with one number for the weights of one head"
        )
    return found


# -- which weights ----------------------------------------------------------------------------------------------------


def _masks(
    posterior: LaplacePosterior,
    sparsity: float | None,
    pattern: str,
    per_layer: bool,
    rounds: int,
    layers: Sequence[str] | None,
    groups: Groups | None,
    score: str,
    held: Held,
) -> Held:
    rank = SCORES[score]
    if rounds < 1:
        raise InvalidArgument(f"rounds must be at least 1, got {rounds}")
    mean = posterior.mean
    names = _prunable(posterior.model, mean, layers)
    start = {name: held.get(name, torch.zeros(mean[name].shape, dtype=torch.bool)) for name in names}
    neighbours = re.fullmatch(r"(\d+):(\d+)", pattern)
    if groups is not None or pattern in ("rows", "heads"):
        if groups is None:
            groups = PATTERNS[pattern](posterior.model, {name: mean[name] for name in names})
        return _by_groups(posterior, _checked(groups, mean, names), _share(sparsity), per_layer, rounds, start, rank)
    if neighbours is not None:
        return _by_neighbours(posterior, int(neighbours[1]), int(neighbours[2]), sparsity, start, rank)
    if pattern != "unstructured":
        raise UnknownName("pattern", pattern, [*PATTERNS, "unstructured", "n:m (such as 2:4)"])
    share = _share(sparsity)
    for step in range(1, rounds + 1):
        now = 1 - (1 - share) ** (step / rounds) if step < rounds else share
        scores = rank(posterior, start)
        pools = [[name] for name in names] if per_layer else [names]
        for pool in pools:
            sizes = [start[name].numel() for name in pool]
            flat = torch.cat([scores[name].reshape(-1).cpu().double() for name in pool])
            known = torch.cat([start[name].reshape(-1) for name in pool])
            wanted = max(round(now * len(flat)), int(known.sum()))
            order = flat.masked_fill(known, -math.inf).argsort(dim=-1, stable=True)[:wanted]
            chosen = torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order, True)
            for name, part in zip(pool, chosen.split(sizes), strict=True):
                start[name] = part.reshape(start[name].shape)
    return start


def _share(sparsity: float | None) -> float:
    if sparsity is None:
        raise InvalidType("prune needs a sparsity, the share of weights that become zero: prune(posterior, 0.9)")
    if not 0 <= sparsity <= 1:
        raise InvalidArgument(f"sparsity is the share of weights that become zero, between 0 and 1, got {sparsity}")
    return float(sparsity)


def _prunable(model: nn.Module, mean: Mapping[str, Tensor], layers: Sequence[str] | None) -> list[str]:
    """Matrices and kernels, in order: parameters of two dimensions or more outside of normalisation layers."""
    modules = dict(model.named_modules())
    names = [
        name for name, value in mean.items()
        if value.dim() >= 2 and "Norm" not in type(modules[name.rpartition(".")[0]]).__name__
    ]  # fmt: skip
    if layers is not None:
        for pattern in layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UnknownName("pattern in layers", pattern, names)
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in layers)]
    if not names:
        raise IncompatiblePair(
            f"the posterior covers no matrix or kernel that could be pruned, only {', '.join(mean)}; fit it over them: "
            'LaplacePosterior(model, likelihood, parameters="all")'
        )
    return names


def _rows(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One group for every output of every layer."""
    modules = dict(model.named_modules())
    found, first = {}, 0
    for name, weight in weights.items():
        module = modules[name.rpartition(".")[0]]
        turned = isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D"
        if turned and getattr(module, "groups", 1) > 1:
            raise IncompatiblePair(
                f"parameter {name!r} is a transposed convolution in {module.groups} groups, whose outputs are no rows; "
                "leave it out (layers=[patterns]) or give groups="
            )
        axis = 1 if turned else 0
        count = weight.shape[axis]
        shape = [1] * weight.dim()
        shape[axis] = count
        found[name] = (first + torch.arange(count)).reshape(shape).expand(weight.shape).clone()
        first += count
    return found


PATTERNS: Registry[Callable[[nn.Module, Mapping[str, Tensor]], Groups]] = Registry("pattern")
PATTERNS.register("rows")(_rows)


@PATTERNS.register("heads")
def _heads(model: nn.Module, weights: Mapping[str, Tensor]) -> Groups:
    found = heads(model)
    missing = sorted(set(found) - set(weights))
    if missing:
        raise IncompatiblePair(
            f"a head spans parameters that the posterior does not cover: {', '.join(missing)}; fit it over them"
        )
    return found


def _checked(groups: Groups, mean: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    found = {}
    for name, numbers in groups.items():
        if name not in mean:
            raise UnknownName("parameter in groups", name, mean)
        if numbers.shape != mean[name].shape or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise ShapeMismatch(
                f"the groups of {name!r} must be an integer tensor of its shape {tuple(mean[name].shape)}, got "
                f"{numbers.dtype} {tuple(numbers.shape)}"
            )
        found[name] = numbers.cpu()
    return found


def _by_groups(
    posterior: LaplacePosterior,
    groups: dict[str, Tensor],
    share: float,
    per_layer: bool,
    rounds: int,
    held: Held,
    rank: Any,
) -> Held:
    held = {
        **held,
        **{name: held.get(name, torch.zeros(numbers.shape, dtype=torch.bool)) for name, numbers in groups.items()},
    }
    every = torch.cat([numbers.reshape(-1) for numbers in groups.values()])
    ids, sizes = every[every >= 0].unique(return_counts=True)
    if not len(ids):
        raise IncompatiblePair("groups hold no number that is not negative, so that there is nothing to prune")
    pools = [torch.ones(len(ids), dtype=torch.bool)]
    if per_layer:
        pools = [torch.isin(ids, numbers) for numbers in groups.values()]
    known = torch.zeros(len(ids), dtype=torch.bool)
    for k, number in enumerate(ids.tolist()):
        known[k] = all(bool(held[name][numbers == number].all()) for name, numbers in groups.items())
    for step in range(1, rounds + 1):
        now = 1 - (1 - share) ** (step / rounds) if step < rounds else share
        scores = rank.groups(posterior, held, groups, ids) / sizes
        scores = scores.masked_fill(known, -math.inf)
        for pool in pools:
            order = scores.masked_fill(~pool, math.inf).argsort(dim=-1, stable=True)[: int(pool.sum())]
            fits = sizes[order].cumsum(0) <= round(now * int(sizes[pool].sum())) + 1e-9
            known[order[fits]] = True
        chosen = ids[known]
        for name, numbers in groups.items():
            held[name] = held[name] | torch.isin(numbers, chosen)
    return held


def _by_neighbours(posterior: LaplacePosterior, n: int, m: int, sparsity: float | None, held: Held, rank: Any) -> Held:
    if not 0 < n < m:
        raise InvalidArgument(f"pattern '{n}:{m}' keeps n of m neighbours, with 0 < n < m: write '2:4', say")
    if sparsity is not None and abs(_share(sparsity) - (1 - n / m)) > 1e-9:
        raise IncompatiblePair(
            f"pattern '{n}:{m}' has a sparsity of {1 - n / m:g}, not {sparsity:g}; leave sparsity out"
        )
    for name, mask in held.items():
        if mask.shape[1] % m:
            raise IncompatiblePair(
                f"parameter {name!r} of shape {tuple(mask.shape)} has {mask.shape[1]} inputs, which is no multiple of "
                f"{m}; leave it out: layers=[patterns of the others]"
            )
    for left in range(m - 1, n - 1, -1):  # one of every m in a round
        scores = rank(posterior, held)
        for name, mask in held.items():
            parted = scores[name].cpu().double().masked_fill(mask, -math.inf).movedim(1, -1)
            order = parted.reshape(-1, m).argsort(dim=-1, stable=True)[:, : m - left]
            chosen = torch.zeros(len(order), m, dtype=torch.bool).scatter_(1, order, True)
            held[name] = chosen.reshape(parted.shape).movedim(-1, 1).contiguous()
    return held
