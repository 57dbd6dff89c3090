"""Networks that are a chain of linear maps and elementwise activations on rows ``(N, d)``.

For these the backward pass is a few matrix products. That is what KFRA's recursion needs (methods 4.2), and it lets
the engine send gathered (example, column) rows back through one forward pass, which autograd cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.tape.tape import Call, Step, Tape

__all__ = ["Chain", "ChainLink", "OnStep", "Slope", "derivative", "second_derivative", "slope_between"]

OnStep = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], "Tensor | None"]
"""What is kept of a function call, of its argument's shape; ``None`` for functions that are not elementwise."""

_NAMES = (
    "relu relu_ tanh tanh_ sigmoid sigmoid_ gelu silu silu_ mish elu elu_ selu selu_ celu softplus leaky_relu "
    "leaky_relu_ hardtanh relu6 hardswish hardsigmoid logsigmoid softsign tanhshrink softshrink hardshrink exp sin "
    "cos square neg erf"
)
ELEMENTWISE: set[Any] = {
    getattr(owner, name)
    for owner in (F, torch, torch.Tensor, torch._C._nn)
    for name in _NAMES.split()
    if hasattr(owner, name)
}
_RELU = {getattr(o, n) for o in (F, torch, torch.Tensor) for n in ("relu", "relu_") if hasattr(o, n)}


def _sigmoid_slope(h: Tensor) -> Tensor:
    value = torch.sigmoid(h)
    return value * (1 - value)


def _tanh_slope(h: Tensor) -> Tensor:
    return 1 - torch.tanh(h).square()


# the usual ones in fewer passes than autograd needs
_CLOSED: dict[Any, Callable[[Tensor], Tensor]] = {
    **{o.sigmoid: _sigmoid_slope for o in (F, torch, torch.Tensor)},
    **{o.tanh: _tanh_slope for o in (F, torch, torch.Tensor)},
}
# the same at the result, which costs a pass less still
_AT_RESULT: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: lambda y: (y > 0).to(y.dtype),
    torch.tanh: lambda y: 1 - y.square(),
    torch.sigmoid: lambda y: y * (1 - y),
}
RESHAPE: set[Any] = {
    torch.flatten, torch.Tensor.flatten, torch.Tensor.reshape, torch.reshape, torch.Tensor.view,
    torch.Tensor.contiguous, torch.Tensor.clone,
}  # fmt: skip


def derivative(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``φ'(h)`` of an elementwise function at its argument, the shape of ``h``; ``None`` for any other function."""
    if function not in ELEMENTWISE:
        return None
    h = args[0] if args else kwargs.get("input")
    if not isinstance(h, Tensor) or not h.is_floating_point() or not h.requires_grad:
        return None
    if function in _RELU:
        return (h.detach() > 0).to(h.dtype)  # as numbers: multiplying by booleans converts them each time
    closed = _CLOSED.get(function)
    if closed is not None:
        return closed(h.detach())
    others = {name: value for name, value in kwargs.items() if name != "input"}
    try:
        with torch.enable_grad():
            leaf = h.detach().clone().requires_grad_()
            value = function(leaf.clone(), *args[1:], **others)
            return torch.autograd.grad(value.sum(), leaf)[0]
    except RuntimeError:  # inside a function transform, or not differentiable here: then it is no chain link
        return None


class Slope:
    """What is kept of an activation, ``(N, d)``: numbers, or what they are made from once it is known of which rows.

    Args:
        given: the numbers, or what ``make`` takes; does not change any more.
        make: a function of single entries; ``None`` for the identity.
    """

    def __init__(self, given: Tensor, make: Callable[[Tensor], Tensor] | None = None) -> None:
        self._given, self._make = given, make

    def whole(self) -> Tensor:
        """All rows ``(N, d)``."""
        if self._make is not None:
            self._given, self._make = self._make(self._given), None
        return self._given

    def rows(self, rows: Tensor) -> Tensor:
        """Those of the examples ``rows (M,)``, which may come again: ``(M, d)``."""
        picked = self._given.index_select(0, rows)
        return picked if self._make is None else self._make(picked)


def slope_between(function: Callable[..., Any], x: Tensor, result: Tensor, kwargs: Mapping[str, Any]) -> Slope | None:
    """As :func:`derivative` at an argument ``x``, where ``result`` of its shape is known and stays as it is."""
    known = _AT_RESULT.get(function)
    if known is not None:
        return Slope(result.detach(), known)
    found = derivative(function, (x,), kwargs)
    return None if found is None else Slope(found)


def second_derivative(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``φ''(h)`` of an elementwise function at its argument, the shape of ``h``; ``None`` for any other function.

    Away from the kinks of piecewise linear functions, where it is 0 (methods 2.3, 2.4).
    """
    if derivative(function, args, kwargs) is None:
        return None
    h = args[0] if args else kwargs["input"]
    others = {name: value for name, value in kwargs.items() if name != "input"}
    try:
        with torch.enable_grad():
            leaf = h.detach().clone().requires_grad_()
            value = function(leaf.clone(), *args[1:], **others)
            (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            if not first.requires_grad:
                return torch.zeros_like(leaf)
            found = torch.autograd.grad(first.sum(), leaf, allow_unused=True, materialize_grads=True)
            return found[0].detach()
    except RuntimeError:  # no second derivative
        return None


@dataclass
class ChainLink:
    """One link: a linear map (``weight (O, I)``, with its ``call`` if tracked) or an activation (its ``slope``)."""

    weight: Tensor | None = None
    call: Call | None = None
    slope: Slope | None = None


class Chain:
    """The links of a forward pass, from the network's input to its output.

    Args:
        tape: a tape that recorded its steps with :func:`derivative` as ``on_step``.
        outputs: the network's output ``(N, C)``.

    Raises:
        UnsupportedLayer: if the network is not such a chain; names the function and the layer around it.
    """

    def __init__(self, tape: Tape, outputs: Tensor) -> None:
        # a function that hands its argument through (dropout in eval mode) is no link
        by_output = {s.output_key: index for index, s in enumerate(tape.steps) if s.output_key != s.source_key}
        links: list[ChainLink] = []
        key = (id(outputs), outputs._version)
        seen: list[Call] = []
        while True:
            index = by_output.get(key)
            if index is None:
                break
            step = tape.steps[index]
            link = self._link(step, tape, index)
            if link is not None:
                links.append(link)
                if link.call is not None:
                    seen.append(link.call)
            if step.source is None or not step.source.requires_grad:
                break
            key = step.source_key
        names = [name for call in tape.calls for name in call.names]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise UnsupportedLayer(_refusal(f"parameter {repeated[0]!r} is used more than once"))
        if len(seen) != len(tape.calls) or tape.opaque:
            strays = [c.key[0] for c in tape.calls if all(c is not s for s in seen)] + list(tape.opaque)
            raise UnsupportedLayer(_refusal(f"parameter {strays[0]!r} does not lie on one chain from input to output"))
        self.links = links[::-1]

    @classmethod
    def along(cls, links: Sequence[ChainLink]) -> Chain:
        """The chain of these links, in the order in which they ran, each parameter in one of them."""
        chain = object.__new__(cls)
        chain.links = list(links)
        return chain

    def _link(self, step: Step, tape: Tape, index: int) -> ChainLink | None:
        if step.function is F.linear and isinstance(step.source, Tensor) and step.source.dim() == 2:
            weight = step.args[1] if len(step.args) > 1 else step.kwargs["weight"]
            return ChainLink(weight=weight.detach(), call=step.call)
        if step.before is not None and step.output.dim() == 2:
            return ChainLink(slope=Slope(step.before))
        rows_kept = (
            step.source is not None and step.output.dim() == 2 and step.source.shape[:1] == step.output.shape[:1]
        )
        if step.function in RESHAPE and rows_kept:
            return None
        name = getattr(step.function, "__name__", str(step.function))
        around = [c.key[0] for c in (s.call for s in tape.steps[: index + 1]) if c is not None]
        own = step.call.key[0] if step.call is not None else None
        where = f"module {own.rpartition('.')[0]!r}" if own else f"after {around[-1]!r}" if around else "at the input"
        raise UnsupportedLayer(_refusal(f"function {name!r} ({where}) on shape {tuple(step.output.shape)}"))

    def part(self, rows: Tensor) -> Chain:
        """The chain of the examples ``rows (M,)`` alone."""
        other = copy.copy(self)
        other.links = [
            ChainLink(
                link.weight,
                None if link.call is None else link.call.part(rows),
                None if link.slope is None else Slope(link.slope.rows(rows)),
            )
            for link in self.links
        ]
        return other

    def backward(self, columns: Tensor, example: Tensor | None = None) -> list[tuple[Call, Tensor]]:
        """Back-propagates columns.

        Args:
            columns: ``(V, N, C)``, or gathered rows ``(1, M, C)`` whose examples are ``example (M,)``.

        Returns:
            For every tracked linear map, from the output backwards, its call and its columns ``(V, N, O)``.
        """
        found: list[tuple[Call, Tensor]] = []
        remaining = sum(link.call is not None for link in self.links)
        g, fresh = columns, False
        for link in reversed(self.links):
            if link.weight is not None:
                if link.call is not None:
                    found.append((link.call, g))
                    remaining -= 1
                    fresh = False
                if remaining == 0:
                    break
                g, fresh = torch.matmul(g.to(link.weight.dtype), link.weight), True  # autocast mixes types
            else:
                assert link.slope is not None
                slope = link.slope.whole() if example is None else link.slope.rows(example)
                g = g.mul_(slope) if fresh else g * slope  # columns already handed out must not change
        return found

    def push(self, directions: Mapping[str, Tensor]) -> Tensor | None:
        """Jacobian products ``J u`` along the chain, without another forward pass (methods 2.7).

        Args:
            directions: ``(K, *shape)`` by the names of tracked parameters.

        Returns:
            ``(K, N, C)``; ``None`` if no direction lies on the chain.
        """
        tangent: Tensor | None = None
        for link in self.links:
            if link.weight is not None:
                terms = [] if tangent is None else [torch.matmul(tangent, link.weight.T)]
                for role, portion in ({} if link.call is None else link.call.portions).items():
                    if portion.name not in directions:
                        continue
                    assert link.call is not None
                    along = directions[portion.name].flatten(1)[:, portion.start : portion.stop]
                    if role == "bias":
                        # alone it is the first term, which the others are added to
                        terms.append(along[:, None] if terms else along[:, None].repeat(1, link.call.shape[0], 1))
                        continue
                    out, inp = link.weight.shape
                    along = along.reshape(-1, inp, out) if portion.transposed else along.reshape(-1, out, inp).mT
                    terms.append(torch.matmul(link.call.input(), along))
                tangent = _added(terms) if terms else None
            elif tangent is not None:
                assert link.slope is not None
                tangent = tangent.mul_(link.slope.whole())
        return tangent


def _added(terms: Sequence[Tensor]) -> Tensor:
    """The sum of terms of broadcastable shapes, in place of the first, which is new and has the full shape."""
    total = terms[0]
    for term in terms[1:]:
        total = total.add_(term)
    return total


def _refusal(what: str) -> str:
    return (
        f"the network is not a chain of linear maps and elementwise activations: {what}. "
        'Use estimator="exact", "importance", "sampled" or "projection", which have no such limit.'
    )
