"""Parameter groups: which take second-order steps, the plain rule for the others, and what none of them takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import conventions
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownOption, UnsupportedLayer
from laplace_kf.tape.select import select

__all__ = ["first_order_step", "hooks_that_change", "make_groups", "require_trained", "require_unmerged"]

KEYS = ("params", "lr", "first_order", "momentum")


def make_groups(
    model: nn.Module, parameters: str | Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Param groups for :class:`torch.optim.Optimizer`, with parameter names.

    Args:
        model: the module.
        parameters: what is optimised at all: ``"all"`` trainable parameters, or name patterns.
        groups: ``{"params": name patterns, ...}`` with any of ``lr``, ``first_order`` and ``momentum``; a parameter
            belongs to the first group that matches, all that are left to one group with the defaults.

    Raises:
        UnknownName: for a pattern that matches nothing.
        UnknownOption: for another key.
        IncompatiblePair: for a momentum of second-order steps.
        UnsupportedLayer: if no parameter is left for second-order steps.
    """
    named = dict(model.named_parameters())
    left = select(model, parameters)
    made = []
    for group in groups:
        _check_keys(group)
        patterns = group["params"]
        hits = select(model, [patterns] if isinstance(patterns, str) else list(patterns))
        chosen = [name for name in left if name in hits]
        left = [name for name in left if name not in hits]
        if chosen:
            made.append({**group, "params": [(name, named[name]) for name in chosen]})
    if left:
        made.insert(0, {"params": [(name, named[name]) for name in left]})
    if all(group.get("first_order", False) for group in made):
        raise UnsupportedLayer("no parameter is left for second-order steps: every group is first_order; use SGD then")
    return made


def _check_keys(group: Mapping[str, Any]) -> None:
    stray = [key for key in group if key not in KEYS]
    if stray:
        raise UnknownOption(
            stray[0], f"is taken by no group of parameters (keys: {', '.join(KEYS)})", KEYS, group[stray[0]],
            "l2= of the optimiser, which is one for all groups" if stray[0] in ("weight_decay", "l2") else None,
        )  # fmt: skip
    if group.get("momentum") and not group.get("first_order"):
        raise IncompatiblePair(
            f"momentum={group['momentum']!r} of a group is that of plain steps, with first_order=True; second-order "
            "steps have momentum=True of the optimiser, for all groups"
        )


def require_trained(named: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Raises :class:`ShapeMismatch` for a parameter (of any shape) that was frozen since the optimiser was made."""
    frozen = [name for name in names if not named[name].requires_grad]
    if frozen:
        more = f" (and {len(frozen) - 1} more)" if len(frozen) > 1 else ""
        raise ShapeMismatch(
            f"parameter {frozen[0]!r}{more} was frozen (requires_grad=False) after the optimiser was made for it; make "
            "a new optimiser for those that are still trained, or freeze it by the rate of a group of its own, "
            f'groups=[{{"params": "{frozen[0]}", "first_order": True, "lr": 0.0}}]'
        )


def require_unmerged(model: nn.Module, names: Sequence[str]) -> None:
    """Refuses parameters without a gradient whose adapter is merged: steps would take them, and not the weights.

    Raises:
        UnsupportedLayer: names the first of them, and the way back.
    """
    merged = conventions.merged_away(model, names)
    if merged:
        raise UnsupportedLayer(
            f"{len(merged)} parameters, {merged[0]!r} the first of them, take no part in the outputs any more, as "
            f"their adapter is merged into the weights: put it back{conventions.adapter_lines(model, merged)}"
        )


def hooks_that_change(
    loss: Tensor, named: Mapping[str, Tensor], grads: Mapping[str, Tensor | None], keep: bool
) -> list[str]:
    """Parameters whose own hooks make other gradients of a loss.

    Args:
        loss: 0-dim.
        named: parameters by name, of any shapes.
        grads: what the hooks made.
        keep: the loss's graph is used again.
    """
    names = [name for name, grad in grads.items() if named[name]._backward_hooks and grad is not None]
    if not names:
        return []
    hooks = [named[name]._backward_hooks for name in names]
    try:
        for name in names:
            named[name]._backward_hooks = None
        plain = torch.autograd.grad(loss, [named[name] for name in names], retain_graph=keep)
    finally:
        for name, own in zip(names, hooks, strict=True):
            named[name]._backward_hooks = own
    pairs = ((name, grads[name], true) for name, true in zip(names, plain, strict=True))
    return [name for name, found, true in pairs if found is None or not torch.equal(found.to_dense(), true.to_dense())]


@torch.no_grad()
def first_order_step(group: Mapping[str, Any], state: Mapping[Any, dict[str, Any]]) -> None:
    """Heavy ball on the parameters of one group, whatever their shapes: ``v ← μ v − lr ∇; θ ← θ + v`` (methods 8.1)."""
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        velocity: Tensor = state[parameter].get("velocity", torch.zeros_like(parameter))
        velocity = group["momentum"] * velocity - group["lr"] * parameter.grad
        state[parameter]["velocity"] = velocity
        parameter.add_(velocity)
