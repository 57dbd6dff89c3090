"""Tensors of a forward pass that are made of tracked parameters alone, and those that are constants.

Constants are buffers, parameters that are not tracked, what factory functions (``torch.arange``) return, and all that
is computed from constants; a constant into which data are written is none any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Made", "MadeTensors", "writes"]


@dataclass
class Made:
    """A tensor of any shape that is a function of parameters.

    Attributes:
        tensor: it, kept alive so that its id stays its own.
        sizes: the parameters by name, with their numbers of entries.
        calls: the calls with a rule that read them on the way.
        covered: whether these calls say all about how it depends on the parameters.
    """

    tensor: Tensor
    sizes: dict[str, int]
    calls: tuple[Any, ...] = ()
    covered: bool = False


class MadeTensors:
    """Which tensors, of any shape, of one forward pass are made of parameters, and which are constants."""

    def __init__(self, constants: Iterable[Tensor]) -> None:
        self._constants = {id(t): t for t in constants}
        self._made: dict[int, Made] = {}
        # Memory that data were written into. A weak reference leaves it to be freed, and its number to nothing else:
        # an activation that was written in place is soon gone, and a product of parameters may lie where it lay.
        self._written: dict[int, StorageWeakRef | None] = {}

    def get(self, tensor: Tensor) -> Made | None:
        """What a tensor (of any shape) is made of, if it is made of parameters."""
        found = self._made.get(id(tensor))
        return None if found is None or _memory(tensor) in self._written else found

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor (of any shape) is known to be a constant."""
        return id(tensor) in self._constants and _memory(tensor) not in self._written

    def add_constants(self, tensors: Iterable[Tensor]) -> None:
        """Tensors of any shape that were computed from constants."""
        self._constants.update((id(t), t) for t in tensors)

    def add(self, tensor: Tensor, sizes: Mapping[str, int], calls: Sequence[Any], covered: bool) -> None:
        """A tensor (of any shape) that was computed from parameters."""
        self._made[id(tensor)] = Made(tensor, dict(sorted(sizes.items())), tuple(calls), covered)

    def wrote(self, tensor: Tensor) -> None:
        """Data were written into a tensor (of any shape)."""
        if id(tensor) in self._constants or id(tensor) in self._made or tensor._base is not None:
            number = _memory(tensor)
            self._written[number] = StorageWeakRef(tensor.untyped_storage()) if number >= 0 else None


def writes(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(function, "__name__", ""))
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__int__", "__index__"))
    return name.endswith("_")


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own, as inside vmap
        return -1
