"""A structure: which sums over the data it keeps, and which matrix they become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise
from laplace_kf.registry import Registry
from laplace_kf.tape import Block, FlatLayout, MatrixSignals, Signals

__all__ = ["STRUCTURES", "Structure", "Sums"]

Sums = dict[str, tuple[Tensor, ...]]

STRUCTURES: Registry[type[Structure]] = Registry("structure")


class Structure(ABC):
    """Statistics of one kind: additive sums by block name, and how to read their mean as a matrix.

    Every method is a function of its arguments; a structure holds no data.
    """

    name: ClassVar[str]
    takes_damping: ClassVar[bool] = False  # whether it has Kronecker blocks, which can be damped in several ways

    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values that can be saved."""
        return {}

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        """Bytes this structure adds per back-propagated column of ``count`` examples."""
        return 0

    @abstractmethod
    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        """Adds zero sums for blocks that have none yet, in the type and on the device of ``like`` (any shape)."""

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        """Takes in what one minibatch's inputs say (once a minibatch)."""
        return

    @abstractmethod
    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        """Takes in back-propagated columns (any number of times a minibatch)."""

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        """Takes in an output factor ``(O, O)`` computed otherwise (KFRA); ``False`` if this structure has none."""
        return False

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        """The sums as they are kept: symmetric, in flat order where they span blocks."""
        return dict(sums)

    @abstractmethod
    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        """The mean curvature from means (sums divided by the number of examples)."""


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape in the type and on the device of ``like``."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
