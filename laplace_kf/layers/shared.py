"""Functions that combine data with a tensor which is made of parameters alone and shared by all examples.

A relative position bias added to attention scores, a layer scale ``gamma.view(C, 1, 1) * x``, one weight per feature
(``x[..., None] * W``), a learned query in a cross product, a scalar gate, ``einsum`` or ``bmm`` with a parameter: the
tensor ``d`` is a function of parameters, and every example reads the same ``d``. If every example reads *a copy of its
own* instead, nothing changes in the forward pass, and the gradients of the copies are the gradients of single examples.

Two families of functions are told here how to read copies: those that broadcast their arguments against each other (the
copy is ``d`` expanded to the common shape), and products (the copy gets the subscript of an axis that ``d`` lacks).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_kf.layers.base import BoundCall, LayerRule, functions_of

__all__ = [
    "EXPANSIONS",
    "SHARED",
    "Copy",
    "Meeting",
    "SharedRule",
    "is_broadcast",
    "meeting",
]

_BOTH = (
    "add sub subtract rsub mul multiply div divide true_divide pow maximum minimum fmax fmin where addcmul addcdiv "
    "lerp atan2 hypot logaddexp logaddexp2 xlogy copysign"
)
_METHODS = (
    "add_ sub_ subtract_ mul_ multiply_ div_ divide_ true_divide_ pow_ addcmul_ addcdiv_ lerp_ "
    "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ "
    "__truediv__ __rtruediv__ __itruediv__ __rdiv__ __idiv__ __pow__ __rpow__ __ipow__"
)
BROADCASTS = set(
    functions_of(
        *((owner, name) for name in _BOTH.split() for owner in (torch, Tensor)),
        *((Tensor, name) for name in _METHODS.split()),
    )
)
EXPANSIONS = set(functions_of((torch, "broadcast_to"), *((Tensor, n) for n in ("expand", "expand_as", "broadcast_to"))))
MATRIX_PRODUCTS = set(
    functions_of(
        *((owner, name) for name in ("matmul", "mm", "bmm", "mv", "dot") for owner in (torch, Tensor)),
        *((Tensor, name) for name in ("__matmul__", "__rmatmul__")),
    )
)


class SharedRule(LayerRule):
    """A tensor made of parameters, of which every example reads a copy; every axis of the copies enumerates rows."""

    def leading(self, call: BoundCall, output: Tensor) -> int:
        return output.dim()


SHARED = SharedRule("shared", (), ("x * w.view(C, 1, 1)", "scores + bias_table[index]", "torch.einsum", "torch.bmm"))


@dataclass
class Copy:
    """A tensor made of parameters and its copies.

    Attributes:
        source: ``d``, of any shape.
        copies: its copies, of the shape that ``aligned`` was broadcast to.
        aligned: the shape of ``d`` with an axis of length 1 wherever a copy may differ from another.
    """

    source: Tensor
    copies: Tensor
    aligned: tuple[int, ...]


@dataclass
class Meeting:
    """A call that does what was asked for, on copies.

    Attributes:
        run: the call.
        copies: what its gradient says about single examples.
    """

    run: Callable[[], Any]
    copies: list[Copy]


def is_broadcast(function: Callable[..., Any]) -> bool:
    """Whether a function broadcasts its arguments against each other, entry by entry."""
    return function in BROADCASTS


def meeting(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mine: Collection[int]
) -> Meeting | None:
    """The call with copies of the tensors whose ids ``mine`` lists; ``None`` if the function is of neither family."""
    if "out" in kwargs:
        return None
    if function in BROADCASTS:
        return _broadcast(function, args, kwargs, mine)
    if function in EXPANSIONS:
        return _expansion(function, args, kwargs, mine)
    if function is F.scaled_dot_product_attention:
        return _attention(function, args, kwargs, mine)
    if function is F.linear:
        return _linear(args, kwargs, mine)
    terms = _einsum(args, kwargs) if function is torch.einsum else _matmul(function, args, kwargs)
    return None if terms is None else _product(*terms, mine)


def _in_place(function: Callable[..., Any]) -> bool:
    name = str(getattr(function, "__name__", ""))
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _expanded(tensor: Tensor, shape: torch.Size) -> Copy:
    aligned = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
    return Copy(tensor, tensor.expand(shape), aligned)


def _broadcast(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mine: Collection[int]
) -> Meeting | None:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if _in_place(function) and id(args[0]) in mine:
        return None
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    except RuntimeError:
        return None
    if any(id(t) in mine and t.dim() == 0 and t.dtype != other.dtype for t in tensors for other in tensors):
        return None  # a number takes the other's type, its copies would not
    copies = {id(t): _expanded(t, shape) for t in tensors if id(t) in mine}
    return _with(function, args, kwargs, copies)


def _with(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], copies: Mapping[int, Copy]
) -> Meeting:
    def put(value: Any) -> Any:
        return copies[id(value)].copies if isinstance(value, Tensor) and id(value) in copies else value

    new_args, new_kwargs = [put(a) for a in args], {name: put(value) for name, value in kwargs.items()}
    return Meeting(lambda: function(*new_args, **new_kwargs), list(copies.values()))


def _expansion(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mine: Collection[int]
) -> Meeting | None:
    source = args[0] if args else None
    if not isinstance(source, Tensor) or id(source) not in mine:
        return None
    copy = _expanded(source, function(*args, **kwargs).shape)
    return Meeting(lambda: copy.copies, [copy])


def _attention(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mine: Collection[int]
) -> Meeting | None:
    """A bias on the scores of attention, ``attn_mask (..., L, S)``."""
    call = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
    bias = call.get("attn_mask")
    read = {id(t) for t in call.values() if isinstance(t, Tensor)} & set(mine)
    if not isinstance(bias, Tensor) or read != {id(bias)}:
        return None
    shape = torch.Size((*call["query"].shape[:-1], call["key"].shape[-2]))
    return _with(function, args, kwargs, {id(bias): _expanded(bias, shape)})


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any], mine: Collection[int]) -> Meeting | None:
    """``x Wᵀ + b`` where weight (weight norm), bias (joined from several) or both are functions of parameters."""
    call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    if weight.dim() != 2 or x.dim() < 2 or id(x) in mine:
        return None
    found: Meeting | None = Meeting(lambda: F.linear(x, weight), [])
    if id(weight) in mine:
        letters = string.ascii_lowercase[: x.dim() - 1]
        found = _product([letters + "I", "OI"], letters + "O", [x, weight], mine)
    if found is None or bias is None:
        return found
    product, added = found.run, bias
    copies = [_expanded(bias, torch.Size((*x.shape[:-1], len(bias))))] if id(bias) in mine else []
    if copies:
        added = copies[0].copies
    return Meeting(lambda: product() + added, [*found.copies, *copies])


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[str], str, list[Tensor]] | None:
    """Subscripts of the operands, of the result, and the operands; ``...`` gets letters of its own."""
    if kwargs or not args or not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
    text = args[0].replace(" ", "")
    left, arrow, result = text.partition("->")
    parts = left.split(",")
    if len(parts) != len(operands) or not all(isinstance(t, Tensor) for t in operands):
        return None
    spare = [c for c in string.ascii_letters if c not in text]
    width = max((t.dim() - len(p.replace("...", "")) for p, t in zip(parts, operands, strict=True)), default=0)
    if width > len(spare) - 2:
        return None
    dots = "".join(spare[:width])
    named = []
    for part, tensor in zip(parts, operands, strict=True):
        own = tensor.dim() - len(part.replace("...", ""))
        named.append(part.replace("...", dots[width - own :] if own else ""))
        if len(named[-1]) != tensor.dim():
            return None
    if arrow:
        result = result.replace("...", dots)
    else:
        every = "".join(named)
        result = dots + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in dots))
    return named, result, operands


def _matmul(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[str], str, list[Tensor]] | None:
    """As :func:`_einsum` for matrix products, with broadcast leading axes."""
    if function not in MATRIX_PRODUCTS or kwargs or len(args) != 2 or not all(isinstance(t, Tensor) for t in args):
        return None
    a, b = args if getattr(function, "__name__", "") != "__rmatmul__" else args[::-1]
    if not a.dim() or not b.dim():
        return None
    batch = string.ascii_lowercase[: max(a.dim(), b.dim()) - 2] if max(a.dim(), b.dim()) > 2 else ""
    first = "K" if a.dim() == 1 else batch[len(batch) - (a.dim() - 2) :] + "MK"
    second = "K" if b.dim() == 1 else batch[len(batch) - (b.dim() - 2) :] + "KN"
    result = batch + ("" if a.dim() == 1 else "M") + ("" if b.dim() == 1 else "N")
    return [first, second], result, [a, b]


def _product(subscripts: list[str], result: str, operands: list[Tensor], mine: Collection[int]) -> Meeting | None:
    """A product in which every parameter gets the first subscript of the result that only data have."""
    sizes: dict[str, int] = {}
    for letters, tensor in zip(subscripts, operands, strict=True):
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    real = [
        {c for c, size in zip(letters, tensor.shape, strict=True) if size > 1 or sizes[c] == 1}
        for letters, tensor in zip(subscripts, operands, strict=True)
    ]
    params = [k for k, tensor in enumerate(operands) if id(tensor) in mine]
    # of length 1 everywhere: an axis of the data is one of the examples, one that only parameters have is not
    data = set().union(*(set(subscripts[k]) for k in range(len(operands)) if k not in params))
    own = set().union(*(real[k] & ({c for c in real[k] if sizes[c] > 1} | (set(subscripts[k]) - data)) for k in params))
    free = [c for c in result if c in data and c not in own]
    mine_too = [(operands[k], subscripts[k]) for k in params]
    free = [c for c in free if all(c not in letters or _squeezable(t, letters, c) for t, letters in mine_too)]
    if not params or not free:
        return None
    letter = min(free, key=lambda c: any(c in subscripts[k] for k in params))  # one that no parameter has, if any
    texts, tensors, copies = list(subscripts), list(operands), []
    for k in params:
        rest = texts[k].replace(letter, "")
        shape = [n for c, n in zip(texts[k], operands[k].shape, strict=True) if c != letter]
        copied = operands[k].reshape(1, *shape).expand(sizes[letter], *shape)
        copies.append(Copy(operands[k], copied, (1, *shape)))
        texts[k], tensors[k] = letter + rest, copied
    text = f"{','.join(texts)}->{result}"
    return Meeting(lambda: torch.einsum(text, *tensors), copies)


def _squeezable(tensor: Tensor, letters: str, letter: str) -> bool:
    return letters.count(letter) == 1 and tensor.shape[letters.index(letter)] == 1
