"""Curvature without a posterior: mean Gauss-Newton matrices in any structure, and exact products.

All curvature is of the per-example negative log-likelihood, summed over that example's outputs or positions, and
averaged over the data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_kf.agreement import require_same_loss
from laplace_kf.batches import Forward, as_batches, check_finite, run, to_device
from laplace_kf.engine import Statistics, collect, preserved
from laplace_kf.errors import ShapeMismatch, UnknownOption
from laplace_kf.estimators import ESTIMATORS, Estimator
from laplace_kf.graphs import check_ignored
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.lookups import Plainly
from laplace_kf.models import usable
from laplace_kf.operators import fresh_generator
from laplace_kf.outputs.arranged import decided
from laplace_kf.reading import Part, reading
from laplace_kf.registry import Registry
from laplace_kf.structures import STRUCTURES, Structure
from laplace_kf.subnetwork import Selection, covered
from laplace_kf.tape import UNUSED, FlatLayout, select
from laplace_kf.tape.blocks import flat_layout

__all__ = ["Statistics", "estimate", "ggn_vector_product", "hessian_vector_product", "make_estimator", "make_structure"]


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
    layout: str | None = None,
    unused: str = "error",
    **options: Any,
) -> Statistics:
    """Curvature statistics of a model over data (methods 4).

    Args:
        model: trained module; left exactly as it is.
        likelihood: registered name or object.
        data: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``.
        structure: ``"diag"``, ``"kron"``, ``"ekfac"``, ``"lowrank"`` (``rank=``), ``"layer"``, ``"full"``,
            ``"isotropic"`` or ``"auto"``; ``"ekfac"`` and ``"lowrank"`` go over the data twice.
        estimator: ``"exact"``, ``"sampled"`` (``samples=``), ``"projection"`` (``samples=``, ``noise=``),
            ``"importance"`` (``columns=``), ``"recursive"``, ``"empirical"``.
        parameters: ``"all"``, ``"last_layer"``, a list of name patterns, or a :class:`Subnetwork` of single weights.
        inputs, targets: functions of a batch of another form, with ``outputs = model(*inputs(batch))``.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``.
        generator: random numbers of the estimator; a fresh private one by default.
        dtype: type of the sums; default: the model's, float32 at least.
        layout: where the channel of the outputs stands (``likelihood.with_layout``): ``"channels_first"`` or
            ``"channels_last"``; default: as the targets show.
        unused: what becomes of selected parameters that took no part in any forward pass: ``"error"``, or ``"prior"``:
            their curvature is 0.
        **options: options of the estimator or the structure.

    Returns:
        Statistics with ``n_data``, ``+``, ``scale(c)``, ``mean()`` (``C̄``, a Matrix ``(P, P)``) and ``total()``.

    Raises:
        UnknownName, UnsupportedLayer, ShapeMismatch, NonFinite, IncompatiblePair: see :mod:`laplace_kf.errors`.
    """
    model = usable(model)
    structure, estimator = make_pair(structure, estimator, options)
    generator = generator if generator is not None else fresh_generator()
    _ = UNUSED[unused]
    settings: dict[str, Any] = {
        "forward": reading(forward, inputs, targets), "generator": generator, "dtype": dtype, "unused": unused,
    }  # fmt: skip
    rule = get_likelihood(likelihood)
    job = (model, as_batches(data, model), rule if layout is None else rule.with_layout(layout), estimator)
    names, structure = covered(parameters, structure, *job, **settings)
    return collect(*job, structure, parameters=names, **settings)


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
            f"neither by structure {structure!r} (options: {sorted(mine) or 'none'}) nor by estimator {estimator!r} "
            f"(options: {sorted(theirs) or 'none'})"
        )
        raise UnknownOption(stray[0], taken, [*mine, *theirs, *SETTINGS])
    return (
        make_structure(structure, **{k: v for k, v in options.items() if k in mine}),
        make_estimator(estimator, **{k: v for k, v in options.items() if k in theirs}),
    )


def _accepted(rule: Any, registry: Registry[Any]) -> dict[str, Any]:
    """Option names and defaults of a registered entry (none for an object that is made already)."""
    if not isinstance(rule, str):
        return {}
    return {name: parameter.default for name, parameter in inspect.signature(registry[rule]).parameters.items()}


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
) -> Tensor:
    """Exact product of the mean Gauss-Newton matrix with ``v`` (methods 2.7): ``(P,) -> (P,)``.

    Raises:
        ShapeMismatch: if ``v`` does not have one entry per selected parameter, or the data are empty.
    """

    def product(
        rule: Likelihood, outputs: Tensor, targets: Any, weights: list[Tensor], direction: list[Tensor]
    ) -> list[Tensor]:
        seed = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, weights, seed, create_graph=True, allow_unused=True)
        used = [(p, d) for p, d in zip(pulled, direction, strict=True) if p is not None]
        (pushed,) = torch.autograd.grad([p for p, _ in used], seed, [d for _, d in used])  # J v, by double backward
        with torch.no_grad():
            curved = rule.curvature_product(outputs.detach(), pushed[None], targets)[0].to(outputs.dtype)
        grads = torch.autograd.grad(outputs, weights, curved, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]

    return _products(model, get_likelihood(likelihood), data, v, parameters, reading(forward, inputs, targets), product)


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
) -> Tensor:
    """Exact product of the Hessian of the mean negative log-likelihood with ``v`` (methods 2.7): ``(P,) -> (P,)``.

    Raises:
        ShapeMismatch: if ``v`` does not have one entry per selected parameter, or the data are empty.
    """

    def product(
        rule: Likelihood, outputs: Tensor, targets: Any, weights: list[Tensor], direction: list[Tensor]
    ) -> list[Tensor]:
        loss = -rule.log_prob(outputs, targets).sum()
        grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        used = [(g, d) for g, d in zip(grads, direction, strict=True) if g is not None and g.requires_grad]
        if not used:
            return [torch.zeros_like(w) for w in weights]
        along = torch.stack([(g * d).sum() for g, d in used]).sum()
        second = torch.autograd.grad(along, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, second, strict=True)]

    return _products(model, get_likelihood(likelihood), data, v, parameters, reading(forward, inputs, targets), product)


def _products(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Tensor],
    v: Tensor,
    parameters: str | Sequence[str],
    forward: Forward | None,
    product: Callable[[Likelihood, Tensor, Any, list[Tensor], list[Tensor]], list[Tensor]],
) -> Tensor:
    model = usable(model)
    named = dict(model.named_parameters())
    if parameters == "last_layer":
        raise ShapeMismatch('products take parameters="all" or name patterns, not "last_layer"')
    layout: FlatLayout = flat_layout(named, select(model, parameters))
    if v.shape != (layout.size,):
        raise ShapeMismatch(f"expected v of shape ({layout.size},), got {tuple(v.shape)}")
    weights: list[Tensor] = [named[name] for name in layout.names]
    direction = [part[0] for part in layout.split(v[None]).values()]
    total, count = torch.zeros_like(v), 0
    # fused attention kernels have no second derivative
    with preserved(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for index, batch in enumerate(as_batches(data, model)):
            check_finite(batch, index, "the batch")
            if index == 0:
                require_same_loss(model, to_device(batch, weights[0].device), forward, likelihood)
            with Plainly():  # its derivatives are those of the function
                outputs, targets = run(model, to_device(batch, weights[0].device), forward)
            check_ignored(batch, targets, likelihood, forward)
            likelihood = decided(likelihood, outputs, targets)
            likelihood.check(outputs.detach(), targets)
            parts = product(likelihood, outputs, targets, weights, direction)
            total = total + torch.cat([part.detach().reshape(-1) for part in parts])
            count += likelihood.counted_examples(outputs.detach(), targets)
    if count == 0:
        raise ShapeMismatch("the data are empty: no batch was yielded, or all targets are ignored")
    return total / count
