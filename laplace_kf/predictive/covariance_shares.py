"""What each block of a precision adds to the covariances of some examples and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.linalg import cholesky
from laplace_kf.operators import Basis, Blockwise, Isotropic, LowRank, Matrix, Spectral
from laplace_kf.predictive.precision_family import PrecisionFamily
from laplace_kf.predictive.quadratic import Form, rotated, rotated_rows
from laplace_kf.tape import Block, Signals
from laplace_kf.tape.blocks import merged

__all__ = ["Piece", "Share", "joint_of", "like_of", "shares_of"]

ROW_NUMBERS = 2**23  # per-example gradients, in numbers, where a precision leaves no other way


class Piece:
    """Signals of a run of ``n`` examples and a run of ``V`` columns, and their forms by basis.

    Args:
        examples: which examples.
        columns: which columns, of all that are wanted.
        signals: by block name.
        blocks: the signals' blocks by name.
        outputs: a tensor of any shape in the model's type and on its device.
    """

    def __init__(
        self, examples: slice, columns: slice, signals: dict[str, Signals], blocks: dict[str, Block], outputs: Tensor
    ) -> None:
        self.examples, self.columns, self.signals, self.blocks = examples, columns, signals, blocks
        self.outputs = outputs
        self.count = examples.stop - examples.start
        self.width = columns.stop - columns.start
        self._forms: dict[tuple[Any, ...], tuple[Basis, Basis, Form]] = {}

    def form(self, name: str, matrix: Spectral) -> Form:
        """The block's signals in the matrix's bases, made once."""
        key = (name, id(matrix.inputs.dual), id(matrix.outputs.dual), matrix.like.dtype)
        if key not in self._forms:
            with torch.no_grad():
                form = rotated(self.signals[name], matrix.inputs, matrix.outputs, matrix.like)
            self._forms[key] = (matrix.inputs, matrix.outputs, form)  # keeps what the ids stand for alive
        return self._forms[key][2]

    def own(self, block: Block, matrix: Spectral) -> bool:
        """Whether the block is one of the signals' (not parts of several), and the matrix acts on its ``(R, O, I)``."""
        return self.blocks.get(block.name) == block and matrix.shape == block.shape

    def rows(self, block: Block, part: slice, dtype: torch.dtype) -> Tensor:
        """Per-example gradients ``(V·m, P_b)`` of a run of the examples, in the block's order."""
        count = self.width * len(range(self.count)[part])
        found = [
            {name: self.outputs.new_zeros((), dtype=dtype).expand(count, *shape) for name, shape in _shapes(block)}
        ]
        for name, signal in self.signals.items():
            mine = self.blocks[name]
            if set(mine.parameters) & set(block.parameters):
                found.append(mine.unpack(signal.gradients(part, dtype).flatten(0, 1)))
        return block.pack(merged(found)).reshape(count, -1)

    def restricted(self, block: Block, values: Tensor) -> dict[str, Tensor]:
        """Vectors over a block ``(K, P_b)`` as ``(K, R, O, I)`` over each of the signals' blocks, zero elsewhere."""
        parts = block.unpack(values.reshape(-1, *block.shape))
        found = {}
        for name in self.signals:
            mine = self.blocks[name]
            if set(mine.parameters) & set(parts):
                zeros = {p: values.new_zeros(len(values), *shape) for p, shape in _shapes(mine) if p not in parts}
                found[name] = mine.pack({**parts, **zeros})
        return found


def _shapes(block: Block) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(block.parameters, block.shapes, strict=True))


Solver = Callable[[Tensor], Tensor]


@dataclass
class Share:
    """What one block adds to the covariances of those of ``K`` precisions whose matrices go together.

    Attributes:
        block: the block.
        members: which precisions, a slice where all of them.
        rule: the matrices, if they are spectral (then they share a basis); otherwise the one matrix.
    """

    block: Block
    members: list[int] | slice
    rule: PrecisionFamily | Matrix

    def covariance(self, piece: Piece, width: int) -> Tensor | None:
        """``(K, G, n, W, W)`` for columns in groups of ``W = width``; ``None`` if they do not depend on the block."""
        if isinstance(self.rule, LowRank):
            return _low_rank(piece, self.block, self.rule, width)
        if not isinstance(self.rule, PrecisionFamily):
            return _by_rows(piece, self.block, solver_of(self.rule), width)
        first = self.rule.matrices[0]
        if piece.own(self.block, first):
            known = self.block.name in piece.signals
            return piece.form(self.block.name, first).blocks(self.rule, width) if known else None
        if first.inputs.dual is None and first.outputs.dual is None:
            return torch.cat([_diagonal(piece, self.block, m.diag().reciprocal(), width) for m in self.rule.matrices])
        return _by_rows(piece, self.block, self.rule, width)


def shares_of(precisions: Sequence[Blockwise]) -> list[Share]:
    """The blocks of the precisions, those together that share a basis."""
    spectral: dict[tuple[Any, ...], tuple[Block, list[int], list[Spectral]]] = {}
    found: list[Share] = []
    for k, precision in enumerate(precisions):
        for block, given in precision.entries:
            matrix = simplest(given, block)
            if isinstance(matrix, Spectral):
                key = (block, id(matrix.inputs.dual), id(matrix.outputs.dual))
                _, members, matrices = spectral.setdefault(key, (block, [], []))
                members.append(k)
                matrices.append(matrix)
            else:
                found.append(Share(block, [k], matrix))
    for block, members, matrices in spectral.values():
        found.append(
            Share(block, slice(None) if len(members) == len(precisions) else members, PrecisionFamily(matrices))
        )
    return found


def joint_of(piece: Piece, precision: Blockwise) -> Tensor:
    """The covariance of all examples and columns of a piece, ``(n·V, n·V)``, the columns of an example together."""
    like = like_of(precision)
    size = piece.width * piece.count
    total = like.new_zeros(size, size)
    for block, given in precision.entries:
        matrix = simplest(given, block)
        if isinstance(matrix, Spectral) and piece.own(block, matrix):
            if block.name in piece.signals:
                total = total + piece.form(block.name, matrix).joint(matrix)
            continue
        rows = piece.rows(block, slice(0, piece.count), like.dtype)
        total = total + _by_example(rows, piece) @ _by_example(solver_of(matrix)(rows), piece).T
    return total


def like_of(precision: Blockwise) -> Tensor:
    """An empty tensor ``(0,)`` in the type and on the device of a precision."""
    matrix = precision.entries[0][1]
    return matrix.like if isinstance(matrix, Spectral) else matrix.diag()[:0]


def simplest(matrix: Matrix, block: Block) -> Matrix:
    """A multiple of the identity as a diagonal."""
    if isinstance(matrix, Isotropic):
        return Spectral(Basis.identity(), Basis.identity(), matrix.value.expand(block.shape), matrix.label)
    return matrix


def _diagonal(piece: Piece, block: Block, inverse: Tensor, width: int) -> Tensor:
    """``J diag(inverse) Jᵀ`` for a diagonal ``(P_b,)`` over several blocks, ``(1, G, n, W, W)``."""
    total = inverse.new_zeros(1, piece.width // width, piece.count, width, width)
    for name, values in piece.restricted(block, inverse[None]).items():
        # weights that do not belong to the block have variance 0, an infinite precision
        matrix = Spectral(Basis.identity(), Basis.identity(), values[0].reciprocal(), block.name)
        total = total + piece.form(name, matrix).blocks(PrecisionFamily([matrix]), width)
    return total


def _low_rank(piece: Piece, block: Block, matrix: LowRank, width: int) -> Tensor:
    """``D⁻¹ − D⁻¹ B (I + Bᵀ D⁻¹ B)⁻¹ Bᵀ D⁻¹`` between the columns, ``B = U √l``: no Jacobian either.

    Returns:
        ``(1, G, n, W, W)``.
    """
    inverse = matrix.prior.expand(matrix.size).reciprocal()
    if not len(matrix.values):  # a curvature of 0 has no vectors
        return _diagonal(piece, block, inverse, width)
    solved = matrix.vectors * matrix.values.sqrt() * inverse[:, None]
    products = solved.new_zeros(piece.width * piece.count, len(matrix.values))
    for name, directions in piece.restricted(block, solved.T).items():
        products = products + piece.signals[name].project(directions)
    rows = torch.linalg.solve_triangular(matrix.inner_factor(), products.T, upper=False).T
    shaped = rows.reshape(piece.width // width, width, piece.count, -1).transpose(1, 2)  # (G, n, W, k)
    return _diagonal(piece, block, inverse, width) - torch.matmul(shaped, shaped.transpose(-1, -2))[None]


def _by_rows(piece: Piece, block: Block, rule: PrecisionFamily | Solver, width: int) -> Tensor:
    """Through per-example gradients, a run of examples at a time, ``(K, G, n, W, W)``."""
    step = max(1, ROW_NUMBERS // max(1, piece.width * block.size))
    found = []
    for start in range(0, piece.count, step):
        part = slice(start, min(start + step, piece.count))
        if isinstance(rule, PrecisionFamily):
            first = rule.matrices[0]
            rows = piece.rows(block, part, first.like.dtype)
            form = rotated_rows(rows, first.shape, first.inputs, first.outputs, part.stop - start)
            found.append(form.blocks(rule, width))
            continue
        rows = piece.rows(block, part, piece.outputs.dtype)
        solved = rule(rows)
        shape = (piece.width // width, width, part.stop - start, -1)
        right = solved.reshape(shape).permute(0, 2, 3, 1)
        found.append(torch.matmul(rows.to(solved.dtype).reshape(shape).transpose(1, 2), right)[None])
    return torch.cat(found, 2)


def solver_of(matrix: Matrix) -> Solver:
    """``rows (K, P_b)`` to ``rows matrix⁻¹``; a matrix without a solve of its own is factorised once."""
    if type(matrix).solve is not Matrix.solve:
        kind = matrix.like.dtype if isinstance(matrix, Spectral) else matrix.diag().dtype
        return lambda rows: matrix.solve(rows.to(kind).T).T
    factor = cholesky(matrix.dense(), matrix.label)
    return lambda rows: torch.cholesky_solve(rows.to(factor.dtype).T, factor).T


def _by_example(rows: Tensor, piece: Piece) -> Tensor:
    """Rows ``(V·n, P_b)`` with the columns of an example together."""
    return rows.reshape(piece.width, piece.count, -1).transpose(0, 1).flatten(0, 1)
