"""A model with other values in the place of its parameters, and the certainty that its forward pass uses them.

Draws, linearised predictions and trial steps put tensors where the parameters stand (``torch.func.functional_call``).
A forward pass that reaches a parameter in another way (a plain list, a closure, a module that is not registered, a
transpose made once) goes on using the old values and says nothing. So every such pass is watched: whoever consumes a
parameter that was replaced, or its memory, is refused by the parameter's name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_kf.batches import Forward, as_tensor, run
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.lookups import note_plain, plain

__all__ = ["leaves_of", "require_reached", "substituted"]

T = TypeVar("T")

_LOOKS = {"to", "type_as", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros_like", "ones_like",
          "empty_like", "full_like", "rand_like", "randn_like"}  # fmt: skip


def substituted(
    model: nn.Module, values: Mapping[str, Tensor], call: Callable[[], T], *, shared_memory: bool = False
) -> T:
    """What ``call()`` returns while parameters and buffers of the model have other values.

    Args:
        model: the module; as it was afterwards.
        values: by parameter or buffer name, each of its shape.
        call: runs the model.
        shared_memory: the values may lie in the memory of the parameters they replace; then it is not watched.

    Raises:
        UnsupportedLayer: if a replaced parameter is used all the same; names it.
    """
    own = {name: p for name, p in model.named_parameters() if name in values}
    runner = _Runner(model, call, _Watch(own, not shared_memory, model))
    replaced = {f"model.{name}": value for name, value in values.items()}
    found: T = torch.func.functional_call(runner, replaced, ())
    return found


class _Runner(nn.Module):
    """What ``functional_call`` wants: a module that has the model, so that also what runs it sees the other values."""

    def __init__(self, model: nn.Module, call: Callable[[], Any], watch: _Watch) -> None:
        super().__init__()
        self.model = model
        self._call, self._watch = call, watch

    def forward(self) -> Any:
        with self._watch:
            return self._call()


class _Watch(TorchFunctionMode):
    """Refuses functions that make tensors of parameters that were replaced, of views of them, or of their memory."""

    def __init__(self, own: Mapping[str, Tensor], memory: bool, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in own.items()}
        self.memory = _places(own) if memory else {}
        self.model = weakref.ref(model)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = self._met(args) or (self._met(kwargs.values()) if kwargs else None)
        if name is not None and _makes(result) and getattr(func, "__name__", "") not in _LOOKS:
            raise refused([name])
        return result

    def _met(self, values: Iterable[Any]) -> str | None:
        for value in values:
            if isinstance(value, Tensor):
                found = self.names.get(id(value)) or self._by_memory(value)
            elif isinstance(value, (tuple, list)):
                found = self._met(value)
            else:
                continue
            if found is not None:
                return found
        return None

    def _by_memory(self, tensor: Tensor) -> str | None:
        base = tensor._base
        if base is not None and id(base) in self.names:
            return self.names[id(base)]
        if not self.memory or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        place = _place(tensor)
        for start, stop, name in self.memory.get(place[0], ()) if place is not None else ():
            if place[1] < stop and start < place[2]:  # type: ignore[index]
                return name
        return None


def _makes(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.is_floating_point()
    return isinstance(result, (tuple, list)) and any(map(_makes, result))


Place = tuple[int, int, int]


def _place(tensor: Tensor) -> Place | None:
    """Storage, first and last byte of a dense tensor's entries; ``None`` where it has no memory of its own."""
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, wrapped, without data
        return None
    if not storage or not tensor.numel():
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    return storage, start, start + extent * tensor.element_size()


def _places(own: Mapping[str, Tensor]) -> dict[int, list[tuple[int, int, str]]]:
    found: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in own.items():
        place = _place(parameter)
        if place is not None:
            found.setdefault(place[0], []).append((place[1], place[2], name))
    return found


def leaves_of(outputs: Tensor) -> Iterator[Tensor]:
    """The leaves that the autograd graph of ``outputs (...)`` ends in, one for every edge that leads there."""
    stack, seen = [outputs.grad_fn], {outputs.grad_fn}
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            variable = getattr(following, "variable", None)
            if variable is not None:
                yield variable
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


# --------------------------------------------------------------------------------------------- once for every model


_Known = list[tuple[Any, frozenset[int]]]  # the forward= and the parameters of a check that passed
_PASSED: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def require_reached(model: nn.Module, forward: Forward | None, batch: Any, names: Sequence[str]) -> None:
    """Refuses parameters that the forward pass reaches in another way than as attributes of their modules.

    One pass over a batch with copies of the parameters in their place, the first time a model comes with these
    parameters; not one of the parameters themselves may appear in its autograd graph, and nobody may read their memory.

    Args:
        model: the module, in the mode it is to run in (see :func:`laplace_kf.engine.preserved`).
        forward: ``(model, batch) -> (outputs, targets)`` or ``None``.
        batch: a minibatch.
        names: the parameters that are going to be replaced.

    Raises:
        UnsupportedLayer: names the parameters and the ways out.
    """
    own = {name: p for name, p in model.named_parameters() if name in set(names)}
    ids = frozenset(map(id, own.values()))
    known = _PASSED.setdefault(model, [])
    if any(ids <= passed and _stands_for(made, forward) for made, passed in known):
        return
    together = _overlapping(model, own)
    if together is not None:
        raise UnsupportedLayer(
            f"parameters {together[0]!r} and {together[1]!r} are two parameters in the same memory, so that neither "
            "can have a value of its own; make them one parameter (second.weight = first.weight, not .data)"
        )
    copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in own.items()}
    with torch.enable_grad(), _Finder(model):
        outputs = as_tensor(substituted(model, copies, lambda: run(model, batch, forward)[0]))
    hidden = {id(leaf) for leaf in leaves_of(outputs)} & ids if outputs.requires_grad else set()
    if hidden:
        raise refused([name for name, p in own.items() if id(p) in hidden])
    try:
        known.append((None if forward is None else weakref.ref(forward), ids))
    except TypeError:  # an object without weak references is asked again the next time
        return


def _stands_for(made: Any, forward: Forward | None) -> bool:
    return forward is None if made is None else made() is forward is not None


class _Finder(TorchFunctionMode):
    """Finds functional calls of lookups that autograd is told something else of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        instead = plain(func, args, kwargs or {})
        if instead is None:
            return func(*args, **(kwargs or {}))
        note_plain(self.model)
        return instead()


def _overlapping(model: nn.Module, own: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two parameters of the model that share memory, at least one of them among ``own``."""
    for ranges in _places(dict(model.named_parameters())).values():
        ordered = sorted(ranges)
        for (_, stop, first), (start, _, second) in pairwise(ordered):
            if start < stop and (first in own or second in own):
                return first, second
    return None


def refused(names: Sequence[str]) -> UnsupportedLayer:
    """The error about parameters that are reached in another way."""
    first = names[0].rpartition(".")
    return UnsupportedLayer(
        f"the forward pass reaches {'parameter' if len(names) == 1 else 'parameters'} {', '.join(map(repr, names))} in "
        "another way than as an attribute of its module (through a plain list or dict, a closure, a module that is not "
        "registered, or a tensor made of it before the call), so that draws and steps could not put other values "
        f"there. Read it as self.{first[2]} inside forward of module {first[0] or '(root)'!r}, hold it in an "
        "nn.ParameterList, nn.ParameterDict or nn.ModuleList, or leave it out with parameters=[patterns]"
    )
