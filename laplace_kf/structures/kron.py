"""Kronecker factors: ``C̄_b ≈ G ⊗ A`` for every layer with a matrix form, one pair per group (methods 4.1, 4.5).

``A`` sums over the positions of an example, ``G`` averages over them ("expand"). Vector blocks (normalisation layers,
parameters without a rule) keep their exact diagonal, or on request a small dense block.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from laplace_kf.errors import UnknownName
from laplace_kf.operators import Blockwise, DenseBlock, DiagonalBlock, KroneckerBlock, Matrix
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, zeros
from laplace_kf.tape import Block, FlatLayout, LookupSignals, OuterSignals, Signals
from laplace_kf.tape.signals import symmetrised


@STRUCTURES.register("kron")
class Kronecker(Structure):
    """See the module's text.

    Args:
        vector_blocks: ``"diag"`` or ``"full"``, the form of blocks that do not factorise.

    Raises:
        UnknownName: for any other ``vector_blocks``.
    """

    name = "kron"

    def __init__(self, vector_blocks: str = "diag") -> None:
        if vector_blocks not in ("diag", "full"):
            raise UnknownName("form of vector blocks", vector_blocks, ["diag", "full"])
        self.vector_blocks = vector_blocks

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return sum(b.size for b in blocks.values() if b.form == "vector") * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name in sums:
                continue
            groups, out, inp = block.shape
            if block.form == "matrix":
                a = zeros(like, groups, inp) if block.one_hot else zeros(like, groups, inp, inp)
                sums[name] = (a, zeros(like, groups, out, out))
            elif self.vector_blocks == "full":
                sums[name] = (zeros(like, block.size, block.size),)
            else:
                sums[name] = (zeros(like, *block.shape),)

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
            elif self.vector_blocks == "full":
                signal.add_outer(sums[name][0])
            else:
                signal.add_squares(sums[name][0])

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        sums[name][1][0] += factor
        return True

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        out: Sums = {}
        for name, block in blocks.items():
            parts = sums[name]
            if block.form == "matrix":
                out[name] = (parts[0] if block.one_hot else symmetrised(parts[0]), symmetrised(parts[1]))
            else:
                out[name] = (symmetrised(parts[0]),) if self.vector_blocks == "full" else parts
        return out

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        entries: list[tuple[Block, Matrix]] = []
        for name, block in blocks.items():
            parts = means[name]
            if block.form == "matrix":
                entries.append((block, KroneckerBlock(parts[0], parts[1], name)))
            elif self.vector_blocks == "full":
                entries.append((block, DenseBlock(parts[0], name)))
            else:
                entries.append((block, DiagonalBlock(parts[0], name)))
        return Blockwise(layout, entries)
