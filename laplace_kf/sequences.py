"""Models whose types say what they do: ``nn.Sequential`` of torch's own linear maps and activations.

Of most models only a watched forward pass can tell which function reads which parameter, and every new pass is another
question. A sequence of torch's own modules, as torch made them, has no say in that: its forward pass is the list of its
modules. Reading that list takes less time than one of the modules does, so it is read anew before every use and nothing
is remembered that could become stale. Whatever could make the model do something else leaves it without such a reading:
a subclass, a ``forward`` of its own, any hook, any attribute that torch does not put there, a parameter that is not
plain, a function of torch that somebody replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

__all__ = ["Link", "Sequence", "read"]

Activation = tuple[Callable[..., Any], Mapping[str, Any]]


class Link(NamedTuple):
    """One module of a sequence.

    Attributes:
        path: the module's path.
        module: the module.
        activation: the elementwise function that it calls, and with which keyword arguments; ``None`` for linear maps
            and for modules that only reshape.
        parameters: of a linear map, by role (``"weight"``, ``"bias"``): name and parameter; else empty.
    """

    path: str
    module: nn.Module
    activation: Activation | None
    parameters: dict[str, tuple[str, Tensor]]


class Sequence(NamedTuple):
    """The modules in the order in which they run; those that only hand their argument on are left out."""

    links: tuple[Link, ...]

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, each of its shape."""
        return {name: parameter for link in self.links for name, parameter in link.parameters.values()}


def _plain(function: Callable[..., Any], **names: str) -> Callable[[Any], Activation | None]:
    """Of a module its function, with attributes of the module as keyword arguments; none where it works in place."""

    def activation(module: Any) -> Activation | None:
        if getattr(module, "inplace", False):
            return None
        return function, {name: getattr(module, attribute) for name, attribute in names.items()}

    return activation


_ACTIVATIONS: dict[Any, Callable[[Any], Activation | None]] = {
    nn.ReLU: _plain(F.relu),
    nn.Tanh: _plain(torch.tanh),
    nn.Sigmoid: _plain(torch.sigmoid),
    nn.SiLU: _plain(F.silu),
    nn.GELU: _plain(F.gelu, approximate="approximate"),
    nn.ELU: _plain(F.elu, alpha="alpha"),
    nn.LeakyReLU: _plain(F.leaky_relu, negative_slope="negative_slope"),
    nn.Softplus: _plain(F.softplus, beta="beta", threshold="threshold"),
}
_OTHERS: tuple[Any, ...] = (nn.Sequential, nn.Linear, nn.Identity, nn.Dropout, nn.Flatten)
_MADE = (*_ACTIVATIONS, nn.Sequential, nn.Identity, nn.Dropout, nn.Flatten)
_KEYS = {kind: frozenset(kind().__dict__) for kind in _MADE} | {
    nn.Linear: frozenset(nn.Linear(1, 1, device="meta").__dict__)
}
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (*_ACTIVATIONS, *_OTHERS)}
_CALL, _GET = nn.Module.__call__, nn.Module.__getattr__


def _functions() -> tuple[Any, ...]:
    """What those modules call, as it is now."""
    made = torch._C._nn
    return (
        F.linear, F.relu, F.silu, F.gelu, F.elu, F.leaky_relu, F.softplus, F.dropout, torch.tanh, torch.sigmoid,
        torch.relu, made.gelu, made.silu, made.elu, made.leaky_relu, made.softplus, Tensor.flatten,
    )  # fmt: skip


_FUNCTIONS = _functions()
_GLOBAL_HOOKS = tuple(
    value
    for name, value in sorted(vars(_torch_module).items())
    if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
)


def read(model: nn.Module) -> Sequence | None:
    """The model as a sequence, if all that it does stands in the types of its modules; else ``None``."""
    if type(model) not in _KEYS:
        return None
    if any(_GLOBAL_HOOKS) or nn.Module.__getattr__ is not _GET:
        return None
    if not all(map(is_, _functions(), _FUNCTIONS)):
        return None
    links: list[Link] = []
    if not _collect(model, "", links):
        return None
    if len({id(link.module) for link in links}) < len(links):
        return None
    places = [_extent(p) for link in links for _, p in link.parameters.values()]
    places.sort()
    if not places or places[0][0] == 0 or any(a[1] > b[0] for a, b in pairwise(places)):
        return None  # parameters without numbers, or in each other's memory
    return Sequence(tuple(links))


def _collect(module: nn.Module, path: str, links: list[Link]) -> bool:
    """Appends a module's links; says whether it has such a reading."""
    kind, own = type(module), module.__dict__
    if own.keys() != _KEYS.get(kind) or kind.forward is not _FORWARDS[kind] or kind.__call__ is not _CALL:
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    parameters, modules = own["_parameters"], own["_modules"]
    if own["_buffers"]:
        return False
    start = f"{path}." if path else ""
    if kind is nn.Linear:
        if modules or list(parameters) != ["weight", "bias"] or parameters["weight"] is None:
            return False
        given = {role: (start + role, p) for role, p in parameters.items() if p is not None}
        links.append(Link(path, module, None, given))
        return all(_is_plain(p) for _, p in given.values())
    if parameters:
        return False
    if kind is nn.Sequential:
        return all(_collect(child, start + name, links) for name, child in modules.items())
    if modules:
        return False
    if kind is nn.Dropout:
        return not own["training"]  # then it hands its argument on
    if kind is nn.Flatten:
        links.append(Link(path, module, None, {}))
        return (own["start_dim"], own["end_dim"]) == (1, -1)
    if kind is not nn.Identity:
        activation = _ACTIVATIONS[kind](module)
        links.append(Link(path, module, activation, {}))
        return activation is not None
    return True


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter (of any shape) is torch's own, dense and contiguous, without hooks."""
    return (
        type(parameter) is nn.Parameter
        and parameter.layout is torch.strided
        and parameter.is_floating_point()
        and not parameter.is_meta
        and not parameter._backward_hooks  # an empty dictionary after unpickling
        and parameter.is_contiguous()
    )


def _extent(parameter: Tensor) -> tuple[int, int]:
    """Address of a parameter's first number (of any shape), 0 for none, and of what follows the last one."""
    start = parameter.data_ptr()
    return start, start + parameter.numel() * parameter.element_size()
