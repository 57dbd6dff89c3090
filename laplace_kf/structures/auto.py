"""Auto: the richest structure that is affordable, by number of parameters, number of outputs and memory.

Decided at the first minibatch of a fit, when the layers and their factors are known; ``posterior.structure`` is then
the chosen one and its ``reason`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from laplace_kf.errors import InvalidArgument
from laplace_kf.forecast import duration
from laplace_kf.operators import Blockwise
from laplace_kf.rates import decomposition_seconds
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, memory_limit
from laplace_kf.tape import Block, EntryLayout, FlatLayout, Signals

DENSE_SIZE = 2048  # parameters up to which the decomposition of a dense matrix is a matter of seconds
DENSE_WORK = 2e8  # multiply-adds per example up to which a dense sum is as cheap as a forward pass of a small network
TIMED = 512  # parameters from which on the reason says what the decomposition takes; the choice is by counts alone
PREFERENCE = ("kron", "diag", "isotropic")  # where the dense matrix is too much: the first one that fits


@STRUCTURES.register("auto")
class Automatic(Structure):
    """Full where it is small, else Kronecker, else diagonal, else isotropic.

    Args:
        memory: bytes that sums and decompositions may take; never more than the device has.
    """

    name = "auto"

    def __init__(self, memory: float = 4 * 2**30) -> None:
        if not memory > 0:
            raise InvalidArgument(f"memory must be positive, got {memory}")
        self.budget = memory

    def options(self) -> dict[str, float]:
        return {"memory": self.budget}

    def of_entries(self, entries: EntryLayout) -> Structure:
        return STRUCTURES["full"]().of_entries(entries)

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return STRUCTURES[PREFERENCE[-1]]().memory(blocks, layout, itemsize)

    def settled(self, blocks: Mapping[str, Block], layout: FlatLayout, outputs: Tensor, like: Tensor) -> Structure:
        size, columns = layout.size, math.prod(outputs.shape[1:])
        budget = min(self.budget, memory_limit(like.device))
        dense = STRUCTURES["full"]()
        work = columns * size**2
        needed = dense.memory(blocks, layout, like.element_size())
        if size <= DENSE_SIZE and work <= DENSE_WORK and needed <= budget:
            dense.reason = f"{size} parameters and {columns} outputs: the dense matrix is affordable"
            if size > TIMED:
                taken = decomposition_seconds(dense.sides(blocks, layout), like.device, like.dtype)
                dense.reason += f", about {duration(taken)} to decompose"
            return dense
        why = f"{size} parameters and {columns} outputs are too many for a dense matrix"
        for name in PREFERENCE:
            chosen = STRUCTURES[name]()
            needed = chosen.memory(blocks, layout, like.element_size())
            if needed <= budget or name is PREFERENCE[-1]:
                chosen.reason = f"{why}; {name} needs {needed / 2**20:.1f} of {budget / 2**20:.0f} MiB"
                return chosen
            why += f", {name} would need {needed / 2**20:.0f} MiB"
        raise AssertionError("the last preference is always taken")

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        raise AssertionError("decided before anything is gathered")

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        raise AssertionError("decided before anything is gathered")

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        raise AssertionError("decided before anything is gathered")
