"""What an influence is an influence on: functions of the outputs, as columns to send back through the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from laplace_kf.batches import map_examples
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import Bernoulli, Categorical, Likelihood
from laplace_kf.outputs.weighted import bare
from laplace_kf.registry import Registry

__all__ = ["OF", "Value", "columns_of", "loss_columns", "margin", "spread"]

Value = Callable[[Tensor, Any], Tensor]
"""A function of outputs ``(Q, ...)`` and targets that gives one number a query, ``(Q,)``."""
Columns = Callable[[Likelihood, Tensor, Any], Tensor]
TOLERANCE = 1e-4  # up to which the value of a query alone may differ from its value beside others

OF: Registry[Columns] = Registry("attributed value")


@OF.register("loss")
def loss_columns(likelihood: Likelihood, outputs: Tensor, targets: Any) -> Tensor:
    """``∇_z (−log p(y | z))``, of the outputs' shape ``(N, ...)``; zero where targets are ignored."""
    return -likelihood.score(outputs, targets)


@OF.register("margin")
def _margin_columns(likelihood: Likelihood, outputs: Tensor, targets: Any) -> Tensor:
    return -_gradient(lambda z: margin(likelihood, z, bare(targets)), outputs)


@singledispatch
def margin(likelihood: Likelihood, outputs: Tensor, targets: Any) -> Tensor:
    """``log p / (1 − p)`` of the targets, summed over the positions of an example, ``(N,)``.

    Args:
        likelihood: of labels.
        outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
        targets: labels; ignored ones add 0.

    Raises:
        IncompatiblePair: for a likelihood without labels, or targets that are probabilities.
    """
    raise IncompatiblePair(
        f'of="margin" is log p/(1-p) of a label, which {type(likelihood).__name__} does not have; use of="loss", or a '
        "function of=lambda outputs, targets: outputs[:, 0]"
    )


@margin.register
def _(likelihood: Categorical, outputs: Tensor, targets: Any) -> Tensor:
    z = likelihood.to_positions(outputs)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() != z.shape[0] * z.shape[1]:
        raise IncompatiblePair(
            'of="margin" needs one label for every position, not probabilities; use of="loss", or a function of '
            "outputs and targets"
        )
    labels = targets.reshape(z.shape[:2])
    keep = torch.ones_like(labels, dtype=torch.bool)
    if likelihood.ignore_index is not None:
        keep = labels != likelihood.ignore_index
    labels = torch.where(keep, labels, 0)[..., None]
    own = z.gather(2, labels)[..., 0]
    others = z.scatter(2, labels, -torch.inf).logsumexp(2)  # exact also where p is 1 up to rounding
    return torch.where(keep, own - others, 0).sum(1)


@margin.register
def _(likelihood: Bernoulli, outputs: Tensor, targets: Any) -> Tensor:
    z = likelihood.to_positions(outputs)
    y = likelihood.to_positions(targets.reshape(outputs.shape)).to(z)
    keep = torch.ones_like(y, dtype=torch.bool)
    if likelihood.ignore_index is not None:
        keep = y != likelihood.ignore_index
    if bool((keep & (y != 0) & (y != 1)).any()):
        raise IncompatiblePair('of="margin" needs labels 0 and 1, not probabilities; use of="loss"')
    return torch.where(keep, (2 * y - 1) * z, 0).sum((1, 2))


def columns_of(of: str | Value, likelihood: Likelihood, outputs: Tensor, targets: Any) -> Tensor:
    """The column to send back for every query, of the outputs' shape: its product with ``Λ⁻¹ g_i`` is the influence.

    Args:
        of: ``"loss"``, ``"margin"`` or a function of outputs and targets.
        likelihood: of the posterior.
        outputs: ``(Q, ...)``, off the graph.
        targets: as the likelihood takes them.

    Raises:
        UnknownName: for another name.
        IncompatiblePair: for a value that this likelihood does not have.
        ShapeMismatch: if the function does not give one number a query, of its own outputs alone.
        NonFinite: if its gradient is not finite.
    """
    if isinstance(of, str):
        return OF[of](likelihood, outputs, targets)
    if not callable(of):
        raise UnknownName("attributed value", of, OF)
    plain = bare(targets)
    found = -_gradient(lambda z: _valued(of, z, plain), outputs)
    if not torch.isfinite(found).all():
        raise NonFinite(
            "the gradient of the function given as of= is not finite at the outputs of the queries; check the "
            "function there"
        )
    return found


def _valued(of: Value, z: Tensor, targets: Any) -> Tensor:
    value = of(z, targets)
    if not isinstance(value, Tensor) or value.shape != z.shape[:1]:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeMismatch(
            f"the function given as of= must return one number for each of the {z.shape[0]} queries, it returned {what}"
        )
    count = z.shape[0]
    if count > 1:
        with torch.no_grad():
            first, rest = map_examples((z.detach(), targets), count, lambda t: t[:1])
            alone, beside = of(first, rest), value.detach()[:1]
        if bool((alone - beside).abs().max() > TOLERANCE * beside.abs().max().clamp_min(1)):
            raise ShapeMismatch(
                "the function given as of= gives a query another value alone than beside others "
                f"({float(alone[0]):.6g} and {float(beside[0]):.6g}); it has to be a function of each query's own "
                "outputs (sum over outputs[n], not over the batch)"
            )
    return value


def _gradient(value: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        found = value(leaf)
        if not found.requires_grad:
            raise ShapeMismatch("the function given as of= does not depend on the outputs; use no detach() in it")
        return torch.autograd.grad(found.sum(), leaf, materialize_grads=True)[0]


def spread(likelihood: Likelihood, columns: Tensor, outputs: Tensor) -> Tensor:
    """One column for every position: ``(T, N, ...)``, of which column ``t`` is zero except at position ``t``.

    Args:
        likelihood: whose reading of positions it is.
        columns: ``(N, ...)``, of the outputs' shape.
        outputs: ``(N, ...)``.

    Raises:
        ShapeMismatch: for outputs without positions.
    """
    if outputs.dim() < 3:
        raise ShapeMismatch(
            f"tokens= attributes positions of sequences, and outputs {tuple(outputs.shape)} have none; leave it out"
        )
    rows = likelihood.to_positions(columns)  # (N, T, C)
    apart = torch.diag_embed(rows.movedim(1, -1)).permute(3, 0, 2, 1)  # (N, C, T, T) -> (T, N, T, C)
    return likelihood.from_positions(apart, outputs)
