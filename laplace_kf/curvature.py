"""Curvature without a posterior: mean Gauss-Newton matrices in any structure, and exact products.

All curvature is of the per-example negative log-likelihood, summed over that example's outputs or positions, and
averaged over the data.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.batches import Forward
from laplace_kf.distributed import Ranks, refuse_checkpoint, require_one_job, require_one_network
from laplace_kf.engine import collect
from laplace_kf.errors import UnknownOption
from laplace_kf.estimators import ESTIMATORS, Estimator
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.models import lasting, usable
from laplace_kf.operators import fresh_generator
from laplace_kf.passes import Pass, columns_of, walk
from laplace_kf.reading import Part, reading
from laplace_kf.registry import Registry
from laplace_kf.resuming import journal
from laplace_kf.shards import Shard
from laplace_kf.structures import STRUCTURES, Structure
from laplace_kf.structures.base import Statistics
from laplace_kf.subnetwork import Selection, covered
from laplace_kf.tape import UNUSED

__all__ = ["Statistics", "estimate", "ggn_vector_product", "hessian_vector_product", "make_estimator", "make_structure"]


@lasting()
def estimate(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Tensor],
    structure: str | Structure = "kron",
    estimator: str | Estimator = "exact",
    parameters: Selection = "all",
    *,
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    weights: weighting.Weights = False,
    layout: str | None = None,
    unused: str = "error",
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    process_group: Any = None,
    **options: Any,
) -> Statistics:
    """Curvature statistics of a model over data (methods 4).

    Args:
        model: trained module; left exactly as it is.
        likelihood: registered name or object.
        data: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``.
        structure: ``"diag"``, ``"kron"``, ``"ekfac"``, ``"lowrank"`` (``rank=``), ``"layer"``, ``"full"``,
            ``"isotropic"`` or ``"auto"``; ``"ekfac"`` and ``"lowrank"`` go over the data twice.
        estimator: ``"exact"``, ``"auto"`` (``tolerance=``, ``most=``), ``"sampled"`` (``samples=``), ``"projection"``
            (``samples=``, ``noise=``), ``"importance"`` (``columns=``), ``"recursive"``, ``"empirical"``.
        parameters: ``"all"``, ``"last_layer"``, a list of name patterns, or a :class:`Subnetwork` of single weights.
        inputs, targets: functions of a batch of another form, with ``outputs = model(*inputs(batch))``.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``.
        generator: random numbers of the estimator; a fresh private one by default.
        dtype: type of the sums; default: the model's, float32 at least.
        weights: batches are ``(x, y, w)``, or mappings with ``"weights"``; the weight ``w (N,)`` of an example
            multiplies its negative log-likelihood and its curvature, and ``n_data`` counts examples (of weight > 0).
        layout: where the channel of the outputs stands (``likelihood.with_layout``): ``"channels_first"`` or
            ``"channels_last"``; default: as the targets show.
        unused: what becomes of selected parameters that took no part in any forward pass: ``"error"``, or ``"prior"``:
            their curvature is 0.
        checkpoint, every: a file to go on with after an interruption, as in :meth:`laplace_kf.LaplacePosterior.fit`.
        process_group: a ``torch.distributed`` group whose processes all call this, each with its own share of the data;
            the statistics are of all shares together, in all of them.
        **options: options of the estimator or the structure.

    Returns:
        Statistics with ``n_data``, ``+``, ``scale(c)``, ``mean()`` (``C̄``, a Matrix ``(P, P)``) and ``total()``.

    Raises:
        UnknownName, UnsupportedLayer, ShapeMismatch, NonFinite, IncompatiblePair: see :mod:`laplace_kf.errors`.
    """
    model = usable(model)
    structure, estimator = make_pair(structure, estimator, options)
    seeded, generator = generator is not None, generator if generator is not None else fresh_generator()
    _ = UNUSED[unused]
    read = weighting.reader(reading(forward, inputs, targets), weights)
    settings: dict[str, Any] = {"forward": read, "generator": generator, "dtype": dtype, "unused": unused}
    rule = get_likelihood(likelihood)
    rule = rule if layout is None else rule.with_layout(layout)
    ranks = Ranks.of(process_group)
    with nullcontext() if ranks is None else ranks.together("the estimate"):
        settings["shard"] = shard = Shard(data, estimator.draws)
        settings["ranks"] = ranks
        batches = weighting.batches(shard.data, weights, model)
        if ranks is None:
            shard.warn_alone()
        else:
            refuse_checkpoint(checkpoint)
            kinds = [(each.name, each.options()) for each in (structure, estimator)]
            asked = {"likelihood": rule, "structure": kinds[0], "estimator": kinds[1], "parameters": parameters}
            require_one_job(ranks, "estimate", {**asked, "dtype": dtype, "unused": unused})
            require_one_network(ranks, model)
            shard.settle(ranks.exchange("the shares", shard.description(batches)), ranks.rank)
        job = (model, batches, rule, estimator)
        kept = journal(
            checkpoint, every, model, batches, generator, seeded, (rule, estimator, structure), parameters=parameters,
            dtype=dtype, unused=unused, weights=weights, forward=read,
        )  # fmt: skip
        with kept.running():
            names, structure = covered(parameters, structure, *job, **settings)
            return collect(*job, structure, parameters=names, journal=kept, **settings)


def make_structure(structure: str | Structure, **options: Any) -> Structure:
    """A structure object from its registered name."""
    return structure if isinstance(structure, Structure) else STRUCTURES[structure](**options)


def make_estimator(estimator: str | Estimator, **options: Any) -> Estimator:
    """An estimator object from its registered name."""
    return estimator if isinstance(estimator, Estimator) else ESTIMATORS[estimator](**options)


SETTINGS = (
    "structure",
    "estimator",
    "parameters",
    "prior_precision",
    "damping",
    "forward",
    "inputs",
    "targets",
    "dtype",
)


def make_pair(
    structure: str | Structure, estimator: str | Estimator, options: dict[str, Any]
) -> tuple[Structure, Estimator]:
    """Structure and estimator, each with those of the options that it takes.

    An option that neither takes is refused, unless it has the value that changes nothing (``samples=1``).

    Raises:
        UnknownName: for unregistered names.
        UnknownOption: for an option that would have no effect; names what is allowed.
    """
    mine, theirs = _accepted(structure, STRUCTURES), _accepted(estimator, ESTIMATORS)
    neutral = {name: value for entry in ESTIMATORS for name, value in _accepted(entry, ESTIMATORS).items()}
    stray = [
        name
        for name, value in options.items()
        if name not in mine and name not in theirs and (name not in neutral or value != neutral[name])
    ]
    if stray:
        taken = (
            f"is taken neither by structure {structure!r} (options: {sorted(mine) or 'none'}) nor by estimator "
            f"{estimator!r} (options: {sorted(theirs) or 'none'})"
        )
        raise UnknownOption(stray[0], taken, [*mine, *theirs, *SETTINGS], options[stray[0]])
    return (
        make_structure(structure, **{k: v for k, v in options.items() if k in mine}),
        make_estimator(estimator, **{k: v for k, v in options.items() if k in theirs}),
    )


def _accepted(rule: Any, registry: Registry[Any]) -> dict[str, Any]:
    """Option names and defaults of a registered entry (none for an object that is made already)."""
    return dict(_arguments(registry[rule])) if isinstance(rule, str) else {}


@functools.cache  # the signature of a class does not change, and reading it takes longer than a small network's fit
def _arguments(rule: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(rule).parameters.items()}


@lasting()
def ggn_vector_product(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Tensor],
    v: Tensor,
    *,
    parameters: str | Sequence[str] = "all",
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
    weights: weighting.Weights = False,
) -> Tensor:
    """Exact product of the mean Gauss-Newton matrix with ``v`` (methods 2.7): ``(P,) -> (P,)``, ``(P, K) -> (P, K)``.

    ``parameters`` are ``"all"``, ``"last_layer"`` or name patterns; all columns of ``v`` share one pass over the data.

    Raises:
        ShapeMismatch: if ``v`` does not have one entry or row per selected parameter, or the data are empty.
    """

    read = reading(forward, inputs, targets)
    return _products(model, likelihood, data, v, parameters, read, weights, Pass.ggn_rows)


@lasting()
def hessian_vector_product(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Tensor],
    v: Tensor,
    *,
    parameters: str | Sequence[str] = "all",
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
    weights: weighting.Weights = False,
) -> Tensor:
    """Exact product of the Hessian of the mean negative log-likelihood with ``v`` (methods 2.7).

    ``v`` is ``(P,)`` or ``(P, K)``, and so is the product; ``parameters`` are ``"all"``, ``"last_layer"`` or name
    patterns. All columns of ``v`` share one pass over the data.

    Raises:
        ShapeMismatch: if ``v`` does not have one entry or row per selected parameter, or the data are empty.
    """

    read = reading(forward, inputs, targets)
    return _products(model, likelihood, data, v, parameters, read, weights, Pass.hessian_rows)


def _products(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Tensor],
    v: Tensor,
    parameters: str | Sequence[str],
    forward: Forward | None,
    weighted: weighting.Weights,
    product: Callable[[Pass, Tensor], Tensor],
) -> Tensor:
    """The mean of a product over data, in the form of ``v``: ``(P,)`` or ``(P, K)``."""
    rows: list[Tensor] = []

    def visit(seen: Pass) -> None:
        found = product(seen, columns_of(v, seen.layout)).to(v)
        rows[:] = [found if not rows else rows[0] + found]

    read = weighting.reader(forward, weighted)
    rule = get_likelihood(likelihood)
    _, count = walk(model, rule, data, visit, parameters=parameters, forward=read, weights=weighted)
    mean = rows[0] / count
    return mean[0] if v.dim() == 1 else mean.T
