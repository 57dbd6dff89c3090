"""The door: every form of batch a user may bring becomes (outputs, targets) here and nowhere else.

A batch is ``(x, y)``, ``((x1, x2, ...), y)``, or a mapping whose targets stand under ``"labels"`` and whose other
entries are keyword arguments of the model. Anything else goes through ``forward(model, batch) -> (outputs, targets)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import NonFinite, ShapeMismatch

__all__ = ["Forward", "as_batches", "check_finite", "default_forward", "map_examples", "model_outputs", "run"]

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
BATCH_SIZE = 256  # minibatch size when whole tensors are given instead of a loader


def model_outputs(model: nn.Module, inputs: Any) -> Tensor:
    """Calls the model on one input structure: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        The output tensor; of a structured output, its ``logits``.

    Raises:
        ShapeMismatch: if the model returns neither a tensor nor something with ``logits``.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
    elif isinstance(inputs, (tuple, list)):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return as_tensor(outputs)


def as_tensor(outputs: Any) -> Tensor:
    """The output tensor of a model call (``.logits`` or ``["logits"]`` of a structured one)."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ShapeMismatch(
        f"the model returned {type(outputs).__name__}, but one tensor of outputs is needed; "
        "pass forward=(model, batch) -> (outputs, targets) to pick it"
    )


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """``(outputs, targets)`` of ``(x, y)``, ``((x1, x2, ...), y)`` or a mapping with ``"labels"``.

    Raises:
        ShapeMismatch: for any other kind of batch, naming its type and the way out.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ShapeMismatch(
                f"a mapping batch needs its targets under 'labels' (keys: {sorted(map(str, batch))}); "
                "otherwise pass forward=(model, batch) -> (outputs, targets)"
            )
        return model_outputs(model, batch), batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model_outputs(model, batch[0]), batch[1]
    what = f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise ShapeMismatch(
        f"a batch must be (x, y), ((x1, x2, ...), y) or a mapping with 'labels', got {what}; "
        "otherwise pass forward=(model, batch) -> (outputs, targets)"
    )


def run(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Any]:
    """Outputs ``(N, ...)`` and targets of one batch, through ``forward`` if there is one.

    The model gets copies: one that changes its input in place must not change the user's data, or what the next pass
    sees.
    """
    batch = private(batch)
    if forward is None:
        return default_forward(model, batch)
    outputs, targets = forward(model, batch)
    return as_tensor(outputs), targets


def as_batches(data: Any) -> Iterable[Any]:
    """A loader, an iterable of batches, or one pair of whole tensors, as an iterable of batches.

    A pair ``(x, y)`` with equally long tensors (or ``((x1, x2), y)``) is cut into minibatches of ``BATCH_SIZE``.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        first = data[0]
        leaves = list(tensors_of(first))
        if leaves and all(leaf.dim() and leaf.shape[0] == data[1].shape[0] for leaf in leaves):
            return _Slices((first, data[1]))
        if isinstance(first, Tensor):
            raise ShapeMismatch(
                f"inputs {tuple(first.shape)} and targets {tuple(data[1].shape)} do not have the same length"
            )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ShapeMismatch(f"expected a loader, an iterable of batches or a pair (x, y), got {type(data).__name__}")
    return data


class _Slices:
    """Minibatches of whole tensors; can be iterated any number of times."""

    def __init__(self, batch: tuple[Any, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return -(-self.batch[1].shape[0] // BATCH_SIZE)

    def __iter__(self) -> Iterator[Any]:
        total = self.batch[1].shape[0]
        for start in range(0, total, BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            yield map_examples(self.batch, total, partial(_take, part=part))


def _take(tensor: Tensor, part: slice) -> Tensor:
    return tensor[part]


def tensors_of(structure: Any) -> Iterator[Tensor]:
    """The tensors of a nested tuple, list or mapping, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from tensors_of(value)
    elif isinstance(structure, Sequence) and not isinstance(structure, (str, bytes)):
        for value in structure:
            yield from tensors_of(value)


def private(structure: Any) -> Any:
    """The structure with copies of its tensors (of any shape)."""
    return _map(structure, torch.clone)


def map_examples(structure: Any, count: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies ``change`` to every tensor of shape ``(count, ...)`` and keeps the rest."""
    return _map(structure, lambda t: change(t) if t.dim() and t.shape[0] == count else t)


def to_device(structure: Any, device: torch.device) -> Any:
    """The structure with its tensors on ``device``."""
    return _map(structure, lambda t: t.to(device, non_blocking=True))


def _map(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, Mapping):
        return {key: _map(value, change) for key, value in structure.items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_map(value, change) for value in structure))
    if isinstance(structure, (tuple, list)):
        return type(structure)(_map(value, change) for value in structure)
    return structure


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
