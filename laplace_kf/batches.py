"""The door: every form of batch a user may bring becomes (outputs, targets) here and nowhere else.

A batch is ``(x, y)``, ``((x1, x2, ...), y)``, or a mapping whose targets stand under ``"labels"`` and whose other
entries are keyword arguments of the model; entries that the model's ``forward`` does not name (``"idx"``, ``"text"``)
are left out, unless it takes ``**kwargs``. ``x`` may itself be a tuple (positional arguments) or a mapping (keyword
arguments) of anything. A batch, or ``x``, may be a graph (:mod:`laplace_kf.graphs`). Anything else goes through
``forward(model, batch) -> (outputs, targets)``, which may take named tuples, dataclasses and nests of all these: the
package moves and cuts the tensors inside them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from laplace_kf import conventions, graphs
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.models import as_called

__all__ = [
    "Forward",
    "as_batches",
    "check_batch",
    "check_finite",
    "check_rows",
    "default_forward",
    "inputs_of",
    "map_examples",
    "model_outputs",
    "predicted",
    "run",
    "slices",
]

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
BATCH_SIZE = 256  # minibatch size when whole tensors are given instead of a loader


def model_outputs(model: nn.Module, inputs: Any) -> Tensor:
    """Calls the model on one input structure: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        The output tensor; of a structured output, its ``logits``.

    Raises:
        ShapeMismatch: if a mapping has none of the model's arguments, or lacks one; or if the model returns neither a
            tensor nor something with ``logits``.
    """
    if graphs.is_graph(inputs):
        return graphs.outputs(inputs, as_tensor(graphs.call(model, inputs)))
    if isinstance(inputs, Mapping):
        arguments = _arguments(model, inputs)
        if conventions.decoder_inputs_from_labels(model, inputs):
            arguments["labels"] = inputs["labels"]
        outputs = model(**arguments)
    elif isinstance(inputs, (tuple, list)):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return as_tensor(outputs)


def _arguments(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that the model's ``forward`` takes; its targets (``"labels"``) are none of them."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # no signature to be had
        return given
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing or not any(p.name in given for p in named):
        raise ShapeMismatch(
            f"a mapping is given to {type(model).__name__}.forward by keyword: its entries {_keys(given)} lack "
            f"{missing or [p.name for p in named]}; rename them, or pass forward=lambda model, batch: "
            '(model(batch["..."]), batch["labels"])'
        )
    return {p.name: given[p.name] for p in named if p.name in given}


def _keys(mapping: Mapping[Any, Any]) -> list[str]:
    return sorted(map(str, mapping))


def as_tensor(outputs: Any) -> Tensor:
    """The output tensor of a model call (``.logits`` or ``["logits"]`` of a structured one)."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    what = type(outputs).__name__
    if isinstance(outputs, Mapping):
        what += f" with {_keys(outputs)}"
    elif isinstance(outputs, (tuple, list)):
        what += f" of {len(outputs)}"
    raise ShapeMismatch(
        f"the model returned {what}, but one tensor of outputs is needed; pick it, or put several together, with "
        "forward=lambda model, batch: (model(batch[0])[0], batch[1])"
    )


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
        if "labels" not in batch:
            near = next((key for key in ("label", "targets", "target", "y") if key in batch), "...")
            raise ShapeMismatch(
                f"a mapping batch needs its targets under 'labels' (its keys: {_keys(batch)}); rename them, or pass "
                f'forward=lambda model, batch: (model(batch["..."]), batch["{near}"])'
            )
        return model_outputs(model, batch), conventions.targets(model, batch["labels"])
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model_outputs(model, batch[0]), batch[1]
    what, picked = type(batch).__name__, ("batch.x", "batch.y")
    if isinstance(batch, (tuple, list)):
        what, picked = f"{what} of {len(batch)}", ("batch[0]", "batch[1]")
    raise ShapeMismatch(
        f"a batch must be (x, y), ((x1, x2, ...), y) or a mapping with 'labels', got {what}; say which part is what "
        f"with forward=lambda model, batch: (model({picked[0]}), {picked[1]})"
    )


def run(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Any]:
    """Outputs ``(N, ...)`` and targets of one batch, through ``forward`` if there is one.

    The model gets copies, on the device of its first parameter: one that changes its input in place must not change the
    user's data, or what the next pass sees. Targets come back on the device of the outputs, which may be another one.
    """
    batch = private(_beside(batch, model))
    with as_called():
        outputs, targets = default_forward(model, batch) if forward is None else forward(model, batch)
    outputs = as_tensor(outputs)
    return outputs, to_device(targets, outputs.device)


def predicted(model: nn.Module, inputs: Any, forward: Forward | None) -> Tensor:
    """Outputs ``(N, ...)`` at inputs without targets: what the model takes, or a whole batch for ``forward``.

    Raises:
        ShapeMismatch: if ``forward`` cannot be called with it, if it gives another number of rows than a tensor
            ``inputs`` has examples, or if the model returns no tensor.
    """
    inputs = private(_beside(inputs, model))
    with as_called():
        if forward is None:
            return model_outputs(model, inputs)
        try:
            outputs = as_tensor(forward(model, inputs)[0])
            check_rows(inputs, outputs)
            return outputs
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ShapeMismatch(
                f"forward= does not work on the input of predict, {type(inputs).__name__}: {error!r}. It is called as "
                "in fit, so give it a whole batch of the same form; the targets in it are not looked at"
            ) from error


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
            f"predict was given {tuple(inputs.shape)}, {inputs.shape[0]} examples, and forward= made outputs of shape "
            f"{tuple(outputs.shape)} of it: it is called as in fit, and batch[0] of a tensor is its first example. "
            "Give it a whole batch of the same form: posterior.predict((x, None))"
        )


def _beside(structure: Any, model: nn.Module) -> Any:
    """The structure with its tensors on the device of the model's first parameter."""
    first = next(model.parameters(), None)
    return structure if first is None else to_device(structure, first.device)


def inputs_of(batch: Any, forward: Forward | None) -> Any:
    """What ``predict`` takes of a batch with targets: the batch itself for ``forward``, else its inputs."""
    return batch[0] if forward is None and isinstance(batch, (tuple, list)) else batch


def as_batches(data: Any) -> Iterable[Any]:
    """A loader, an iterable of batches, or whole tensors, as an iterable of batches.

    A pair ``(x, y)`` with equally long tensors (or ``((x1, x2), y)``), or a mapping of such tensors with ``"labels"``,
    is cut into minibatches of ``BATCH_SIZE``.

    Raises:
        ShapeMismatch: for anything else; names its type and the way out.
    """
    targets = None
    if graphs.is_graph(data):  # which would be iterated over entry by entry
        return [data]
    if isinstance(data, Mapping):
        targets = data.get("labels")
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        targets = data[1]
    if isinstance(targets, Tensor):
        leaves = list(tensors_of(data if isinstance(data, Mapping) else data[0]))
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
    return data


def _is_one_pair(data: Any) -> bool:
    """Whether the data are ``(x, targets)`` with several tensors of targets: ``(x, (y, scale))``."""
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and data[0].dim()):
        return False
    return isinstance(data[1], (tuple, Mapping)) and any(True for _ in tensors_of(data[1]))


def slices(batch: Any, total: int) -> Iterable[Any]:
    """Minibatches of nested tensors ``(total, ...)``.

    Raises:
        ShapeMismatch: if one of them has another length.
    """
    if any(leaf.dim() == 0 or leaf.shape[0] != total for leaf in tensors_of(batch)):
        found = [tuple(leaf.shape) for leaf in tensors_of(batch)]
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
    return tensor[part]


def tensors_of(structure: Any) -> Iterator[Tensor]:
    """The tensors of a nest of tuples, lists, mappings, dataclasses and graphs, in order."""
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


def private(structure: Any) -> Any:
    """The structure with copies of its tensors (of any shape)."""
    return _map(structure, torch.clone)


def map_examples(structure: Any, count: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` (which picks or repeats rows) to every tensor of shape ``(count, ...)`` and keeps the rest.

    A batch of ``count`` graphs becomes the batch of those that ``change`` picks.

    Raises:
        UnsupportedLayer: for packed sequences, whose examples are interleaved; for graphs that cannot be cut out.
    """
    return _map(structure, lambda t: change(t) if t.dim() and t.shape[0] == count else t, count)


def to_device(structure: Any, device: torch.device) -> Any:
    """The structure with its tensors on ``device``."""
    return _map(structure, lambda t: t.to(device, non_blocking=True))


def _map(structure: Any, change: Callable[[Tensor], Tensor], cuts: int | None = None) -> Any:
    """A new structure of the same types with its tensors changed; ``cuts``: of so many examples, some are taken out."""
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
        return _refilled(structure, {key: _map(value, change, cuts) for key, value in structure.items()})
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        named: Any = structure
        return named._replace(**{n: _map(getattr(named, n), change, cuts) for n in named._fields})
    if isinstance(structure, (tuple, list)):
        return type(structure)(_map(value, change, cuts) for value in structure)
    if _is_dataclass(structure):
        copied = copy.copy(structure)  # not through __init__, which may do more than store its arguments
        for field in dataclasses.fields(structure):
            if hasattr(structure, field.name):
                object.__setattr__(copied, field.name, _map(getattr(structure, field.name), change, cuts))
        return copied
    if graphs.is_graph(structure):
        if cuts is not None:
            return graphs.cut(structure, cuts, change)
        return graphs.mapped(structure, lambda value: _map(value, change))
    return structure


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


def check_batch(batch: Any, index: int, what: str, forward: Forward | None, missing: bool) -> None:
    """As :func:`check_finite` of a batch; NaN among its targets is let through where it marks ``missing`` ones.

    Where only ``forward`` knows what of a batch are its targets, NaN is let through everywhere, infinity nowhere.
    """
    if not missing:
        check_finite(batch, index, what)
    elif not getattr(forward, "plain", forward is None):
        check_finite(map_nan_away(batch), index, what)
    elif isinstance(batch, Mapping):
        check_finite({key: value for key, value in batch.items() if key != "labels"}, index, what)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        check_finite((batch[0], *batch[2:]), index, what)
    else:
        check_finite(batch, index, what)


def map_nan_away(structure: Any) -> Any:
    """The structure with 0 for every NaN of its tensors (of any shape)."""
    return _map(structure, lambda t: torch.where(torch.isnan(t), 0.0, t).to(t) if t.is_floating_point() else t)


def check_finite(structure: Any, index: int, what: str) -> None:
    """Raises :class:`NonFinite` if a floating tensor of the structure holds NaN or infinity.

    Args:
        structure: nested tensors.
        index: number of the batch, for the message.
        what: name of the tensor, for the message.
    """
    for tensor in tensors_of(structure):
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFinite(
                f"batch {index}: {what} of shape {tuple(tensor.shape)} has {bad} NaN or infinite "
                f"{'entry' if bad == 1 else 'entries'}; nothing was changed. Clean the data (or the model's outputs)."
            )
