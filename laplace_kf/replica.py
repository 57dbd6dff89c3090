"""A model's double, to be used in its place by one call: predictions may then run in any number of threads.

A prediction needs the model in eval mode, with other weights, for the length of a call. None of that is done to the
user's modules: :func:`replica` makes a second tree of module objects with the *same* parameter tensors and copies of
the buffers (nothing else of a forward pass may write into a tensor of the model), and the prediction runs on that. So
nobody, in whatever thread, sees the model in another mode or with drawn weights, and no lock is held.

Whatever refers to a module of the tree has to refer to its double: attributes, lists and dictionaries of modules, bound
methods (also hooks), functions that close over one, partials, and plain objects that hold one. Where that cannot be
done (scripted code that is in training mode, a function that reads a module from a global variable), the model itself
is used as it is under one lock for each model (:func:`in_place`): predictions then run one after another, and a thread
that looks at the model meanwhile can see it in eval mode.
"""

from __future__ import annotations

import collections
import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.memory import storage_of
from laplace_kf.occupied import alone
from laplace_kf.randomness import same_foreign_states
from laplace_kf.sequences import read

__all__ = ["Shared", "current", "original", "replica", "stage", "standing"]

_ORIGINS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_GUARD = threading.RLock()

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)
_PLAIN = frozenset((type(None), bool, int, float, str))
_FOREIGN = frozenset(("torch", "numpy", "threading", "logging", "weakref", "_thread", "re", "pathlib", "inspect"))
DEPTH = 8  # of objects inside objects that may hold a module


class _Unfaithful(Exception):
    """Why a model has no double."""


class Shared:
    """A process-wide setting that several threads want at once: set by the first, put back by the last.

    Args:
        make: () → the context manager that sets it and puts it back.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._count = make, threading.Lock(), 0
        self._stack = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the setting holds."""
        with self._lock:
            if not self._count:
                self._stack.enter_context(self._make())
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._stack.close()


def original(model: nn.Module) -> nn.Module:
    """The user's model that a double stands for; any other module itself."""
    with _GUARD:
        known = _ORIGINS.get(model)
    found = None if known is None else known()
    return model if found is None else found


def in_place(model: nn.Module) -> AbstractContextManager[Any]:
    """The lock under which a model without a double is used as it is."""
    with _GUARD:
        return _LOCKS.setdefault(original(model), threading.RLock())


@contextmanager
def stage(model: nn.Module, forward: Any) -> Iterator[tuple[nn.Module, Any]]:
    """What to run in a model's place inside: its double and the ``forward=`` that goes with it.

    Args:
        model: the user's module.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
    """
    if forward is None and read(model) is not None:  # no code but torch's own runs
        yield replica(model, None)
        return
    try:
        with in_place(model):  # nobody is in the middle of using it as it is
            pair = replica(model, forward)
    except _Unfaithful:
        with alone(model), in_place(model), same_foreign_states():  # in this order: a fit has the first of them
            yield model, forward
        return
    with same_foreign_states():
        yield pair


def standing(model: nn.Module, forward: Any) -> tuple[nn.Module, Any]:
    """As :func:`stage` for an object that is kept: a double, or the model itself; run it inside :func:`current`."""
    try:
        with in_place(model):
            return replica(model, forward)
    except _Unfaithful:
        return model, forward


@contextmanager
def current(model: nn.Module) -> Iterator[None]:
    """Inside, a module from :func:`standing` has the buffers that the user's has now; one caller at a time."""
    user = original(model)
    if user is model:
        with alone(model), in_place(model):
            yield
        return
    with in_place(user), torch.no_grad():
        for mine, theirs in zip(model.buffers(), user.buffers(), strict=True):
            mine.copy_(theirs)
    yield


def replica(model: nn.Module, forward: Any) -> tuple[nn.Module, Any]:
    """A double of a module tree, and the ``forward=`` with the tree's modules replaced in what it closes over.

    Raises:
        _Unfaithful: where the double would reach modules of the original tree.
    """
    doubles = _Doubles(model)
    twin = doubles.made()
    return twin, doubles.image(forward, 0)


class _Doubles:
    """The doubles of all modules of a tree, and the images of what refers to them."""

    def __init__(self, model: nn.Module) -> None:
        self.root = model
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []  # what the memo's ids stand for
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                if module.training:
                    raise _Unfaithful("scripted code has its mode in itself")
                continue
            double = object.__new__(type(module))
            self.pairs.append((module, double))
            self._remember(module, double)
        self._memory: set[int | None] | None = None
        self.modules = {id(module) for module, _ in self.pairs}

    def made(self) -> nn.Module:
        """Fills the doubles in; returns that of the root."""
        for module, double in self.pairs:
            own = double.__dict__
            renormalises = getattr(module, "max_norm", None) is not None
            for name, value in list(module.__dict__.items()):
                if name == "_parameters":
                    own[name] = {
                        n: self._writable(p) if renormalises and p is not None else p for n, p in list(value.items())
                    }
                elif name == "_buffers":
                    own[name] = {
                        n: b if b is None or self._is_parameter(b) else self._writable(b)
                        for n, b in list(value.items())
                    }
                elif name == "training":
                    own[name] = False
                elif type(value) in _COPIED and not value:  # most are empty dictionaries of hooks
                    own[name] = value.copy()
                elif type(value) in _PLAIN:
                    own[name] = value
                else:
                    image = self.image(value, 0)
                    if image is value and type(value) in _COPIED:  # a forward pass may write into it
                        image = value.copy()
                    own[name] = image
        found: nn.Module = self.memo[id(self.root)]
        with _GUARD:
            _ORIGINS[found] = weakref.ref(original(self.root))
        return found

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whether a buffer (of any shape) is a parameter, or in its memory: whoever moves the one moves the other."""
        if self._memory is None:
            self._memory = {storage_of(p) for p in self.root.parameters()} - {None}
        return storage_of(tensor) in self._memory

    def _writable(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor (of any shape) that a forward pass may write into; one for all places where it is."""
        if id(tensor) not in self.memo:
            with torch.no_grad():
                copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, tensor.requires_grad)
            self._remember(tensor, copied)
        found: Tensor = self.memo[id(tensor)]
        return found

    def _remember(self, value: Any, image: Any) -> Any:
        self.memo[id(value)] = image
        self.alive.append(value)
        return image

    def image(self, value: Any, depth: int) -> Any:
        """The value with doubles for modules; itself where it reaches none."""
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, (Tensor, torch.Generator, types.ModuleType, types.BuiltinFunctionType)):
            return value
        if depth > DEPTH:
            return value
        self._remember(value, value)  # against circles
        return self._remember(value, self._image(value, depth + 1))

    def _image(self, value: Any, depth: int) -> Any:
        if isinstance(value, (dict, collections.OrderedDict)):
            changed = {k: self.image(v, depth) for k, v in list(value.items())}
            if all(changed[k] is v for k, v in list(value.items()) if k in changed):
                return value
            copied = copy.copy(value)
            copied.update(changed)
            return copied
        if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            parts = [self.image(v, depth) for v in list(value)]
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        if isinstance(value, types.MethodType):
            owner = self.image(value.__self__, depth)
            function = self.image(value.__func__, depth)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, functools.partial):
            parts = [self.image(part, depth) for part in (value.func, value.args, value.keywords)]
            same = parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords
            return value if same else functools.partial(parts[0], *parts[1], **parts[2])
        if isinstance(value, weakref.ref):
            target = value()
            image = None if target is None else self.image(target, depth)
            return value if image is target or image is None else weakref.ref(image)
        return self._object(value, depth)

    def _function(self, value: types.FunctionType, depth: int) -> types.FunctionType:
        for name in _global_names(value.__code__):
            if id(value.__globals__.get(name)) in self.modules:
                raise _Unfaithful(f"{value.__qualname__} reads a module from the global variable {name!r}")
        cells = value.__closure__ or ()
        contents = [_content(cell) for cell in cells]
        images = [self.image(content, depth) for content in contents]
        defaults, keywords = self.image(value.__defaults__, depth), self.image(value.__kwdefaults__, depth)
        extra = self.image(value.__dict__, depth)
        if (
            all(a is b for a, b in zip(contents, images, strict=True))
            and defaults is value.__defaults__
            and keywords is value.__kwdefaults__
            and extra is value.__dict__
        ):
            return value
        # a cell whose content stays is shared: what the function assigns there is seen outside, as without a double
        closure = tuple(
            cell if image is content else types.CellType(image)
            for cell, content, image in zip(cells, contents, images, strict=True)
        )
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
        made.__kwdefaults__ = keywords
        made.__dict__.update(extra)
        return made

    def _object(self, value: Any, depth: int) -> Any:
        if type(value).__module__.partition(".")[0] in _FOREIGN and not isinstance(value, nn.Module):
            return value
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict):
            return value
        changed = {k: image for k, v in list(held.items()) if (image := self.image(v, depth)) is not v}
        if not changed:
            return value
        try:
            copied = copy.copy(value)
            copied.__dict__.update(changed)
        except (TypeError, AttributeError, copy.Error) as error:
            raise _Unfaithful(f"{type(value).__name__} holds a module and cannot be copied") from error
        return copied


_COPIED = (dict, collections.OrderedDict, list, set)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
