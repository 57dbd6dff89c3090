"""Parameter groups: which parameters take second-order steps, and the plain rule for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.tape.select import select

__all__ = ["first_order_step", "make_groups"]


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
        UnsupportedLayer: if no parameter is left for second-order steps.
    """
    named = dict(model.named_parameters())
    left = select(model, parameters)
    made = []
    for group in groups:
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
