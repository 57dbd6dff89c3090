"""Kronecker factors: ``C̄_b ≈ G ⊗ A`` for every layer with a matrix form, one pair per group (methods 4.1, 4.5).

``A`` sums over the positions of an example, ``G`` is the mean over positions ("expand"); only positions from which a
counted output can be reached are in them (:mod:`laplace_kf.tape.reach`), and beside every pair stands how many they
were. Vector blocks (normalisation layers,
parameters without a rule) keep their exact diagonal, or on request a small dense block. A weight that is used as itself
and as its transpose (tied embedding and output matrix) has a pair of factors for each use; their sum is kept in the
eigenbases of its two marginals, with its exact diagonal there, so that no trace is lost.

A factor wider than ``max_side`` is no matrix. An output factor keeps its exact diagonal and a sketch, of which a low
rank beside the diagonal is made (:mod:`laplace_kf.operators.wide_factor`, methods 4.8); an input factor keeps its
diagonal, and so do both marginals of a weight that is used as itself and as its transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from laplace_kf.errors import InvalidArgument
from laplace_kf.operators import (
    HELD_OUT,
    Blockwise,
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    Matrix,
    SpectralBlock,
    WideBlock,
    directions,
    sketch_width,
    wide_factor,
)
from laplace_kf.registry import Registry
from laplace_kf.structures.base import STRUCTURES, Structure, Sums, added, pairs, per_position, zeros
from laplace_kf.tape import (
    Block,
    EntryLayout,
    FlatLayout,
    LookupSignals,
    MatrixSignals,
    OuterSignals,
    Signals,
    TiedSignals,
)
from laplace_kf.tape.grams import row_length, symmetrised, triangles

__all__ = ["SHARINGS", "VECTOR_FORMS", "Kronecker", "VectorForm"]

WIDE_RANK = 8
SKETCHED = 4  # tensors of a block with a sketch: A, the diagonal of G, how many positions, and the sketch


class VectorForm(ABC):
    """What a block that does not factorise is kept as: one tensor of sums."""

    #: Whether nothing of the block is left out.
    dense: ClassVar[bool] = False

    @abstractmethod
    def start(self, block: Block, like: Tensor) -> Tensor:
        """Zero sums in the type and on the device of ``like`` (of any shape)."""

    @abstractmethod
    def memory(self, block: Block) -> int:
        """How many numbers the sums and their decomposition take."""

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

    def memory(self, block: Block) -> int:
        return 2 * block.size

    def add(self, total: Tensor, signal: Signals) -> None:
        signal.add_squares(total)

    def finished(self, total: Tensor) -> Tensor:
        return total

    def matrix(self, mean: Tensor, label: str) -> Matrix:
        return DiagonalBlock(mean, label)


class _DenseForm(VectorForm):
    dense = True

    def start(self, block: Block, like: Tensor) -> Tensor:
        return triangles(like, block.size, block.size)

    def memory(self, block: Block) -> int:
        return 3 * block.size**2

    def add(self, total: Tensor, signal: Signals) -> None:
        signal.add_outer(total)

    def finished(self, total: Tensor) -> Tensor:
        return symmetrised(total)

    def matrix(self, mean: Tensor, label: str) -> Matrix:
        return DenseBlock(mean, label)


VECTOR_FORMS.register("diag")(_DiagonalForm())
VECTOR_FORMS.register("full")(_DenseForm())


Sharing = Callable[[OuterSignals], OuterSignals]
SHARINGS: Registry[Sharing] = Registry("weight sharing")


@SHARINGS.register("expand")
def _expand(signal: OuterSignals) -> OuterSignals:
    """Every position that counts is a row of its own: A sums over them, G is their mean (methods 4.5)."""
    return signal


@SHARINGS.register("reduce")
def _reduce(signal: OuterSignals) -> OuterSignals:
    """One row per example: the mean input of its positions that count, its summed column (Eschenhagen et al. 2023)."""
    return signal.reduced()


@STRUCTURES.register("kron")
class Kronecker(Structure):
    """One pair of factors ``G ⊗ A`` per weight, use and group; a diagonal or a dense block for what has no matrix form.

    Args:
        vector_blocks: ``"diag"`` or ``"full"``, the form of blocks that do not factorise.
        sharing: ``"expand"`` or ``"reduce"``, what the positions that share a weight are to its factors. Embeddings
            and tied weights always expand.
        max_side: a factor wider than this is not kept as a matrix (vocabularies; a side of 50,000 would take 10 GB) but
            by its exact diagonal, an output factor with a low rank beside it.
        wide_rank: at most how many vectors that low rank has; 0 for the diagonal alone.

    Raises:
        UnknownName: for any other ``vector_blocks`` or ``sharing``.
        ValueError: if ``max_side`` is not positive, or ``wide_rank`` negative.
    """

    name = "kron"
    column_by_column = True
    takes_damping = True
    counts_positions = True

    def __init__(
        self, vector_blocks: str = "diag", sharing: str = "expand", max_side: int = 8192, wide_rank: int = WIDE_RANK
    ) -> None:
        self.vector_form = VECTOR_FORMS[vector_blocks]
        self.shared_rows = SHARINGS[sharing]
        if max_side < 1:
            raise InvalidArgument(f"max_side must be positive, got {max_side}")
        if wide_rank < 0:
            raise InvalidArgument(f"wide_rank must not be negative, got {wide_rank}")
        self.vector_blocks, self.sharing, self.max_side = vector_blocks, sharing, max_side
        self.wide_rank = wide_rank

    @classmethod
    def examples(cls) -> tuple[Structure, ...]:
        return cls(), cls(max_side=2, wide_rank=1)

    def _form(self, block: Block) -> VectorForm:
        return VECTOR_FORMS["diag"] if block.unused else self.vector_form

    def options(self) -> dict[str, Any]:
        return {
            "vector_blocks": self.vector_blocks,
            "sharing": self.sharing,
            "max_side": self.max_side,
            "wide_rank": self.wide_rank,
        }

    def narrowed(self) -> Structure:
        return Kronecker(self.vector_blocks, self.sharing, self.max_side, 0) if self.wide_rank else self

    def _sketched(self, block: Block) -> int:
        """Columns of the sketch of the block's output factor; 0 for none."""
        wide = block.factorises and block.turned is None and block.shape[1] > self.max_side
        return sketch_width(self.wide_rank) if wide else 0

    def of_entries(self, entries: EntryLayout) -> Structure:
        # the default structure: single weights have no factors, and what they have is the dense matrix
        return STRUCTURES["full"]().of_entries(entries)

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        def side(width: int, diagonal: bool = False) -> int:
            """A factor and its eigenvectors."""
            return 2 * width if diagonal or width > self.max_side else width * (row_length(width, itemsize) + width)

        total = 0
        for block in blocks.values():
            groups, out, inp = block.shape
            if not block.factorises:
                total += self._form(block).memory(block)
                continue
            factors = groups * (side(out) + side(inp, block.one_hot))
            if block.turned is not None:
                factors += side(inp) + side(out, block.turned)
            sketch = groups * out * self._sketched(block)
            total += 3 * sketch  # and the low rank that it becomes, in float64
            total += factors + block.size  # and the grid of a precision
        return total * itemsize

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        found: list[int] = []
        for block in blocks.values():
            groups, out, inp = block.shape
            if block.factorises:
                pairs = [*[inp] * (not block.one_hot), out]
                if block.turned is not None:
                    pairs = [inp, out]  # one basis of each marginal
                found += groups * [side for side in pairs if side <= self.max_side]
            elif self._form(block).dense:
                found.append(block.size)
        return found

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return sum(b.size for b in blocks.values() if not b.factorises) * count * itemsize

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        found = {}
        for name, block in blocks.items():
            if not block.factorises:
                matrices = [shape for shape in block.shapes if sum(size > 1 for size in shape) > 1]
                if block.note and matrices and not self.vector_form.dense:
                    found[name] = f"its diagonal only, {block.note}"
                continue
            _, out, inp = block.shape
            sides = [("input", inp, block.one_hot), ("output", out, False)]
            if block.turned is not None:
                sides += [("output", out, block.turned), ("input", inp, False)]
            wide = dict.fromkeys(
                f"{side} factor of {n} rows" for side, n, hot in sides if not hot and n > self.max_side
            )
            if wide:
                low = f", with a low rank of at most {self.wide_rank} beside that of the outputs"
                found[name] = f"diagonal of the {' and the '.join(wide)}, more than max_side={self.max_side}"
                found[name] += low if self._sketched(block) else ""
        return found

    def errors(self, curvature: Blockwise) -> dict[str, str]:
        return {
            block.name: (
                f"relative Frobenius error of the output factor {matrix.outputs.error:.2g} with a low rank of "
                f"{matrix.outputs.rank}, {matrix.outputs.of_diagonal:.2g} without "
                f"(estimated along {HELD_OUT} directions)"
            )
            for block, matrix in curvature.entries
            if isinstance(matrix, WideBlock)
        }

    def _side(self, like: Tensor, groups: int, width: int, diagonal: bool) -> Tensor:
        wide = diagonal or width > self.max_side
        return zeros(like, groups, width) if wide else triangles(like, groups, width, width)

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return True

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name in sums:
                continue
            groups, out, inp = block.shape
            if block.factorises:
                sums[name] = (self._side(like, groups, inp, block.one_hot), self._side(like, groups, out, False))
                sums[name] += (zeros(like),)
                if block.turned is not None:
                    sums[name] += (self._side(like, 1, out, block.turned), self._side(like, 1, inp, False), zeros(like))
                if count := self._sketched(block):
                    sums[name] += (zeros(like, groups, out, count),)
            else:
                sums[name] = (self._form(block).start(block, like),)

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        for name, signal in signals.items():
            for k, part in enumerate(self._parts(signal)):
                part.add_input_gram(sums[name][3 * k])
                sums[name][3 * k + 2].add_(part.positions)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            if isinstance(signal, (OuterSignals, LookupSignals, TiedSignals)):
                for k, part in enumerate(self._parts(signal)):
                    part.add_column_gram(sums[name][3 * k + 1])
                    if len(sums[name]) == SKETCHED:
                        sketch = sums[name][-1]
                        part.add_column_sketch(sketch, directions(sketch, *sketch.shape[1:]))
            else:
                self.vector_form.add(sums[name][0], signal)

    def _parts(self, signal: MatrixSignals) -> tuple[OuterSignals | LookupSignals, ...]:
        """The uses of one weight, each with a pair of factors."""
        if isinstance(signal, TiedSignals):
            return signal.straight, signal.turned
        return (self.shared_rows(signal) if isinstance(signal, OuterSignals) else signal,)

    def add_output_factor(self, sums: Sums, name: str, factor: Tensor) -> bool:
        total = sums[name][1][0]
        total += factor if total.dim() == 2 else factor.diagonal()
        if len(sums[name]) == SKETCHED:
            sketch = sums[name][-1]
            sketch[0] += factor.to(sketch) @ directions(sketch, *sketch.shape[1:])
        return True

    def merged(self, mine: Sums, other: Structure, theirs: Sums) -> tuple[Structure, Sums]:
        """The sums of two data sets together; where one of them has no sketch (or another one), the diagonal alone."""

        def alike(name: str) -> bool:
            return len(mine[name]) == len(theirs[name]) and mine[name][-1].shape == theirs[name][-1].shape

        unlike = {name for name in mine if name in theirs and SKETCHED in (len(mine[name]), len(theirs[name]))}
        unlike = {name for name in unlike if not alike(name)}
        cut = [{n: parts[: SKETCHED - 1] if n in unlike else parts for n, parts in s.items()} for s in (mine, theirs)]
        return self, added(*cut)

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        out: Sums = {}
        for name, block in blocks.items():
            if block.factorises:
                whole = sums[name][: SKETCHED - 1] if len(sums[name]) == SKETCHED else sums[name]
                found = tuple(symmetrised(part) if part.dim() == 3 else part for part in whole)
                out[name] = (*found, *sums[name][len(whole) :])
            else:
                out[name] = (self._form(block).finished(sums[name][0]),)
        return out

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        entries: list[tuple[Block, Matrix]] = []
        for name, block in blocks.items():
            parts = means[name]
            if not block.factorises:
                entries.append((block, self._form(block).matrix(parts[0], name)))
                continue
            (inputs, outputs), *turned = pairs(parts)
            if len(parts) == SKETCHED and parts[2].dim() == 0:
                wide = wide_factor(outputs, per_position(parts[3], parts[2]), self.wide_rank)
                entries.append((block, WideBlock(inputs, wide, name)))
            elif not turned:
                entries.append((block, KroneckerBlock(inputs, outputs, name)))
            else:
                entries.append((block, SpectralBlock.of_sum([(outputs, inputs), *turned], name)))
        return Blockwise(layout, entries)
