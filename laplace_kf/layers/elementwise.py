"""Parameters that act elementwise: ``x + b``, ``w * x``, a class token or position table that is repeated per example.

The trailing axes of the result are those of the parameter; all axes before them enumerate rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace_kf.layers.base import AffineRule, BoundCall, WithParameter, functions_of, register

__all__ = ["ADDITIONS"]


def _features(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's shape without leading axes of length 1 (one axis at least)."""
    shape = list(parameter.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return tuple(shape)


class ElementwiseRule(AffineRule):
    """Shared by scale, shift and repetition."""

    role: ClassVar[str]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Collection[int] = ()) -> BoundCall:
        operands = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
        mine = [a for a in operands if isinstance(a, Tensor) and id(a) in parameters]
        others = [a for a in operands if isinstance(a, Tensor) and id(a) not in parameters]
        lonely = len(mine) == 1 and len(others) == 1
        extra = any(value != 1 for value in (*args[2:], *(v for k, v in kwargs.items() if k not in ("input", "other"))))
        return BoundCall({"input": others[0] if lonely else None, self.role: mine[0] if lonely and not extra else None})

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim() - len(_features(call[self.role]))

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        parameter = call[self.role]
        if parameter is None:
            return "an elementwise function of several parameters, or with further arguments"
        features = _features(parameter)
        if output.dim() <= len(features) or tuple(output.shape[-len(features) :]) != features:
            return "an elementwise parameter that does not span the trailing axes of the result"
        if call["input"] is not None and call["input"].shape != output.shape:
            return "an elementwise parameter on an input that is itself broadcast"
        return None

    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        return rows.flatten(1)[:, :, None]

    def outputs(self, rows: Tensor, call: BoundCall) -> Tensor:
        return rows.flatten(-len(_features(call[self.role])))[..., None]


class ScaleRule(ElementwiseRule):
    """``w * x``: ``x̂ = x``."""

    role = "weight"


class ShiftRule(ElementwiseRule):
    """``x + b``: the gradient is that of the result."""

    role = "bias"


class RepeatRule(ElementwiseRule):
    """``b.expand(N, ...)``: a class token, a learned query, an initial state."""

    role = "bias"
    keeps_memory = True

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Collection[int] = ()) -> BoundCall:
        return BoundCall({"input": None, "bias": args[0] if args and id(args[0]) in parameters else None})


def _methods(*names: str) -> tuple[Any, ...]:
    return functions_of(*((owner, name) for name in names for owner in (torch, Tensor)))


ADDITIONS = set(_methods("add", "__add__", "__radd__", "add_", "__iadd__"))


def _scaled_example() -> tuple[nn.Module, Tensor]:
    return WithParameter(lambda x, w: w * x, 3), torch.randn(5, 3)


def _shifted_example() -> tuple[nn.Module, Tensor]:
    return WithParameter(lambda x, w: x + w, 3), torch.randn(5, 2, 3)


def _repeated_example() -> tuple[nn.Module, Tensor]:
    return WithParameter(lambda x, w: torch.cat([w.expand(len(x), 1, 3), x], 1), 1, 3), torch.randn(5, 2, 3)


# in place (``x *= w``) the input is gone when the curvature needs it: that goes through per-example gradients
SCALE = register(
    ScaleRule("scale", _methods("mul", "multiply", "__mul__", "__rmul__"), ("w * x",), examples=(_scaled_example,))
)
SHIFT = register(ShiftRule("shift", tuple(ADDITIONS), ("x + b",), examples=(_shifted_example,)))
REPEAT = register(
    RepeatRule(
        "repeat", _methods("expand", "broadcast_to", "repeat"), ("b.expand(N, ...)",), examples=(_repeated_example,)
    )
)
