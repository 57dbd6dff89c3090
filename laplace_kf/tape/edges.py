"""Where the output of a layer stands in the autograd graph, also where an activation changes a view of it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from laplace_kf.layers.elementwise import ADDITIONS

__all__ = ["activates_view", "edge_of"]

_IN_PLACE = [
    "relu",
    "relu6",
    "tanh",
    "sigmoid",
    "gelu",
    "silu",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "threshold",
    "clamp",
    "clamp_min",
    "clamp_max",
    "abs",
    "mish",
    "rrelu",
]


def activates_view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> bool:
    """Whether a call was an elementwise activation that changed a view in place."""
    if not isinstance(output, Tensor) or output._base is None:
        return False
    first = args[0] if args else kwargs.get("input")
    return output is first and str(getattr(func, "__name__", "")).rstrip("_") in _IN_PLACE


def edge_of(output: Tensor, func: Callable[..., Any]) -> GradientEdge:
    """Where an output, of any shape, of a function with a rule stands in the autograd graph.

    Where it is a view of all of another tensor, that tensor: see :class:`laplace_kf.tape.tape.Call`.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    if base is None or not whole or not base.requires_grad or func in ADDITIONS or base.grad_fn is None:
        return get_gradient_edge(output)
    return get_gradient_edge(base)
