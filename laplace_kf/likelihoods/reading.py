"""How a likelihood reads outputs and targets: by position, with what is ignored and what examples weigh."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidTarget, ShapeMismatch
from laplace_kf.outputs.checks import known_false, known_finite, refuse_nonfinite
from laplace_kf.outputs.layout import check_layout, from_positions, to_positions
from laplace_kf.outputs.weighted import apart

__all__ = ["Given", "Reading", "read_once", "resolve_generator", "root_of", "times"]


class Given(NamedTuple):
    """Outputs and targets by position.

    Attributes:
        z: outputs ``(N, T, C)``.
        y: targets by position, as the likelihood computes with them.
        keep: what is not ignored, broadcastable to ``(N, T, C)``; ``None`` keeps everything.
        weight: of the examples, ``(N, 1, 1)``; ``None`` where all are 1.
    """

    z: Tensor
    y: Tensor | None
    keep: Tensor | None
    weight: Tensor | None = None


_READ: ContextVar[dict[Any, tuple[Given, Any, Any]] | None] = ContextVar("read", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, what a likelihood has read and checked of outputs and targets is not read and checked again.

    For one minibatch whose outputs and targets nobody changes meanwhile.
    """
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def _key(who: Any, outputs: Tensor, targets: Any) -> Any:
    """The same for outputs ``(N, ...)`` with the same numbers in the same memory, and the same object as targets."""
    place = outputs.data_ptr(), outputs.shape, outputs.stride(), outputs.dtype, outputs.device
    graph = outputs.requires_grad and torch.is_grad_enabled()
    return id(who), id(targets), outputs._version, graph, place


def times(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x (N, ...)`` times weights that broadcast to it (``None``: as it is)."""
    return x if weight is None else x * weight.to(x.dtype)


def root_of(weight: Tensor | None) -> Tensor | None:
    """Square roots of weights of any shape: what roots of the curvature are multiplied by."""
    return None if weight is None else weight.sqrt()


def resolve_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The given generator, or a fresh private one seeded from the operating system's entropy."""
    if generator is None:
        generator = torch.Generator(device=device)
        generator.seed()
    return generator


class Reading(abc.ABC):
    """The part of a likelihood that knows layouts, ``ignore_index`` and weights.

    Args:
        ignore_index: targets equal to it contribute nothing to anything; None switches this off.
    """

    #: Whether NaN among the targets marks missing ones, which contribute nothing.
    nan_is_missing: ClassVar[bool] = False
    _channels: ClassVar[int | None] = None

    def __init__(self, ignore_index: int | None = -100) -> None:
        if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
            raise InvalidArgument(f"{type(self).__name__}: ignore_index must be an int or None, got {ignore_index!r}.")
        self.ignore_index = ignore_index

    @abc.abstractmethod
    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Checks targets against the outputs' shape; returns them by position and a mask broadcastable to (N, T, C).

        Ignored entries come back as 0, a value every method can compute with; None as a mask keeps everything.
        """

    to_positions = staticmethod(to_positions)
    from_positions = staticmethod(from_positions)

    def _check_outputs(self, shape: Sequence[int]) -> None:
        check_layout(shape)
        channels = shape[-1] if len(shape) < 4 else shape[1]
        if self._channels is not None and channels != self._channels:
            raise ShapeMismatch(
                f"{type(self).__name__} needs {self._channels} outputs per position, got outputs of shape "
                f"{tuple(shape)} with {channels}."
            )

    def _read(self, z: Tensor, shape: Sequence[int], targets: Any) -> tuple[Tensor, Tensor | None]:
        """Checked targets by position for outputs ``z (N, T, C)`` given in ``shape``, and which count."""
        if not isinstance(targets, Tensor):
            raise InvalidTarget(f"{type(self).__name__}: targets must be a tensor, got {type(targets).__name__}.")
        return self._position_targets(shape, targets)

    def _unpack(self, outputs: Tensor, targets: Any) -> Given:
        read = _READ.get()
        if read is None or outputs.is_inference():
            return self._unpacked(outputs, targets)
        key = _key(self, outputs, targets)
        if key not in read:
            read[key] = self._unpacked(outputs, targets), outputs, targets  # kept, so that their places stay theirs
        return read[key][0]

    def _unpacked(self, outputs: Tensor, targets: Any) -> Given:
        self._check_outputs(outputs.shape)
        if not outputs.is_floating_point():
            raise ShapeMismatch(f"{type(self).__name__}: outputs must be floating point, got {outputs.dtype}.")
        z = to_positions(outputs)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        targets, weights = apart(targets, z.shape[0])
        if targets is None:
            return Given(z, None, None)
        y, keep = self._read(z, outputs.shape, targets)
        y = y.to(z.dtype) if isinstance(y, Tensor) and y.is_floating_point() else y
        if weights is None:
            return Given(z, y, keep)
        weight = weights.to(z)[:, None, None]
        used = weight > 0
        return Given(z, y, used if keep is None else keep & used, weight)

    def _needed(self, targets: Any, method: str) -> Any:
        if targets is None:
            raise IncompatiblePair(
                f"{self!r}: {method} without targets; this output curvature depends on the targets, pass them."
            )
        return targets

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which outputs count: those with a target that is not ignored.

        Args:
            outputs, targets: as in :meth:`check`, with the same errors.

        Returns:
            bool of the shape of the outputs; ``None`` if all of them count.
        """
        given = self._unpack(outputs, self._needed(targets, "counted"))
        z, keep = given.z, given.keep
        if keep is None or bool(keep.all()):
            return None
        return from_positions(keep.expand(z.shape), outputs)

    def counted_positions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`counted`, by position: bool ``(N, T)``."""
        kept = self.counted(outputs, targets)
        return to_positions(torch.ones_like(outputs, dtype=torch.bool) if kept is None else kept).any(-1)

    def counted_examples(self, outputs: Tensor, targets: Tensor) -> int:
        """How many of the examples of outputs ``(N, ...)`` have a position that counts; errors as :meth:`counted`."""
        kept = self.counted(outputs, targets)
        return len(outputs) if kept is None else int(kept.flatten(1).any(1).sum())

    def _ignore(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.ignore_index is None:
            return y, None
        keep = y != self.ignore_index
        return torch.where(keep, y, torch.zeros((), dtype=y.dtype, device=y.device)), keep

    def _ignore_missing(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_ignore`, with NaN left out too where it marks missing targets; refused where it does not.

        Raises:
            NonFiniteTarget: for an infinite target, or NaN where it means nothing.
        """
        who = type(self).__name__
        if not self.nan_is_missing:
            refuse_nonfinite(who, y)
            return self._ignore(y)
        if known_finite(y):
            return self._ignore(y)
        missing = torch.isnan(y)
        y = torch.where(missing, torch.zeros((), dtype=y.dtype, device=y.device), y)
        refuse_nonfinite(who, y)
        y, keep = self._ignore(y)
        if keep is None:
            return y, None if known_false(missing.any()) else ~missing
        return y, keep & ~missing
