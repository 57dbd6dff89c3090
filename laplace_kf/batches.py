"""The door: every form of batch a user may bring becomes (outputs, targets) here and nowhere else.

A batch is ``(x, y)``, ``((x1, x2, ...), y)``, or a mapping whose targets stand under ``"labels"`` (or ``"label"``) and
whose other entries are keyword arguments of the model; entries that the model's ``forward`` does not name (``"idx"``,
``"text"``) are left out, unless it takes ``**kwargs``. ``x`` may itself be a tuple (positional arguments) or a mapping
(keyword arguments) of anything. A batch, or ``x``, may be a graph (:mod:`laplace_kf.graphs`). Anything else is said by
``inputs=`` and ``targets=``, or ``forward=`` (:mod:`laplace_kf.reading`), which may take named tuples, dataclasses and
nests of all these: their tensors are moved and cut. Whatever has ``__array__`` (numpy's arrays) becomes a tensor.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from laplace_kf import conventions, graphs
from laplace_kf.arrays import is_annotated, is_array, own_copy, tensor_of
from laplace_kf.errors import LaplaceKFError, NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.lookups import as_functions
from laplace_kf.models import as_called, named_parameters
from laplace_kf.returned import as_tensor, both, explained, readable, unread
from laplace_kf.segments import run_once

__all__ = [
    "Forward",
    "as_batches",
    "called",
    "check_finite",
    "check_rows",
    "default_forward",
    "inputs_of",
    "leaves_of",
    "map_examples",
    "mapped",
    "model_outputs",
    "predicted",
    "run",
    "slices",
    "tensors_of",
    "to_tensors",
    "with_labels",
]

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
BATCH_SIZE = 256  # minibatch size when whole tensors are given instead of a loader


def model_outputs(model: nn.Module, inputs: Any, named: str = "batch") -> Tensor:
    """Calls the model on one input structure: a tensor, a tuple of positional or a mapping of keyword arguments.

    Args:
        model: the module.
        inputs: the structure, of tensors ``(N, ...)``.
        named: where a mapping stands in what the user gave, for messages.

    Returns:
        The output tensor; of a structured output, its ``logits``.

    Raises:
        ShapeMismatch: if a mapping lacks an argument of the model, or if the model returns nothing with ``logits``.
    """
    if graphs.is_graph(inputs):
        return graphs.outputs(inputs, as_tensor(graphs.call(model, inputs)))
    as_given: Callable[[], str] | None = None
    with conventions.decoder_explained(model, inputs):
        if isinstance(inputs, Mapping):
            arguments = _arguments(model, inputs)
            if conventions.decoder_inputs_from_labels(model, inputs):
                arguments["labels"] = inputs["labels"]
            as_given = partial(conventions.by_name, list(arguments), named)
            outputs = model(**arguments)
        elif isinstance(inputs, (tuple, list)):
            as_given, outputs = lambda: "*batch[0]", model(*inputs)
        else:
            outputs = model(inputs)
    return as_tensor(conventions.first_of(model, outputs), as_given)


def with_labels(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What the model returns for a mapping batch, labels included; ``None`` if it does not take them by name."""
    if "labels" not in batch or not conventions.takes_labels(model):
        return None
    return model(**_arguments(model, batch), labels=batch["labels"])


def _arguments(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that the model's ``forward`` takes; its targets are none of them."""
    left_out = "labels", conventions.target_key(model, inputs)
    given = {key: value for key, value in inputs.items() if key not in left_out}
    named = conventions.arguments(model)
    if named is None:
        return given
    missing = _missing(model, given)
    if missing and len(missing) == 1 and "image" in given:  # MONAI's dictionaries
        return {missing[0]: given["image"], **{p.name: given[p.name] for p in named if p.name in given}}
    if missing or not any(p.name in given for p in named):
        line = conventions.lines_of_mapping(model, inputs, conventions.target_like(inputs))
        raise ShapeMismatch(
            f"a mapping is given to {type(model).__name__}.forward by keyword: its entries {_keys(given)} lack "
            f"{missing or [p.name for p in named]}; rename them, or pass {line}{_whole(missing)}"
        )
    return {p.name: given[p.name] for p in named if p.name in given}


def _missing(model: nn.Module, given: Mapping[Any, Any]) -> list[str]:
    """The arguments that ``forward`` needs and a mapping does not have."""
    return [p.name for p in conventions.arguments(model) or () if p.default is p.empty and p.name not in given]


def _keys(mapping: Mapping[Any, Any]) -> list[str]:
    return sorted(map(str, mapping))


def _whole(missing: Sequence[str]) -> str:  # where forward lacks one argument, the mapping may be all of it
    text = f" (batch itself, if {missing[0]!r} is a mapping: inputs=lambda batch: (batch,))" if missing else ""
    return text if len(missing) == 1 else ""


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """``(outputs, targets)`` of ``(x, y)``, ``((x1, x2, ...), y)`` or a mapping with ``"labels"``.

    Raises:
        ShapeMismatch: for any other kind of batch, naming its type and the way out.
    """
    paired = isinstance(batch, (tuple, list)) and len(batch) == 2 and graphs.is_graph(batch[0])
    if paired or graphs.is_graph(batch):
        graph, given = batch if paired else (batch, None)
        raw = as_tensor(graphs.call(model, graph))
        return graphs.outputs(graph, raw), graphs.targets(graph, raw, given)
    if isinstance(batch, Mapping):
        key = conventions.target_key(model, batch)
        if key is None:
            raise ShapeMismatch(
                f"a mapping batch needs its targets under 'labels' (its keys: {_keys(batch)}); rename them, or pass "
                f"{conventions.lines_of_mapping(model, batch, conventions.target_like(batch))}"
                f"{_whole(_missing(model, batch))}"
            )
        conventions.require_labels(key, batch[key])
        return model_outputs(model, batch), conventions.targets(model, batch[key])
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model_outputs(model, batch[0], "batch[0]"), batch[1]
    raise unread(batch, None if isinstance(batch, Tensor) else conventions.lines_of(model, batch))


def run(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Any]:
    """Outputs ``(N, ...)`` and targets of one batch, through ``forward`` if there is one.

    The model gets copies, on the device of its first parameter: one that changes its input in place must not change the
    user's data, or what the next pass sees. Targets come back on the device of the outputs, which may be another one.
    """
    batch = private(_beside(batch, model))
    with as_called(), as_functions(model), run_once(), explained(model, batch, forward):
        outputs, targets = default_forward(model, batch) if forward is None else both(forward(model, batch))
    outputs = as_tensor(outputs)
    return outputs, to_device(to_tensors(targets, model), outputs.device)


def predicted(model: nn.Module, inputs: Any, forward: Forward | None) -> Tensor:
    """Outputs ``(N, ...)`` at inputs without targets: what the model takes, or a whole batch for ``forward``.

    Raises:
        ShapeMismatch: if ``forward`` cannot be called with it, if it gives another number of rows than a tensor
            ``inputs`` has examples, or if the model returns no tensor.
    """
    inputs = private(_beside(inputs, model))
    with as_called(), as_functions(model), run_once():
        return called(model, inputs, forward)


def called(model: nn.Module, inputs: Any, forward: Forward | None) -> Tensor:
    """As :func:`predicted`, outputs ``(N, ...)``, on the inputs themselves, which the model may then change."""
    at_inputs = model_outputs if forward is None else getattr(forward, "outputs_at", None)  # of reading.Reading
    if at_inputs is not None:
        with explained(model, inputs, None):
            return as_tensor(at_inputs(model, inputs))
    assert forward is not None
    try:
        with explained(model, inputs, None):
            outputs = as_tensor(both(forward(model, inputs), most=3)[0])
    except LaplaceKFError:
        raise
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ShapeMismatch(
            f"forward= does not work on the input of predict, {type(inputs).__name__}: {error!r}. It is called as "
            "in fit, so give it a whole batch of the same form; the targets in it are not looked at. With inputs= and "
            "targets= in place of forward=, predict takes what the model takes"
        ) from error
    check_rows(inputs, outputs)
    return outputs


def check_rows(inputs: Any, outputs: Tensor) -> None:
    """Raises where a tensor given to ``predict`` was read as a batch: ``batch[0]`` of it is its first example.

    Args:
        inputs: what ``predict`` was given; a tensor ``(N, ...)`` is looked at.
        outputs: of the model, ``(N, ...)``.

    Raises:
        ShapeMismatch: if the outputs have another number of rows, with what to give instead.
    """
    if isinstance(inputs, Tensor) and inputs.dim() and (outputs.dim() < 2 or outputs.shape[0] != inputs.shape[0]):
        raise ShapeMismatch(
            f"forward= makes outputs of shape {tuple(outputs.shape)} of {inputs.shape[0]} examples, a tensor of shape "
            f"{tuple(inputs.shape)}: it is called as in fit, and batch[0] of a tensor is its first example. "
            "Give it a whole batch of the same form, posterior.predict((x, None)); or construct the posterior with "
            "inputs=lambda batch: batch[0], targets=lambda batch: batch[1] in place of forward=, and predict takes x"
        )


def _beside(structure: Any, model: nn.Module) -> Any:
    """The structure with its tensors on the device of the model's first parameter."""
    first = next(iter(named_parameters(model).values()), None)
    return structure if first is None else to_device(structure, first.device)


def inputs_of(batch: Any, forward: Forward | None) -> Any:
    """What ``predict`` takes of a batch with targets: the batch itself for ``forward``, else its inputs."""
    of_tensor = getattr(forward, "inputs_of", None)  # of laplace_kf.reading.Reading
    if of_tensor is not None:
        return of_tensor(batch)
    return batch[0] if forward is None and isinstance(batch, (tuple, list)) else batch


def as_batches(data: Any, model: nn.Module | None = None) -> Iterable[Any]:
    """A loader, an iterable of batches, or whole tensors, as an iterable of batches of tensors.

    A pair ``(x, y)`` with equally long tensors (or ``((x1, x2), y)``), or a mapping of such tensors with ``"labels"``,
    is cut into minibatches of ``BATCH_SIZE``.

    Args:
        data: what the user gave; arrays become tensors, whole or batch by batch.
        model: whose floating type arrays get.

    Raises:
        ShapeMismatch: for anything else; names its type and the way out.
    """
    targets = None
    if graphs.is_graph(data):  # which would be iterated over entry by entry
        return [data]
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if isinstance(data, Mapping) or (pair and (isinstance(data, tuple) or is_array(data[1]))):
        data = to_tensors(data, model)
    if isinstance(data, Mapping):
        targets = data.get("labels", data.get("label"))
    elif pair:
        targets = data[1]
    if isinstance(targets, Tensor):
        leaves = list(map(readable, tensors_of(data if isinstance(data, Mapping) else data[0])))
        if leaves and all(leaf.dim() and leaf.shape[:1] == targets.shape[:1] for leaf in leaves):
            return _Slices(data, targets.shape[0])
        if isinstance(data[0] if not isinstance(data, Mapping) else None, Tensor):
            raise ShapeMismatch(
                f"inputs {tuple(data[0].shape)} and targets {tuple(targets.shape)} do not have the same length"
            )
        if leaves and isinstance(data, tuple) and isinstance(data[0], (tuple, Mapping)):
            raise ShapeMismatch(
                f"inputs {[tuple(leaf.shape) for leaf in leaves]} and targets {tuple(targets.shape)} do not all have "
                "the same length, so they cannot be cut into minibatches; pass a loader, or [(inputs, targets)] as one"
            )
    if _is_one_pair(data):
        return slices(data, data[0].shape[0])
    if isinstance(data, Mapping):
        raise ShapeMismatch(
            f"a mapping with keys {_keys(data)} is one batch, not data; pass [batch], or equally long tensors with the "
            "targets under 'labels'"
        )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        way = "; wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)" if hasattr(data, "__getitem__") else ""
        raise ShapeMismatch(
            f"expected a loader, an iterable of batches or a pair (x, y), got {type(data).__name__}"
            + ("" if isinstance(data, Tensor) else way)
        )
    return (to_tensors(batch, model) for batch in data) if isinstance(data, Iterator) else _Batches(data, model)


class _Batches:
    """Batches of a loader with tensors for arrays; as long as it, and iterated as often."""

    def __init__(self, data: Iterable[Any], model: nn.Module | None) -> None:
        self.data, self.model = data, model

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # TypeError where the loader has no length

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            yield to_tensors(batch, self.model)


def _is_one_pair(data: Any) -> bool:
    """Whether the data are ``(x, targets)`` with several tensors of targets: ``(x, (y, scale))``."""
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and data[0].dim()):
        return False
    return isinstance(data[1], (tuple, Mapping)) and any(True for _ in tensors_of(data[1]))


def slices(batch: Any, total: int) -> Iterable[Any]:
    """Minibatches of nested tensors ``(total, ...)``; raises :class:`ShapeMismatch` for one of another length."""
    found = [tuple(leaf.shape) for leaf in tensors_of(batch)]
    if any(shape[:1] != (total,) for shape in found):
        raise ShapeMismatch(
            f"the tensors {found} do not all have the same length, so they cannot be cut into minibatches"
        )
    return _Slices(batch, total)


class _Slices:
    """Minibatches of whole tensors, all ``total`` long; can be iterated any number of times."""

    def __init__(self, batch: Any, total: int) -> None:
        self.batch, self.total = batch, total

    def __len__(self) -> int:
        return -(-self.total // BATCH_SIZE)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.total, BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            yield map_examples(self.batch, self.total, partial(_take, part=part))


def _take(tensor: Tensor, part: slice) -> Tensor:
    return tensor[part] if tensor.layout is torch.strided else tensor.to_dense()[part]


def tensors_of(structure: Any) -> Iterator[Tensor]:
    """The tensors (any shapes) of a nest of tuples, lists, mappings, dataclasses and graphs, in order."""
    if isinstance(structure, Tensor):
        yield structure
    else:
        for value in _parts(structure):
            yield from tensors_of(value)


def graphs_of(structure: Any) -> Iterator[Any]:
    """The graphs (:mod:`laplace_kf.graphs`) of a nest, in order."""
    if graphs.is_graph(structure):
        yield structure
    elif not isinstance(structure, Tensor):
        for value in _parts(structure):
            yield from graphs_of(value)


def _parts(structure: Any) -> Iterable[Any]:
    """What a container holds; nothing of anything else."""
    if isinstance(structure, Mapping):
        return structure.values()
    if isinstance(structure, Sequence) and not isinstance(structure, (str, bytes)):
        return structure
    if _is_dataclass(structure):
        return [getattr(structure, field.name, None) for field in dataclasses.fields(structure)]
    return graphs.values(structure) if graphs.is_graph(structure) else ()


def _is_dataclass(structure: Any) -> bool:
    return dataclasses.is_dataclass(structure) and not isinstance(structure, type)


def mapped(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The structure with its tensors ``(N, ...)`` changed."""
    return _map(structure, change)


def private(structure: Any) -> Any:
    """The structure with copies of its tensors (of any shape), and of objects that a model may write into (caches)."""
    return _map(structure, torch.clone, other=own_copy)


def map_examples(structure: Any, count: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` (which picks or repeats rows) to every tensor of shape ``(count, ...)`` and keeps the rest.

    A batch of ``count`` graphs becomes the batch of those that ``change`` picks.

    Raises:
        UnsupportedLayer: for packed sequences, whose examples are interleaved; for graphs that cannot be cut out.
    """
    return _map(structure, lambda t: change(t) if t.dim() and t.shape[0] == count else t, count)


def to_tensors(structure: Any, model: nn.Module | None = None) -> Any:
    """The structure with a tensor (of the same shape) for every array in it.

    Floating arrays get the floating type of the model's first parameter, so that numpy's float64 fits a float32 model;
    integers keep theirs; text stays as it is. Tensors of a subclass that only carries notes along (MONAI's) are taken
    as plain ones.
    """
    if not any(is_array(leaf) or is_annotated(leaf) for leaf in leaves_of(structure)):
        return structure
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point()) if model is not None else iter(())
    return _map(
        structure,
        lambda t: t.as_subclass(Tensor) if is_annotated(t) else t,
        other=partial(tensor_of, next(kinds, None)),
    )


def leaves_of(structure: Any) -> Iterator[Any]:
    """Everything in a nest that is no container."""
    if isinstance(structure, Mapping):
        for value in structure.values():
            yield from leaves_of(value)
    elif isinstance(structure, (tuple, list)) and not isinstance(structure, PackedSequence):
        for value in structure:
            yield from leaves_of(value)
    elif _is_dataclass(structure):
        for field in dataclasses.fields(structure):
            yield from leaves_of(getattr(structure, field.name, None))
    else:
        yield structure


def to_device(structure: Any, device: torch.device) -> Any:
    """The structure with its tensors on ``device``."""
    return _map(structure, lambda t: readable(t).to(device, non_blocking=True))


def _map(
    structure: Any,
    change: Callable[[Tensor], Tensor],
    cuts: int | None = None,
    other: Callable[[Any], Any] | None = None,
) -> Any:
    """A new structure of the same types with its tensors changed.

    Args:
        structure: nested tensors (of any shape).
        change: of a tensor.
        cuts: of so many examples, some are taken out.
        other: what becomes of anything that is neither tensor nor container.
    """
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, PackedSequence):
        if cuts is not None:
            raise UnsupportedLayer(
                "a batch holds a PackedSequence, in which examples are interleaved, and some parameters need single "
                "examples; put the padded tensor and the lengths into the batch and pack them inside the model"
            )
        data, sizes, *order = structure  # the sizes stay on the CPU, as torch demands
        return PackedSequence(change(data), sizes, *(None if o is None else change(o) for o in order))
    if isinstance(structure, Mapping):
        return _refilled(structure, {key: _map(value, change, cuts, other) for key, value in structure.items()})
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        named: Any = structure
        return named._replace(**{n: _map(getattr(named, n), change, cuts, other) for n in named._fields})
    if isinstance(structure, (tuple, list)):
        return type(structure)(_map(value, change, cuts, other) for value in structure)
    if _is_dataclass(structure):
        copied = copy.copy(structure)  # not through __init__, which may do more than store its arguments
        for field in dataclasses.fields(structure):
            if hasattr(structure, field.name):
                object.__setattr__(copied, field.name, _map(getattr(structure, field.name), change, cuts, other))
        return copied
    if graphs.is_graph(structure):
        if cuts is not None:
            return graphs.cut(structure, cuts, change)
        return graphs.mapped(structure, lambda value: _map(value, change, None, other))
    return structure if other is None else other(structure)


def _refilled(structure: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The mapping's own type (whose entries may also be attributes) with other values; a dict if that cannot be."""
    if type(structure) is dict:
        return values
    if isinstance(structure, MutableMapping):
        with suppress(TypeError, ValueError, RuntimeError):
            copied = copy.copy(structure)
            for key, value in values.items():
                copied[key] = value
            return copied
    return values


def check_finite(structure: Any, index: int, what: str) -> None:
    """Raises :class:`NonFinite` if a floating tensor of the structure holds NaN or infinity.

    Args:
        structure: nested tensors.
        index: number of the batch, for the message.
        what: name of the tensor, for the message.
    """
    for tensor in map(readable, tensors_of(structure)):
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            mask = bool((torch.isfinite(tensor) | (tensor == -torch.inf)).all())
            instead = " In place of a mask of 0 and -inf give a boolean mask, or torch.finfo(mask.dtype).min for -inf."
            raise NonFinite(
                f"batch {index}: {what} of shape {tuple(tensor.shape)} has {bad} NaN or infinite "
                f"{'entry' if bad == 1 else 'entries'}; nothing was changed. Clean the data (or the model's outputs)."
                + (instead if mask else "")
            )
