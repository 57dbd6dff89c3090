"""A model with other values in the place of its parameters, and the certainty that its forward pass uses them.

Draws, linearised predictions and trial steps put tensors where the parameters stand (``torch.func.functional_call``).
A forward pass that reaches a parameter in another way (a plain list, a closure, a module that is not registered, a
transpose made once) would go on using the old values and say nothing. So one pass with copies in the place of the
parameters is watched before any prediction or step: whoever reads a parameter that was replaced, or its memory, is
refused by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.lookups import note_plain, plain
from laplace_kf.memory import storage_of
from laplace_kf.models import named_parameters
from laplace_kf.replica import original
from laplace_kf.sequences import read

__all__ = ["leaves_of", "note_reached", "reached", "require_reached", "substituted"]

T = TypeVar("T")
# functions that take nothing of a tensor but its type, device and shape
_LOOKS = frozenset(
    ["to", "type_as", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "zeros_like", "ones_like",
     "empty_like", "full_like", "rand_like", "randn_like"]
)  # fmt: skip


def substituted(model: nn.Module, values: Mapping[str, Tensor], call: Callable[[], T]) -> T:
    """What ``call()`` returns while parameters and buffers of the model have other values.

    Args:
        model: the module; as it was afterwards.
        values: by parameter or buffer name, each of its shape.
        call: runs the model.
    """
    everywhere = {f"model.{place}": values[name] for place, name in _places_in(model, values)}
    found: T = torch.func.functional_call(_Runner(model, call), everywhere, tie_weights=False)
    return found


def _places_in(model: nn.Module, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every attribute that holds one of the parameters and buffers of these names, once, with that name.

    ``functional_call`` finds tied tensors itself, but goes through a module that is registered twice twice: what it
    takes for the old values the second time, and puts back, are the new ones.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        for held in (module._parameters, module._buffers):
            tensors.update({start + key: tensor for key, tensor in held.items() if tensor is not None})
    wanted = {id(tensors[name]): name for name in names if name in tensors}
    yield from ((place, wanted[id(t)]) for place, t in tensors.items() if place not in names and id(t) in wanted)
    yield from ((name, name) for name in names)


class _Runner(nn.Module):
    """What ``functional_call`` wants: a module that has the model, so that also what runs it sees the other values."""

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self) -> Any:
        return self._call()


def leaves_of(outputs: Tensor) -> Iterator[Tensor]:
    """The leaves that the autograd graph of outputs ``(N, ...)`` ends in, one for every edge that leads there."""
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


# --------------------------------------------------------------------------------------------- once for every posterior


KEPT = 8  # answers for different forward= that are remembered for a model
_Known = dict[int, "tuple[Any, dict[str, ref[Tensor]]]"]  # forward= by its identity, parameters found in their place
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def note_reached(model: nn.Module, forward: Any, names: Collection[str]) -> None:
    """Remembers that the forward pass (with the user's ``forward``, or ``None``) reaches these in their place."""
    known = _KNOWN.setdefault(original(model), {})
    _, found = known.setdefault(id(forward), (forward, {}))  # which is kept, so that no other one gets its identity
    found.update({name: ref(p) for name, p in named_parameters(model).items() if name in names})
    while len(known) > KEPT:
        del known[next(iter(known))]


def reached(model: nn.Module, forward: Any, names: Collection[str]) -> bool:
    """Whether :func:`require_reached` has passed for all these parameters, as they are now, or need not be asked."""
    if forward is None and read(model) is not None:
        return True  # a list of modules
    _, known = _KNOWN.get(original(model), {}).get(id(forward), (None, {}))
    if any(name not in known for name in names):
        return False
    return all(known[name]() is p for name, p in named_parameters(model).items() if name in names)


def require_reached(model: nn.Module, forward: Any, names: Collection[str], call: Callable[[], Tensor]) -> Tensor:
    """Refuses parameters that the forward pass reaches in another way than as attributes of their modules.

    One pass with copies of the parameters in their place: not one of the parameters themselves may appear in its
    autograd graph, and nobody may read their memory.

    Args:
        model: the module, in the mode it is to run in (see :func:`laplace_kf.models.preserved`).
        forward: the user's ``forward=`` or ``None``; only to remember the answer by (:func:`reached`).
        names: the parameters that are going to be replaced.
        call: runs the model and returns its outputs ``(N, ...)``.

    Returns:
        These outputs.

    Raises:
        UnsupportedLayer: names the parameters and the ways out.
    """
    named = named_parameters(model)
    own = {name: p for name, p in named.items() if name in names}
    together = _overlapping(named, own)
    if together is not None:
        raise UnsupportedLayer(
            f"parameters {together[0]!r} and {together[1]!r} are two parameters in the same memory, so that neither "
            "can have a value of its own; make them one parameter (second.weight = first.weight, not .data)"
        )
    copies = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    # a network that writes into its buffers must not write twice: what it makes of the real ones may be in use
    memory = {storage_of(p) for p in model.parameters()} - {None}
    copies.update({n: b.detach().clone() for n, b in model.named_buffers() if storage_of(b) not in memory})
    watch = _Watch(own, model)
    with torch.enable_grad(), watch:
        outputs = substituted(model, copies, call)
    ids = {id(p): name for name, p in own.items()}
    watch.met |= {ids[id(leaf)] for leaf in leaves_of(outputs) if id(leaf) in ids}
    if watch.met:
        raise _refused([name for name in own if name in watch.met])
    note_reached(model, forward, own)
    return outputs


class _Watch(TorchFunctionMode):
    """Notes the parameters (by name) that a function makes something of, be it of themselves or of their memory.

    And whether autograd is told something else of a lookup than what it does (:mod:`laplace_kf.lookups`).
    """

    def __init__(self, own: Mapping[str, Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.memory = _places(own)
        self.met: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        instead = plain(func, args, kwargs or {})
        if instead is not None:
            note_plain(self.model)
        result = func(*args, **(kwargs or {})) if instead is None else instead()
        if _makes(result) and getattr(func, "__name__", "") not in _LOOKS:
            self.met |= {name for t in _tensors((*args, *(kwargs or {}).values())) for name in self._owners(t)}
        return result

    def _owners(self, tensor: Tensor) -> Iterator[str]:
        place = _place(tensor)
        for start, stop, name in self.memory.get(place[0], ()) if place is not None else ():
            if place[1] < stop and start < place[2]:  # type: ignore[index]
                yield name


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _makes(result: Any) -> bool:
    """Whether a function's result holds numbers."""
    if isinstance(result, Tensor):
        return result.is_floating_point()
    if isinstance(result, (tuple, list)):
        return any(map(_makes, result))
    return isinstance(result, float) or type(result).__module__ == "numpy"


Place = tuple[int, int, int]


def _place(tensor: Tensor) -> Place | None:
    """Storage, first and last byte of a dense tensor's entries; ``None`` where it has no memory of its own."""
    storage = storage_of(tensor)
    if storage is None:
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return storage, start * size, (start + int(extent)) * size


def _places(own: Mapping[str, Tensor]) -> dict[int, list[tuple[int, int, str]]]:
    found: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in own.items():
        place = _place(parameter)
        if place is not None:
            found.setdefault(place[0], []).append((place[1], place[2], name))
    return found


def _overlapping(named: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Two of all parameters that share memory, at least one of them among ``own``."""
    for ranges in _places(named).values():
        for (_, stop, first), (start, _, second) in pairwise(sorted(ranges)):
            if start < stop and (first in own or second in own):
                return first, second
    return None


def _refused(names: Sequence[str]) -> UnsupportedLayer:
    """The error about parameters that are reached in another way."""
    path, _, last = names[0].rpartition(".")
    shown = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return UnsupportedLayer(
        f"the forward pass reaches {'parameter' if len(names) == 1 else 'parameters'} {shown} in another way than as "
        "an attribute of its module (through a plain list or dict, a closure, a module that is not registered, or a "
        "tensor made of it before the call), so that draws and steps could not put other values there. Read it as "
        f"self.{last} inside forward of {f'module {path!r}' if path else 'the model'}, hold it in an nn.ParameterList, "
        "nn.ParameterDict or nn.ModuleList, or leave it out with parameters=[patterns]"
    )
