"""What a batch is made of, as the user says it: ``inputs=`` and ``targets=``, or ``forward=``.

``inputs=`` and ``targets=`` are two functions of a batch, so that ``outputs = model(*inputs(batch))``; ``predict`` then
takes what the model takes, or a whole batch. ``forward=`` is one function ``(model, batch) -> (outputs, targets)`` for
outputs that have to be picked or put together; whatever ``predict`` is given goes through it, so it is a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from laplace_kf.arrays import is_array, require_numbers
from laplace_kf.batches import Forward, model_outputs, to_tensors
from laplace_kf.errors import IncompatiblePair, ShapeMismatch

__all__ = ["Part", "Reading", "one_argument", "paired", "reading"]

Part = Callable[[Any], Any]
"""A function of a batch."""

_MISREADS = (KeyError, IndexError, TypeError, AttributeError, ValueError)


def reading(forward: Forward | None, inputs: Part | None, targets: Part | None) -> Forward | None:
    """The one function ``(model, batch) -> (outputs, targets)`` of what the user gave; ``None`` for the default forms.

    Raises:
        IncompatiblePair: for ``forward`` beside the others, for one of the two alone, or for what is no function.
    """
    for name, given in (("forward", forward), ("inputs", inputs), ("targets", targets)):
        if given is not None and not callable(given):
            raise IncompatiblePair(f"{name}= must be a function, got {type(given).__name__}; {_PASTE}")
    if inputs is None and targets is None:
        return forward
    if forward is not None:
        raise IncompatiblePair(
            "forward= says what a batch is made of, as inputs= and targets= do; give one or the other"
        )
    if inputs is None or targets is None:
        missing = "inputs" if inputs is None else "targets"
        raise IncompatiblePair(f"inputs= and targets= go together, and {missing}= is missing; {_PASTE}")
    return Reading(inputs, targets)


_PASTE = "for instance inputs=lambda batch: batch[0], targets=lambda batch: batch[1]"


class Reading:
    """``inputs=`` and ``targets=`` as a ``forward=`` that also knows what to do with the input of ``predict``.

    Args:
        inputs: batch → what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: batch → targets.
    """

    def __init__(self, inputs: Part, targets: Part) -> None:
        self.inputs, self.targets = inputs, targets
        self._kind: Any = None  # of the inputs of the batches seen so far
        self._batch: Any = None  # and of those batches

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Outputs ``(N, ...)`` and targets of a batch.

        Raises:
            ShapeMismatch: if one of the two functions cannot be called with the batch.
        """
        inputs = self._read("inputs", batch)
        self._kind, self._batch = _kind(inputs), _kind(batch)
        return model_outputs(model, to_tensors(inputs, model)), self._read("targets", batch)

    def outputs_at(self, model: nn.Module, x: Any) -> Tensor:
        """Outputs ``(N, ...)`` at the input of ``predict``; errors as of :meth:`taken`."""
        return model_outputs(model, to_tensors(self.taken(x), model))

    def inputs_of(self, batch: Any) -> Any:
        """What ``predict`` takes of a batch with targets: itself, unless it is one tensor ``(N, ...)``."""
        return self._read("inputs", batch) if isinstance(batch, Tensor) else batch

    def taken(self, x: Any) -> Any:
        """What the model takes, of the input of ``predict``: a tensor ``(N, ...)`` as it is, or a whole batch is read.

        Raises:
            ShapeMismatch: if it is neither, or could be both and would mean different things.
        """
        if isinstance(x, Tensor):
            return x
        try:
            found = self.inputs(x)
        except _MISREADS:
            return x
        if self._kind is None or _kind(x) == self._batch:
            return found
        as_read, as_given = _kind(found) == self._kind, _kind(x) == self._kind
        if as_read and as_given and not _same(found, x):
            raise ShapeMismatch(
                f"predict was given {_named(x)}, which can be what the model takes and also a batch that inputs= reads "
                f"in another way; give it a whole batch as in fit ({_named_kind(self._batch)})"
            )
        if as_read or as_given:
            return found if as_read else x
        raise ShapeMismatch(
            f"predict was given {_named(x)}; it takes what the model takes ({_named_kind(self._kind)}), or a whole "
            f"batch as in fit ({_named_kind(self._batch)})"
        )

    def _read(self, name: str, batch: Any) -> Any:
        try:
            return getattr(self, name)(batch)
        except _MISREADS as error:
            raise ShapeMismatch(f"{name}= does not work on a batch that is {_named(batch)}: {error!r}") from error


def _kind(structure: Any) -> Any:
    """The form of a structure: a tensor (or a tuple of one), a tuple of so many, a mapping with these keys, a type."""
    if isinstance(structure, Mapping):
        return frozenset(map(str, structure))
    if isinstance(structure, (tuple, list)):
        return len(structure) if len(structure) != 1 else Tensor
    return Tensor if isinstance(structure, Tensor) else type(structure)


def _named_kind(kind: Any) -> str:
    if isinstance(kind, frozenset):
        return f"a mapping with {sorted(kind)}"
    if isinstance(kind, int):
        return f"a tuple of {kind}"
    return "a tensor" if kind is Tensor else str(kind.__name__)


def _named(structure: Any) -> str:
    shape = f" of shape {tuple(structure.shape)}" if isinstance(structure, Tensor) else ""
    return _named_kind(_kind(structure)) + shape


def _same(a: Any, b: Any) -> bool:
    """Whether two structures of one form hold the same things."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return all(a[key] is b[key] for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return all(left is right for left, right in zip(a, b, strict=True))
    return a is b


def paired(data: Any, y: Any) -> Any:
    """``(x, y)`` where ``fit`` was given them one by one; the data, where there is no ``y (N, ...)``.

    Raises:
        ShapeMismatch: if the data are a loader, which brings the targets by itself; if they are a list of numbers.
        InvalidType: for arrays of text, of dates or of Python objects.
    """
    pair = data if y is None and isinstance(data, tuple) and len(data) == 2 else (data, y)
    for what, part in zip(("inputs", "targets"), pair, strict=True):
        require_numbers(what, part)
    if y is None:
        if pair is data and isinstance(pair[1], list) and pair[1] and isinstance(pair[1][0], (int, float)):
            raise ShapeMismatch(
                f"the targets are a list of {len(pair[1])} numbers; make them a tensor: fit(x, torch.tensor(y))"
            )
        return data
    whole = isinstance(data, (Tensor, Mapping, tuple, list)) or is_array(data)
    if not whole or not (isinstance(y, (Tensor, Mapping, tuple)) or is_array(y)):
        raise ShapeMismatch(
            f"fit was given {type(data).__name__} and {type(y).__name__}; it takes a loader alone, fit(loader), or "
            "inputs and targets as tensors or arrays, fit(x, y)"
        )
    return data, y


def one_argument(what: str, second: Any) -> None:
    """Refuses data that were given as two arguments to a method whose second one is another thing.

    Raises:
        ShapeMismatch: if ``second`` is an array or a tensor ``(N, ...)``; says how to call it.
    """
    if (isinstance(second, Tensor) and second.dim()) or (is_array(second) and getattr(second, "ndim", 0)):
        raise ShapeMismatch(f"{what} takes its data as one argument, a loader or a pair: {what}((x, y))")
