"""The part of a forward pass that depends on the posterior's weights, cut off from all that does not.

One pass is recorded, torch function by torch function. A value depends on the weights if one of the arguments it was
made from does; the calls that make such values are the *suffix*, and everything else they read (features of a backbone,
frozen weights) is the same for every draw. :func:`cut` returns a small model that runs the suffix alone, with the
features as its inputs, so that whoever needs outputs at many draws runs the backbone once.

The cut is made only where it is faithful: no value of the suffix is looked at by Python (control flow), written into
what is outside, made without a graph, or drawn at random outside; and the suffix must give the recorded outputs again.
Otherwise the whole network is run as before. :func:`verdicts` says which was done, and why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_kf.batches import Forward, predicted, tensors_of
from laplace_kf.models import preserved
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.predictive.calls import require_movable
from laplace_kf.randomness import torch_states
from laplace_kf.replica import original
from laplace_kf.substitution import substituted

__all__ = ["FEATURE_BYTES", "Site", "Suffix", "cut", "feature_bytes", "verdicts"]

FEATURE_BYTES = 2**30  # features that a search keeps, over all its minibatches; further ones run the whole network

Site = tuple[nn.Module, "Forward | None", Any]
_VERDICTS: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], str]] = WeakKeyDictionary()
_LOCK = threading.Lock()

# what these tell does not depend on the values of a tensor
_LOOKS = frozenset(
    [
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "is_leaf",
        "is_floating_point",
        "is_complex",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "element_size",
        "itemsize",
        "nbytes",
        "__len__",
        "is_sparse",
        "is_nested",
        "is_quantized",
        "is_mkldnn",
        "is_cpu",
        "is_cuda",
        "is_meta",
        "is_mps",
        "is_xpu",
        "storage_offset",
        "has_names",
        "get_device",
        "is_inference",
        "is_signed",
        "is_conj",
        "is_neg",
    ]
)
# the shape of what these make depends on values
_RAGGED = frozenset(
    [
        "nonzero",
        "argwhere",
        "unique",
        "unique_consecutive",
        "masked_select",
        "repeat_interleave",
        "bincount",
        "nms",
        "__set__",
        "register_hook",
        "masked_scatter",
    ]
)
_NO_WORK = frozenset(
    [
        "clone",
        "to",
        "detach",
        "contiguous",
        "alias",
        "view",
        "reshape",
        "expand",
        "__get__",
        "float",
        "double",
        "half",
        "zeros_like",
    ]
)


class _NoCut(Exception):
    """Why a forward pass cannot be cut."""


@dataclass(frozen=True)
class _Slot:
    """A value that depends on the weights."""

    number: int


@dataclass(frozen=True)
class _Weight:
    name: str


@dataclass(frozen=True)
class _Feature:
    """A tensor from outside the suffix, by its number."""

    number: int


@dataclass(frozen=True)
class _Step:
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    made: tuple[int, ...]


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments of a torch function with ``change`` applied to every leaf."""
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, change) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)


def _leaves(value: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    _mapped(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    yield from found


class _Recorder(TorchFunctionMode):
    """Keeps the calls that depend on some weights (name by id), and what they read."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.slots: dict[int, int] = {}  # by id of the tensor, which ``alive`` keeps unique
        self.alive: list[Tensor] = []
        self.features: list[tuple[Tensor, int]] = []  # with the version at which they were read
        self.steps: list[_Step] = []
        self.worked = False  # whether anything was computed outside
        self.refused: str | None = None
        self._settings: tuple[bool, ...] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_leaves((tuple(args), kwargs)))
        name = _name(func)
        if self.refused is not None or not any(self._depends(t) for t in tensors):
            result = func(*args, **kwargs)
            self.worked = self.worked or (name not in _NO_WORK and bool(tensors) and any(True for _ in _leaves(result)))
            return result
        template = _mapped((tuple(args), dict(kwargs)), self._template)
        outside = [(t, t._version) for t in tensors if not self._depends(t)]
        result = func(*args, **kwargs)
        made = list(_leaves(result))
        if not made and name in _LOOKS:
            return result
        self._check(name, args, outside, made)
        if self.refused is None:
            self.steps.append(_Step(func, template[0], template[1], tuple(self._slot(t) for t in made)))
        return result

    def _depends(self, tensor: Tensor) -> bool:
        return id(tensor) in self.slots or id(tensor) in self.weights

    def _check(
        self, name: str, args: Sequence[Any], outside: Sequence[tuple[Tensor, int]], made: Sequence[Tensor]
    ) -> None:
        masks = [t for t in _leaves(tuple(args[1:])) if t.dtype in (torch.bool, torch.uint8) and self._depends(t)]
        settings = (torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")))
        self._settings = self._settings or settings
        if not made and name != "__setitem__":
            self.refused = f"{name!r} reads a value that depends on the weights"
        elif (
            name in _RAGGED or (name in ("__getitem__", "__setitem__") and masks) or (name == "where" and len(args) < 2)
        ):
            self.refused = f"{name!r} makes a shape that depends on the weights"
        elif any(t._version != version for t, version in outside):
            self.refused = f"{name!r} writes into a tensor in place that does not depend on the weights"
        elif not settings[0] or settings != self._settings:
            self.refused = f"{name!r} runs under settings of its own (no_grad, autocast)"

    def _slot(self, tensor: Tensor) -> int:
        if id(tensor) not in self.slots:
            self.slots[id(tensor)] = len(self.alive)
            self.alive.append(tensor)
        return self.slots[id(tensor)]

    def _template(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self.slots:
            return _Slot(self.slots[id(leaf)])
        if id(leaf) in self.weights:
            return _Weight(self.weights[id(leaf)])
        if leaf.requires_grad:  # all other weights are detached: it came through where no torch function is seen
            self.refused = "weights act inside a custom autograd function or compiled code"
        for number, (known, _) in enumerate(self.features):
            if known is leaf:
                return _Feature(number)
        self.features.append((leaf, leaf._version))
        return _Feature(len(self.features) - 1)


def _name(func: Callable[..., Any]) -> str:
    name = str(getattr(func, "__name__", func))
    if name == "__get__":  # an attribute: its own name tells what is read
        own = getattr(getattr(func, "__self__", None), "__name__", name)
        return own if own in _LOOKS else name
    return name


class Suffix(nn.Module):
    """Runs the recorded suffix: features ``(N, ...)`` in, outputs ``(N, ...)`` out.

    Its parameters are the posterior's, by their own names and of their shapes.

    Attributes:
        origin: model, ``forward=`` and inputs that it stands for.
        divisible: whether the first example's features alone give the first example's outputs (they do not where the
            suffix has the number of examples written into a reshape); whoever runs single examples takes ``origin``.
        linear: names of weight and bias (``None`` without one) where all of it is one linear map of its only feature.
    """

    origin: Site
    divisible: bool
    linear: tuple[str, str | None] | None = None

    def __init__(
        self,
        steps: Sequence[_Step],
        output: int,
        weights: Mapping[str, Tensor],
        fixed: Mapping[int, Tensor],
        order: Sequence[int],
    ) -> None:
        super().__init__()
        self.steps, self.output, self.fixed, self.order = tuple(steps), output, dict(fixed), tuple(order)
        self.places: dict[str, nn.Module] = {}
        for name, value in weights.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module._modules[part] = nn.Module()
                module = module._modules[part]  # type: ignore[assignment]
            module._parameters[last] = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            self.places[name] = module
        self.training = False

    def forward(self, *features: Tensor) -> Tensor:
        """Outputs ``(N, ...)`` of features, the first of which has N rows."""
        read = {**self.fixed, **dict(zip(self.order, features, strict=True))}
        slots: dict[int, Tensor] = {}

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, _Slot):
                return slots[leaf.number]
            if isinstance(leaf, _Feature):
                return read[leaf.number]
            if isinstance(leaf, _Weight):
                return self.places[leaf.name]._parameters[leaf.name.rpartition(".")[2]]
            return leaf

        for step in self.steps:
            result = step.func(*_mapped(step.args, filled), **_mapped(step.kwargs, filled))
            slots.update(zip(step.made, _leaves(result), strict=True))
        return slots[self.output]


def verdicts(model: nn.Module) -> dict[tuple[str, ...], str]:
    """For each set of parameter names that was tried: ``"cut"``, or why the whole network is run."""
    with _LOCK:
        return dict(_VERDICTS.get(original(model), {}))


def feature_bytes(inputs: Any) -> int:
    """Bytes of the tensors of an input structure."""
    return sum(t.numel() * t.element_size() for t in tensors_of(inputs))


def cut(model: nn.Module, forward: Forward | None, names: Collection[str], inputs: Any) -> Site:
    """What to run instead of ``(model, forward, inputs)`` for outputs at many values of some parameters.

    Costs one forward pass, after which the whole model is not needed for these inputs. The three are returned as they
    are where a cut would save nothing or would not be faithful; that is remembered and costs nothing the next time.

    Args:
        model: the module; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        names: parameters that will be replaced.
        inputs: what the model takes, on its device.

    Raises:
        UnsupportedLayer: for parameters in whose place no other values can be put; names them.
    """
    plain: Site = (model, forward, inputs)
    if isinstance(model, Suffix):
        return plain
    require_movable(model, forward, names, inputs)
    named = dict(model.named_parameters())
    key = tuple(name for name in named if name in names)
    if len(key) == len(named) or len(key) != len(names):
        return plain
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(inputs)):
        return plain  # features would not carry the graph of the inputs to those who run the suffix
    if verdicts(model).get(key, "cut") != "cut":
        return plain
    try:
        found: Site = _cut(model, forward, key, named, inputs)
        verdict = "cut"
    except _NoCut as reason:
        found, verdict = plain, str(reason)
    with _LOCK:
        _VERDICTS.setdefault(original(model), {})[key] = verdict
    return found


def _cut(
    model: nn.Module, forward: Forward | None, names: Sequence[str], named: Mapping[str, Tensor], inputs: Any
) -> Site:
    replaced = {name: value.detach().requires_grad_(name in names) for name, value in named.items()}
    replaced = {n: v if v.is_floating_point() else named[n] for n, v in replaced.items()}
    recorder = _Recorder({id(replaced[name]): name for name in names})
    with preserved(model):
        devices = {p.device for p in named.values()}
        before = torch_states(devices)
        with torch.enable_grad(), recorder:
            outputs = substituted(model, replaced, lambda: predicted(model, inputs, forward))
        if not all(map(torch.equal, before, torch_states(devices))):
            raise _NoCut("the forward pass draws random numbers")
    if recorder.refused is not None:
        raise _NoCut(recorder.refused)
    if id(outputs) not in recorder.slots or outputs.dim() < 2:
        raise _NoCut("the outputs do not visibly depend on the weights")
    if not recorder.worked:
        raise _NoCut("nothing is computed before the first use of the weights")
    if any(tensor._version != version for tensor, version in recorder.features):
        raise _NoCut("a tensor that the suffix reads is changed in place afterwards")
    count = outputs.shape[0]
    own = {id(value) for value in replaced.values()} | {id(b) for b in model.buffers()}
    features: dict[int, Tensor] = {}
    fixed: dict[int, Tensor] = {}
    for number, (tensor, _) in enumerate(recorder.features):
        rows = id(tensor) not in own and tensor.dim() > 0 and tensor.shape[0] == count
        (features if rows else fixed)[number] = tensor.detach()
    suffix = Suffix(recorder.steps, recorder.slots[id(outputs)], {n: named[n] for n in names}, fixed, list(features))
    site: Site = (suffix, None, tuple(features.values()))
    suffix.linear = _linear(recorder.steps, recorder.slots[id(outputs)], features)
    if suffix.linear is not None:  # nothing about one function of one tensor is left to be tried out
        suffix.origin, suffix.divisible = (model, forward, inputs), True
        return site
    with preserved(suffix), torch.no_grad():
        try:
            again = predicted(suffix, site[2], None)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise _NoCut(f"the suffix cannot be run alone: {error}") from error
    if again.shape != outputs.shape or not same_outputs(again, outputs.detach()):
        raise _NoCut("the suffix alone does not give the network's outputs")
    suffix.origin = (model, forward, inputs)
    divisible = False
    with suppress(RuntimeError, TypeError, ValueError, IndexError), preserved(suffix), torch.no_grad():
        first = predicted(suffix, tuple(t[:1] for t in features.values()), None)
        divisible = same_outputs(first, outputs[:1].detach())
    suffix.divisible = divisible  # not inside: attributes are put back there
    return site


def _linear(steps: Sequence[_Step], output: int, features: Mapping[int, Tensor]) -> tuple[str, str | None] | None:
    """Weight and bias if the steps are one linear map of the only feature ``(N, ..., H)``."""
    if len(steps) != 1 or steps[0].func is not F.linear or steps[0].made != (output,) or len(features) != 1:
        return None
    given = {**dict(zip(("input", "weight", "bias"), steps[0].args, strict=False)), **steps[0].kwargs}
    weight, bias = given["weight"], given.get("bias")
    known = isinstance(weight, _Weight) and isinstance(given["input"], _Feature)
    if not known or not (bias is None or isinstance(bias, _Weight)):
        return None
    (feature,) = features.values()
    return None if feature.dim() < 2 else (weight.name, None if bias is None else bias.name)
