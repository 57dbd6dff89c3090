"""The user's model, before and while anything is done with it: wrappers taken off, kinds that cannot work refused.

Also the guard that leaves it as it was (:func:`preserved`), and the settings it runs under: the caller's autocast for
the model alone (the package's own arithmetic stays in full precision), and plain Python instead of compiled code, which
no tape can see into.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laplace_kf.errors import IncompatiblePair, InvalidType, ShapeMismatch, UnsupportedLayer
from laplace_kf.occupied import alone
from laplace_kf.randomness import same_random_states
from laplace_kf.replica import Shared, original
from laplace_kf.sequences import read

__all__ = [
    "LITTLE",
    "as_called",
    "autocasting",
    "coarsest",
    "copied",
    "evaluating",
    "lasting",
    "memory_bytes",
    "named_parameters",
    "parameters_of",
    "plain_name",
    "preserved",
    "require_memory",
    "undisturbed",
    "usable",
]

P = ParamSpec("P")
T = TypeVar("T")

COMPILED = "_orig_mod."  # what torch.compile puts in front of parameter names
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda", "mps", "xpu")  # those that have autocast
GATHER = (
    "from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict; "
    "plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))"
)  # to be pasted; all processes run it
LITTLE = 2**20  # bytes that any device has: how much it has need not be asked
FALLBACK_BYTES = 16 * 2**30  # taken for the memory where the system does not tell


def plain_name(name: str) -> str:
    """A parameter name or pattern without what ``torch.compile`` and parallel wrappers put in front."""
    return name.replace(COMPILED, "").removeprefix("module.")


def usable(model: nn.Module) -> nn.Module:
    """The plain module inside compiled and parallel wrappers.

    Raises:
        UnsupportedLayer: for a model that cannot be handled (scripted, sharded, not yet initialised, without data, of
            another number type); names the module path and a way out.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while _is_compiled(model) or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        (model,) = model.children()
    modules, parameters = list(model.named_modules()), named_parameters(model)
    for path, module in modules:
        _refuse_module(path, module)
    for name, parameter in parameters.items():
        _refuse_parameter(name, parameter)
    for name, buffer in model.named_buffers():
        _refuse_inference("buffer", name, buffer)
    integers = [name.rpartition(".")[0] for name, p in parameters.items() if not p.is_floating_point()]
    integers += [path for path, module in modules if ".quantized" in type(module).__module__]
    if integers and not any(p.requires_grad for p in parameters.values()):
        raise UnsupportedLayer(
            f"module {integers[0]!r} is quantised, and whole numbers have no gradients; pass the float model (or keep "
            "trainable parameters, such as adapters, in floating point: the quantised ones then stay as they are)"
        )
    return model


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """``dict(model.named_parameters())``, each of its shape, in a fraction of the time."""
    found: dict[str, Tensor] = {}
    if _walk(model, "", found, set(), set()):
        return found
    return dict(model.named_parameters())


def _walk(module: nn.Module, start: str, found: dict[str, Tensor], modules: set[int], parameters: set[int]) -> bool:
    """Collects a tree's parameters in torch's order; ``False`` where a class has an order of its own."""
    kind = type(module)
    if kind.named_parameters is not _NAMED[0] or kind.named_modules is not _NAMED[1]:
        return False
    modules.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in parameters:
            parameters.add(id(parameter))
            found[start + name] = parameter
    for name, child in module._modules.items():
        if child is None or id(child) in modules:
            continue
        if not _walk(child, f"{start}{name}.", found, modules, parameters):
            return False
    return True


_NAMED = nn.Module.named_parameters, nn.Module.named_modules


def parameters_of(
    model: nn.Module, names: Sequence[str], shapes: Sequence[tuple[int, ...]], whose: str
) -> dict[str, Tensor]:
    """The model's parameters ``names``, each of its shape, by name.

    Args:
        model: the module.
        names, shapes: what it has to have.
        whose: who says so, for the message.

    Raises:
        ShapeMismatch: if it does not have one, or in another shape (a layer was replaced); names it.
        UnsupportedLayer: if one holds no numbers any more.
    """
    named = named_parameters(model)
    wrong = [
        f"{name!r} of shape {shape}, the model has {tuple(named[name].shape) if name in named else 'no such parameter'}"
        for name, shape in zip(names, shapes, strict=True)
        if name not in named or tuple(named[name].shape) != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more that do not fit)" if len(wrong) > 1 else ""
        module = wrong[0].split("'")[1].rpartition(".")[0]
        raise ShapeMismatch(
            f"{whose} has parameter {wrong[0]}{more}: a layer was replaced or removed (module {module!r}), or it is "
            "another architecture. Put the layer back, or fit a new posterior (make a new optimiser) for the model as "
            "it is now"
        )
    found = {name: named[name] for name in names}
    for name, parameter in found.items():
        if nn.parameter.is_lazy(parameter) or parameter.is_meta or parameter.is_inference():  # it has become so since
            _refuse_parameter(name, parameter)
    return found


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported for its own sake: it takes seconds
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _refuse_module(path: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind != "FullyShardedDataParallel" and not isinstance(module, torch.jit.ScriptModule):
        return
    where = f"module {path!r}" if path else "the model"
    if isinstance(module, torch.jit.ScriptModule) and (not path or any(p.requires_grad for p in module.parameters())):
        raise UnsupportedLayer(
            f"{where} ({kind}) is scripted or traced code, whose layers cannot be seen; pass the plain Python module "
            "it was made from (load its state_dict there)" + ("" if not path else ", or freeze it")
        )
    if kind == "FullyShardedDataParallel":
        raise UnsupportedLayer(
            f"{where} is {kind}: every process holds only a piece of each parameter; gather the full state_dict into "
            f"a plain copy of the model and pass that: {GATHER}"
        )


def _refuse_inference(kind: str, name: str, tensor: Tensor) -> None:
    if not nn.parameter.is_lazy(tensor) and tensor.is_inference():
        path = name.rpartition(".")[0]
        raise UnsupportedLayer(
            f"{kind} {name!r}{f' (module {path!r})' if path else ''} was made inside torch.inference_mode(), and no "
            "derivative can be taken of such tensors. Make, load or convert the model outside of it, or copy it there: "
            "with torch.inference_mode(False): model = copy.deepcopy(model)"
        )


def _refuse_parameter(name: str, parameter: Tensor) -> None:
    _refuse_inference("parameter", name, parameter)
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    if plain and parameter.dtype in FLOATS and not parameter.is_meta:
        return
    path = name.rpartition(".")[0]
    where = f"parameter {name!r} (module {path!r})" if path else f"parameter {name!r}"
    if is_lazy(parameter):
        raise UnsupportedLayer(
            f"{where} is lazy and has no shape yet; run one batch through the model first (model(x)), then train it"
        )
    if parameter.is_meta:
        raise UnsupportedLayer(
            f"{where} is on the meta device and holds no numbers; load the weights first (load_state_dict(..., "
            "assign=True)), without offloading"
        )
    if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
        raise UnsupportedLayer(
            f"{where} is sharded over processes (DTensor); gather the full state_dict into a plain copy of the model "
            f"and pass that: {GATHER}"
        )
    if not parameter.requires_grad:
        return
    if parameter.is_complex():
        raise UnsupportedLayer(
            f"{where} is complex ({parameter.dtype}); store its real and imaginary parts as two real parameters "
            "(torch.view_as_complex in forward), or freeze it"
        )
    if parameter.dtype not in FLOATS:
        raise UnsupportedLayer(
            f"{where} has type {parameter.dtype}, which is for storage only; convert the model "
            "(model.to(torch.bfloat16)), or freeze it"
        )


def copied(model: nn.Module) -> nn.Module:
    """A copy of a module and its parameters.

    Raises:
        UnsupportedLayer: if it cannot be copied; names what is known to stand in the way.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError, copy.Error) as error:
        raise UnsupportedLayer(
            f"{type(model).__name__} cannot be copied ({error}); after torch's pruning or its old weight_norm make the "
            "weights parameters again first: torch.nn.utils.prune.remove(module, 'weight'), "
            "torch.nn.utils.remove_weight_norm(module)"
        ) from error


# ------------------------------------------------------------------------------------------------- settings


# for the whole process, whatever thread asks for it
_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))
_AUTOCAST: ContextVar[tuple[tuple[str, torch.dtype], ...]] = ContextVar("autocast", default=())


@contextmanager
def undisturbed() -> Iterator[None]:
    """Autocast off and compiled code run as plain Python; :func:`as_called` turns the caller's autocast on again."""
    active = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _casting() if torch.is_autocast_enabled(kind))
    if not active and "torch._dynamo" not in sys.modules:
        yield
        return
    with ExitStack() as stack:
        if active:
            token = _AUTOCAST.set(active)
            stack.callback(_AUTOCAST.reset, token)
        for kind, _ in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(_EAGER())
        yield


@functools.cache
def _casting() -> tuple[str, ...]:
    """The devices with autocast that this build of torch knows."""
    known = []
    for kind in DEVICES:
        with suppress(RuntimeError):
            torch.is_autocast_enabled(kind)
            known.append(kind)
    return tuple(known)


@contextmanager
def as_called() -> Iterator[None]:
    """The model's forward pass runs under the autocast that was on when the package was called."""
    with ExitStack() as stack:
        for kind, dtype in _AUTOCAST.get():
            # no cache: a copy of a weight that was cached without a graph would cut the weight off
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield


def autocasting() -> bool:
    """Whether the caller has autocast on, so that the model's forward pass runs under it."""
    return bool(_AUTOCAST.get())


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The floating type with the largest rounding error among these and the caller's autocast types."""
    return max((*dtypes, *(dtype for _, dtype in _AUTOCAST.get())), key=lambda dtype: torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------------------- guard


_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


class _Snapshot:
    """What one module must look like afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = module.__dict__.copy()
        held = [value for value in self.attributes.values() if isinstance(value, (dict, list, set))]
        self.containers = [(value, value.copy() if value else None) for value in held]  # most are empty: of hooks
        kept = [b for b in module._buffers.values() if b is not None]
        if getattr(module, "max_norm", None) is not None:
            kept += list(module.parameters(recurse=False))
        self.tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in kept]

    def without_backward_hooks(self) -> None:
        """Until :meth:`restore`: what hooks make of a gradient (masks, clipping) is no derivative of the outputs."""
        for name in _BACKWARD:
            if self.attributes.get(name):
                self.module.__dict__[name] = type(self.attributes[name])()

    def restore(self) -> None:
        """Puts attributes, containers and tensors back; tensors only if something wrote to them."""
        own = self.module.__dict__
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        for current, contents in self.containers:
            _put_back(current, contents)
        for tensor, version, content in self.tensors:
            # batch normalisation writes its running statistics without a new version
            unseen = tensor.layout is torch.strided and not torch.equal(tensor, content)
            if tensor._version != version or unseen:
                with torch.no_grad():
                    tensor.copy_(content)


def _put_back(container: Any, contents: Any) -> None:
    """Gives a dict, list or set the contents that it had; ``None``: it was empty."""
    if container if contents is None else _identities(container) != _identities(contents):
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(contents or ())


def _identities(container: dict[Any, Any] | list[Any] | set[Any]) -> list[Any]:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return [id(value) for value in container]


class lasting:
    """Tensors made inside can be kept and used anywhere, also if the caller is in inference mode (then: no graph).

    A context, or the decorator of a call; nothing is done where nothing has to be.
    """

    def __enter__(self) -> None:
        self._stack = ExitStack()
        if torch.is_inference_mode_enabled():
            self._stack.enter_context(torch.inference_mode(False))
            self._stack.enter_context(torch.no_grad())

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __call__(self, call: Callable[P, T]) -> Callable[P, T]:
        """The call inside such a context."""

        @functools.wraps(call)
        def lasting_call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not torch.is_inference_mode_enabled():
                return call(*args, **kwargs)
            with lasting():
                return call(*args, **kwargs)

        return lasting_call


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """As :func:`preserved`, where nothing runs inside but the model itself: no loader, no ``forward`` of the user.

    A sequence of torch's own modules then neither writes anything nor draws random numbers, so that nothing of it has
    to be remembered.
    """
    if read(model) is None:
        with preserved(model):
            yield
        return
    apart = nullcontext() if original(model) is not model else alone(model)
    with apart, undisturbed(), torch.inference_mode(False):  # no such sequence asks for its modes
        yield


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, for models whose forward pass writes nothing."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.__dict__["training"] = False  # past the checks of whether it is a parameter
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the model and the caller's random states are what they were.

    Inside, compiled modules run as plain Python, and the caller's autocast is on for the model only
    (:func:`as_called`), and backward hooks of parameters and modules do not fire: curvature is that of the outputs,
    whatever somebody makes of their gradients in training.

    Other threads that want the same modules wait (:mod:`laplace_kf.occupied`).

    Of the model: every module's mode and attributes, its buffers, and the weights of embeddings that renormalise
    themselves (``max_norm``). Random states are those of torch (CPU and the model's accelerators), numpy and Python:
    loaders shuffle and augment from them.
    """
    apart = nullcontext() if original(model) is not model else alone(model)  # a double belongs to its call
    with apart, _preserved(model):
        yield


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    if read(model) is not None:
        with same_random_states(), undisturbed(), torch.inference_mode(False), _modes(model):
            yield
        return
    modules = [_Snapshot(module) for module in model.modules()]
    hooked = [(p, p._backward_hooks) for p in model.parameters() if p._backward_hooks and original(model) is model]
    shared = {id(c): c for m in model.modules() if hasattr(c := m.__dict__.get("config"), "__dict__")}
    modules[0].containers += [(vars(c), vars(c).copy()) for c in shared.values()]  # a kind of loss is noted there
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    states = [(device, getattr(torch, device.type).get_rng_state(device)) for device in devices]
    try:
        for snapshot in modules:
            if snapshot.module.training:
                snapshot.module.training = False
            snapshot.without_backward_hooks()
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        # curvature needs a graph, also for a caller in inference mode
        with same_random_states(), undisturbed(), torch.inference_mode(False):
            yield
    finally:
        for snapshot in modules:
            snapshot.restore()
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
        for device, state in states:
            with suppress(RuntimeError):
                getattr(torch, device.type).set_rng_state(state, device)


# --------------------------------------------------------------------------------------------------- memory


def memory_bytes(device: torch.device) -> int:
    """All the memory of a device in bytes, used or not: more can certainly not be had."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _machine_bytes(int(time.monotonic()))


@functools.lru_cache(maxsize=1)  # every minibatch asks, and a container's limit may change meanwhile
def _machine_bytes(second: int) -> int:
    limits = [FALLBACK_BYTES]
    with suppress(AttributeError, ValueError, OSError):
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # the limit of a container; "max" without one
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def require_memory(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Refuses up front what cannot fit.

    Args:
        needed: bytes.
        device: where.
        what, instead: for the message, what needs them and the way out.

    Raises:
        IncompatiblePair: if the device does not have that much memory; gives both numbers.
    """
    if needed > LITTLE and needed > (there := memory_bytes(device)):
        raise IncompatiblePair(
            f"{what} needs {_readable(needed)} of memory; {device} has {_readable(there)} in all. {instead}"
        )


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
