"""Kronecker factors: ``C̄_b ≈ G ⊗ A`` for every layer with a matrix form, one pair per group (methods 4.1, 4.5).

``A`` sums over the positions of an example, ``G`` averages over them ("expand"). Vector blocks (normalisation layers,
parameters without a rule) keep their exact diagonal, or on request a small dense block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_kf.operators import Blockwise, DenseBlock, DiagonalBlock, KroneckerBlock, Matrix
from laplace_kf.registry import Registry
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, LookupSignals, OuterSignals, Signals
from laplace_kf.tape.signals import symmetrised

__all__ = ["VECTOR_FORMS", "Kronecker", "VectorForm"]


class VectorForm(ABC):
    """What a block that does not factorise is kept as: one tensor of sums."""

    @abstractmethod
    def start(self, block: Block, like: Tensor) -> Tensor:
        """Zero sums in the type and on the device of ``like`` (of any shape)."""

    @abstractmethod
    def add(self, total: Tensor, signal: Signals) -> None:
        """Adds signals to the sums, which have the shape of :meth:`start`."""

    @abstractmethod
    def finished(self, total: Tensor) -> Tensor:
        """The sums as they are kept, in the same shape."""

    @abstractmethod
    def matrix(self, mean: Tensor, label: str) -> Matrix:
        """The block's matrix from the mean, which has the shape of :meth:`start`."""


VECTOR_FORMS: Registry[VectorForm] = Registry("form of vector blocks")


class _DiagonalForm(VectorForm):
    def start(self, block: Block, like: Tensor) -> Tensor:
        return zeros(like, *block.shape)

    def add(self, total: Tensor, signal: Signals) -> None:
        signal.add_squares(total)

    def finished(self, total: Tensor) -> Tensor:
        return total

    def matrix(self, mean: Tensor, label: str) -> Matrix:
        return DiagonalBlock(mean, label)


class _DenseForm(VectorForm):
    def start(self, block: Block, like: Tensor) -> Tensor:
        return zeros(like, block.size, block.size)

    def add(self, total: Tensor, signal: Signals) -> None:
        signal.add_outer(total)

    def finished(self, total: Tensor) -> Tensor:
        return symmetrised(total)

    def matrix(self, mean: Tensor, label: str) -> Matrix:
        return DenseBlock(mean, label)


VECTOR_FORMS.register("diag")(_DiagonalForm())
VECTOR_FORMS.register("full")(_DenseForm())


@STRUCTURES.register("kron")
class Kronecker(Structure):
    """See the module's text.

    Args:
        vector_blocks: ``"diag"`` or ``"full"``, the form of blocks that do not factorise.

    Raises:
        UnknownName: for any other ``vector_blocks``.
    """

    name = "kron"
    takes_damping = True

    def __init__(self, vector_blocks: str = "diag") -> None:
        self.vector_form = VECTOR_FORMS[vector_blocks]
        self.vector_blocks = vector_blocks

    def options(self) -> dict[str, Any]:
        return {"vector_blocks": self.vector_blocks}

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return sum(b.size for b in blocks.values() if not b.factorises) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name in sums:
                continue
            groups, out, inp = block.shape
            if block.factorises:
                a = zeros(like, groups, inp) if block.one_hot else zeros(like, groups, inp, inp)
                sums[name] = (a, zeros(like, groups, out, out))
            else:
                sums[name] = (self.vector_form.start(block, like),)

    def add_inputs(self, sums: Sums, signals: Mapping[str, OuterSignals | LookupSignals]) -> None:
        for name, signal in signals.items():
            if isinstance(signal, LookupSignals):
                signal.add_input_counts(sums[name][0])
            else:
                signal.add_input_gram(sums[name][0])

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            if isinstance(signal, (OuterSignals, LookupSignals)):
                signal.add_column_gram(sums[name][1])
            else:
                self.vector_form.add(sums[name][0], signal)

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        sums[name][1][0] += factor
        return True

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        out: Sums = {}
        for name, block in blocks.items():
            parts = sums[name]
            if block.factorises:
                out[name] = (parts[0] if block.one_hot else symmetrised(parts[0]), symmetrised(parts[1]))
            else:
                out[name] = (self.vector_form.finished(parts[0]),)
        return out

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        entries: list[tuple[Block, Matrix]] = []
        for name, block in blocks.items():
            parts = means[name]
            if block.factorises:
                entries.append((block, KroneckerBlock(parts[0], parts[1], name)))
            else:
                entries.append((block, self.vector_form.matrix(parts[0], name)))
        return Blockwise(layout, entries)
