"""The user's model, before and while anything is done with it: wrappers taken off, kinds that cannot work refused.

Also the guard that leaves it as it was (:func:`preserved`), and the settings it runs under: the caller's autocast for
the model alone (the package's own arithmetic stays in full precision), and plain Python instead of compiled code, which
no tape can see into.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnsupportedLayer
from laplace_kf.randomness import same_random_states
from laplace_kf.replica import Shared

__all__ = [
    "as_called",
    "autocasting",
    "coarsest",
    "lasting",
    "memory_bytes",
    "parameters_of",
    "plain_name",
    "preserved",
    "require_memory",
    "undisturbed",
    "usable",
]

COMPILED = "_orig_mod."  # what torch.compile puts in front of parameter names
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda", "mps", "xpu")  # those that have autocast
GATHER = (
    "from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict; "
    "plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))"
)  # to be pasted; all processes run it
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
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while _is_compiled(model) or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        (model,) = model.children()
    for path, module in model.named_modules():
        _refuse_module(path, module)
    for name, parameter in model.named_parameters():
        _refuse_parameter(name, parameter)
    integers = [name.rpartition(".")[0] for name, p in model.named_parameters() if not p.is_floating_point()]
    integers += [path for path, module in model.named_modules() if ".quantized" in type(module).__module__]
    if integers and not any(p.requires_grad for p in model.parameters()):
        raise UnsupportedLayer(
            f"module {integers[0]!r} is quantised, and whole numbers have no gradients; pass the float model (or keep "
            "trainable parameters, such as adapters, in floating point: the quantised ones then stay as they are)"
        )
    return model


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
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
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
    return {name: named[name] for name in names}


def _is_compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported for its own sake: it takes seconds
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _refuse_module(path: str, module: nn.Module) -> None:
    where = f"module {path!r}" if path else "the model"
    kind = type(module).__name__
    trainable = any(p.requires_grad for p in module.parameters())
    if isinstance(module, torch.jit.ScriptModule) and (trainable or not path):
        raise UnsupportedLayer(
            f"{where} ({kind}) is scripted or traced code, whose layers cannot be seen; pass the plain Python module "
            "it was made from (load its state_dict there)" + ("" if not path else ", or freeze it")
        )
    if kind == "FullyShardedDataParallel":
        raise UnsupportedLayer(
            f"{where} is {kind}: every process holds only a piece of each parameter; gather the full state_dict into "
            f"a plain copy of the model and pass that: {GATHER}"
        )


def _refuse_parameter(name: str, parameter: Tensor) -> None:
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


# ------------------------------------------------------------------------------------------------- settings


# for the whole process, whatever thread asks for it
_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))
_AUTOCAST: ContextVar[tuple[tuple[str, torch.dtype], ...]] = ContextVar("autocast", default=())


@contextmanager
def undisturbed() -> Iterator[None]:
    """Autocast off and compiled code run as plain Python; :func:`as_called` turns the caller's autocast on again."""
    with ExitStack() as stack:
        active = tuple((kind, torch.get_autocast_dtype(kind)) for kind in DEVICES if _autocasts(kind))
        if active:
            token = _AUTOCAST.set(active)
            stack.callback(_AUTOCAST.reset, token)
        for kind, _ in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(_EAGER())
        yield


def _autocasts(kind: str) -> bool:
    with suppress(RuntimeError):  # this build of torch does not know the device
        return torch.is_autocast_enabled(kind)
    return False


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


class _Snapshot:
    """What one module must look like afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = module.__dict__.copy()
        self.containers = {
            name: value.copy() if value else None  # most are empty dictionaries of hooks
            for name, value in self.attributes.items()
            if isinstance(value, (dict, list, set))
        }
        kept = [b for b in module._buffers.values() if b is not None]
        if getattr(module, "max_norm", None) is not None:
            kept += list(module.parameters(recurse=False))
        self.tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in kept]

    def restore(self) -> None:
        """Puts attributes, containers and tensors back; tensors only if something wrote to them."""
        own = self.module.__dict__
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        for name, contents in self.containers.items():
            current = own[name]
            if not current and contents is None:
                continue
            if contents is None or _identities(current) != _identities(contents):
                current.clear()
                if contents is not None:
                    current.extend(contents) if isinstance(contents, list) else current.update(contents)
        for tensor, version, content in self.tensors:
            # batch normalisation writes its running statistics without a new version
            unseen = tensor.layout is torch.strided and not torch.equal(tensor, content)
            if tensor._version != version or unseen:
                with torch.no_grad():
                    tensor.copy_(content)


def _identities(container: dict[Any, Any] | list[Any] | set[Any]) -> list[Any]:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return [id(value) for value in container]


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made inside can be kept and used anywhere, also if the caller is in inference mode (then: no graph)."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the model and the caller's random states are what they were.

    Inside, compiled modules run as plain Python, and the caller's autocast is on for the model only
    (:func:`as_called`).

    Of the model: every module's mode and attributes, its buffers, and the weights of embeddings that renormalise
    themselves (``max_norm``). Random states are those of torch (CPU and the model's accelerators), numpy and Python:
    loaders shuffle and augment from them.
    """
    modules = [_Snapshot(module) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    states = [(device, getattr(torch, device.type).get_rng_state(device)) for device in devices]
    try:
        for snapshot in modules:
            if snapshot.module.training:
                snapshot.module.training = False
        # curvature needs a graph, also for a caller in inference mode
        with same_random_states(), undisturbed(), torch.inference_mode(False):
            yield
    finally:
        for snapshot in modules:
            snapshot.restore()
        for device, state in states:
            with suppress(RuntimeError):
                getattr(torch, device.type).set_rng_state(state, device)


# --------------------------------------------------------------------------------------------------- memory


def memory_bytes(device: torch.device) -> int:
    """All the memory of a device in bytes, used or not: more can certainly not be had."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
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
        what: what needs them, for the message.
        instead: the way out, for the message.

    Raises:
        IncompatiblePair: if the device does not have that much memory; gives both numbers.
    """
    there = memory_bytes(device)
    if needed > there:
        raise IncompatiblePair(
            f"{what} needs {_readable(needed)} of memory; {device} has {_readable(there)} in all. {instead}"
        )


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
