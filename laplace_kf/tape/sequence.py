"""One forward pass along a model whose types say what it does (:mod:`laplace_kf.sequences`), without a tape.

What a tape, its check against autograd and the pass that watches for parameters reached in another way would find out
is known there: every module is called once, on the result of the one before. So they are left out, which for a small
network is most of the time of a fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from laplace_kf import sequences
from laplace_kf.layers.base import RULES, BoundCall
from laplace_kf.layers.linear import LINEAR
from laplace_kf.models import autocasting
from laplace_kf.tape.blocks import Block, FlatLayout
from laplace_kf.tape.chain import ChainLink, slope_between
from laplace_kf.tape.plan import plan
from laplace_kf.tape.tape import Call, Portion

__all__ = ["SequencePass", "blocks_along", "run_along"]


class SequencePass(NamedTuple):
    """What one pass left.

    Attributes:
        outputs: ``(N, C)``, part of the autograd graph.
        order: all parameter names in the order of use.
        links: of the chain, from the first whose result depends on a parameter that requires a gradient; their calls
            name all parameters.
    """

    outputs: Tensor
    order: list[str]
    links: list[ChainLink]

    def calls(self, keep: Collection[str]) -> list[Call]:
        """The calls that read one of these parameters; the links keep no others, and of these only the kept names."""
        found = []
        for link in self.links:
            if link.call is None:
                continue
            link.call.portions = {role: p for role, p in link.call.portions.items() if p.name in keep}
            if link.call.portions:
                found.append(link.call)
            else:
                link.call = None
        return found


def run_along(model: nn.Module, x: Any, values: Mapping[str, Tensor]) -> SequencePass | None:
    """Runs the model on inputs ``(N, ...)`` if it is such a sequence and they are rows to it; else ``None``.

    Args:
        model: in eval mode.
        x: the inputs as the model takes them; not changed.
        values: what stands in the place of some parameters, by name, each of its parameter's shape.
    """
    if type(x) is not Tensor or not x.is_floating_point() or x.requires_grad or x.is_inference():
        return None
    sequence = sequences.read(model)
    if sequence is None or autocasting() or RULES.get(LINEAR.functions[0]) is not LINEAR:
        return None
    order: list[str] = []
    links: list[ChainLink] = []
    for link in sequence.links:
        own = {role: (name, values.get(name, p)) for role, (name, p) in link.parameters.items()}
        if own:
            weight = own["weight"][1]
            if x.dim() != 2 or x.dtype != weight.dtype or x.shape[1] != weight.shape[1] or x.device != weight.device:
                return None  # torch says what is wrong with it
            result = F.linear(x, weight, own["bias"][1] if "bias" in own else None)
        else:
            result = link.module(x)
        if not x.requires_grad:
            links = []  # what lies before depends on no such parameter
        if own:
            order.extend(name for name, _ in own.values())
            links.append(ChainLink(weight=weight.detach(), call=_call(own, x, result)))
        elif x.requires_grad and link.activation is not None:  # on rows, and so is whatever follows a linear map
            slope = slope_between(link.activation[0], x, result, link.activation[1])
            if slope is None:
                return None
            links.append(ChainLink(slope=slope))
        x = result
    return SequencePass(x, order, links) if x.dim() == 2 and len(x) else None


def _call(own: Mapping[str, tuple[str, Tensor]], x: Tensor, result: Tensor) -> Call | None:
    portions = {
        role: Portion(name, 0, parameter.numel()) for role, (name, parameter) in own.items() if parameter.requires_grad
    }
    if not portions:
        return None
    values = {"input": x, "weight": own["weight"][1], "bias": own["bias"][1] if "bias" in own else None}
    return Call(LINEAR, BoundCall(values), portions, get_gradient_edge(result), result.shape, 1, x._version)


_Key = tuple[tuple[tuple[int, ...], tuple[tuple[str, Portion], ...]], ...]


def blocks_along(calls: Sequence[Call], layout: FlatLayout) -> list[Block]:
    """The blocks of the parameters that these calls read: :func:`plan` of them, a function of names and shapes."""
    key = tuple((tuple(call.bound["weight"].shape), tuple(call.portions.items())) for call in calls)
    return list(_blocks(key, layout))


@lru_cache(maxsize=64)
def _blocks(key: _Key, layout: FlatLayout) -> tuple[Block, ...]:
    calls = []
    for shape, portions in key:
        weight = torch.empty(shape, device="meta", requires_grad=True)
        bound = BoundCall({"input": None, "weight": weight, "bias": None})
        calls.append(Call(LINEAR, bound, dict(portions), get_gradient_edge(weight), weight.shape, 1, 0))
    named = {n: torch.empty(shape, device="meta") for n, shape in zip(layout.names, layout.shapes, strict=True)}
    blocks, example_wise = plan(calls, {}, layout, named)
    assert not example_wise
    return tuple(blocks)
