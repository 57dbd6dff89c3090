"""Solving with the free part of a precision: what a Gaussian looks like once some of its entries are known.

Of ``N(μ, Λ⁻¹)`` with entries ``M`` held at ``v`` the others are normal with precision ``Λ_FF`` and mean
``μ_F − Λ_FF⁻¹ Λ_FM (v − μ_M)``: everything is a solve with ``Λ_FF``. It goes block by block, and every way is exact:

* in closed form where no entries are mixed (diagonals), for low rank plus diagonal (Woodbury), and for a Kronecker
  block of which whole rows or columns are held (its two factors are cut);
* by a dense factorisation, ``O(|F|³)``, where few entries are free or the block is dense anyway;
* otherwise by conjugate gradients to the accuracy of the number type. They are preconditioned by the free part of every
  row, ``O(Σ_o |F_o|³)`` once, where most entries are held, and by the whole inverse where few are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from laplace_kf.linalg import cholesky, eigh, require_positive
from laplace_kf.operators.base import Matrix
from laplace_kf.operators.blockwise import Blockwise
from laplace_kf.operators.conjugate import conjugate_gradients
from laplace_kf.operators.curvature import DenseBlock, DiagonalBlock
from laplace_kf.operators.kept_terms import TOLERANCE
from laplace_kf.operators.lowrank import LowRank
from laplace_kf.operators.spectral import Basis, Ridge, Spectral
from laplace_kf.tape.blocks import merged

__all__ = ["FreeBlock", "FreePart", "by_rows", "free_block", "row_block"]

DENSE = 512  # free entries up to which a dense factorisation is made
ITERATIONS = 5000
ROW_WORK = 4e10  # multiply-adds of the rows' factorisations that are worth it


class FreePart:
    """``Λ_FF⁻¹`` of a block-diagonal precision, zero at the entries that are held.

    Args:
        precision: Λ of size P.
        held: which entries are known, bool ``(P,)``.

    Attributes:
        ways: how each block is solved, by block name: for tests, and for whoever wonders what it costs.

    Raises:
        NotPositiveDefinite: if the free part is singular.
    """

    def __init__(self, precision: Blockwise, held: Tensor) -> None:
        self.precision = precision
        masks = precision.layout.split(held[None])
        self._blocks: list[FreeBlock] = []
        for block, matrix in precision.entries:
            free = ~block.pack({name: masks[name] for name in block.parameters}).reshape(block.shape)
            self._blocks.append(free_block(matrix, free.to(matrix.device)))
        self.ways = {block.name: way.way for (block, _), way in zip(precision.entries, self._blocks, strict=True)}

    def solve(self, v: Tensor) -> Tensor:
        """``Λ_FF⁻¹ v_F`` with zeros at the held entries, for ``v (P,)`` or ``(P, K)``."""
        layout = self.precision.layout
        columns = v[:, None] if v.dim() == 1 else v
        parts = layout.split(columns.T)
        found = []
        for (block, matrix), part in zip(self.precision.entries, self._blocks, strict=True):
            packed = block.pack(parts).reshape(columns.shape[1], -1).T.to(matrix.device)
            found.append(block.unpack(part.solve(packed).T.to(v.device).reshape(-1, *block.shape)))
        return layout.join(merged(found)).T.reshape(v.shape)


class FreeBlock(ABC):
    """``Λ_FF⁻¹`` of one block.

    Args:
        matrix: Λ, of size ``P_b``.
        free: bool ``(R, O, I)``.
    """

    way: str

    def __init__(self, matrix: Matrix, free: Tensor) -> None:
        self.matrix, self.free = matrix, free
        self.index = free.reshape(-1).nonzero()[:, 0]

    def solve(self, v: Tensor) -> Tensor:
        """``(P_b, K)`` to ``(P_b, K)``, zero where an entry is held."""
        out = torch.zeros_like(v)
        if len(self.index):
            out[self.index] = self.inner(v[self.index])
        return out

    def remaining(self) -> Matrix | None:
        """``Λ_FF`` as a matrix of its own ``(F, F)``, where it has been made."""
        return None

    @abstractmethod
    def inner(self, v: Tensor) -> Tensor:
        """The solution at the free entries alone, both ``(F, K)``."""


class _Whole(FreeBlock):
    """Nothing is held, or everything."""

    way = "whole"

    def inner(self, v: Tensor) -> Tensor:
        return self.matrix.solve(v)


class _Diagonal(FreeBlock):
    """Nothing is mixed."""

    way = "diagonal"

    def inner(self, v: Tensor) -> Tensor:
        values = self.matrix.diag()[self.index]
        require_positive(values, self.matrix.label)
        return v / values[:, None]

    def remaining(self) -> Matrix:
        return DiagonalBlock(self.matrix.diag()[self.index][None, :, None], self.matrix.label)


class _Cut(FreeBlock):
    """Another matrix, of the free entries alone.

    Args:
        part: of size ``|F|``.
        way: what it is.
    """

    def __init__(self, matrix: Matrix, free: Tensor, part: Matrix, way: str) -> None:
        super().__init__(matrix, free)
        self.part, self.way = part, way

    def remaining(self) -> Matrix:
        return self.part

    def inner(self, v: Tensor) -> Tensor:
        return self.part.solve(v)


class _Dense(FreeBlock):
    """A dense factorisation of ``Λ_FF``."""

    way = "dense"

    def __init__(self, matrix: Matrix, free: Tensor) -> None:
        super().__init__(matrix, free)
        self.part = _dense_part(matrix, self.index)
        self.factor = cholesky(self.part, matrix.label)

    def remaining(self) -> Matrix:
        return DenseBlock(self.part, self.matrix.label)

    def inner(self, v: Tensor) -> Tensor:
        return torch.cholesky_solve(v, self.factor)


class _Iterated(FreeBlock):
    """Conjugate gradients: the residual of a solution is at most :data:`TOLERANCE` of the right side's norm."""

    def __init__(self, matrix: Matrix, free: Tensor) -> None:
        super().__init__(matrix, free)
        per_row = (by_rows(matrix, free)[1] if isinstance(matrix, Spectral) else free).sum(-1).double()
        few_held = int((~free).sum()) * 4 < free.numel()
        self._precondition: Callable[[Tensor], Tensor]
        if isinstance(matrix, Spectral) and not few_held and float(per_row.pow(3).sum()) < ROW_WORK:
            self.way, self._precondition = "iterated, by rows", _row_solves(matrix, free)
        elif isinstance(matrix, Spectral):
            matrix.require_positive()
            self.way, self._precondition = "iterated, by the inverse", self._inverse
        else:
            diagonal = matrix.diag()[self.index]
            require_positive(diagonal, matrix.label)
            self.way, self._precondition = "iterated, by the diagonal", lambda v: v / diagonal[:, None]

    def _embedded(self, v: Tensor) -> Tensor:
        out = v.new_zeros(self.matrix.size, v.shape[1])
        out[self.index] = v
        return out

    def _inverse(self, v: Tensor) -> Tensor:
        return self.matrix.solve(self._embedded(v))[self.index]

    def inner(self, v: Tensor) -> Tensor:
        wanted = TOLERANCE.get(v.dtype, 1e-6) * v.norm(dim=0)
        return conjugate_gradients(
            lambda d: self.matrix.matvec(self._embedded(d))[self.index],
            self._precondition,
            v,
            lambda residual, _: residual.norm(dim=0) <= wanted,
            self.matrix.label,
            ITERATIONS,
        )


def free_block(matrix: Matrix, free: Tensor) -> FreeBlock:
    """The cheapest exact way to solve with the free part of a block.

    Args:
        matrix: Λ, of size ``P_b``.
        free: bool ``(R, O, I)``.
    """
    if bool(free.all()) or not bool(free.any()):
        return _Whole(matrix, free)
    if isinstance(matrix, DiagonalBlock):
        return _Diagonal(matrix, free)
    if isinstance(matrix, LowRank):
        index = free.reshape(-1).nonzero()[:, 0]
        low = LowRank(
            matrix.vectors[index], matrix.values, matrix.prior.expand(matrix.size)[index].clone(), matrix.label
        )
        return _Cut(matrix, free, low, "low rank")
    if isinstance(matrix, Spectral):
        if matrix.inputs.matrix is None and matrix.outputs.matrix is None:
            return _Diagonal(matrix, free)
        part = _cut_factors(matrix, free)
        if part is not None:
            return _Cut(matrix, free, part, "factors")
    if int(free.sum()) <= DENSE or _is_dense(matrix):
        return _Dense(matrix, free)
    return _Iterated(matrix, free)


def _is_dense(matrix: Matrix) -> bool:
    """Whether the block holds ``P_b²`` numbers anyway."""
    return isinstance(matrix, DenseBlock) or (
        isinstance(matrix, Spectral) and 1 in matrix.shape[1:] and matrix.shape[0] == 1
    )


def _dense_part(matrix: Matrix, index: Tensor) -> Tensor:
    """``Λ_FF (|F|, |F|)``, column by column unless it is there."""
    if isinstance(matrix, DenseBlock):
        return matrix.matrix[index][:, index]
    like, parts = matrix.diag(), []
    for some in index.split(256):
        columns = like.new_zeros(matrix.size, len(some))
        columns[some, torch.arange(len(some), device=some.device)] = 1
        parts.append(matrix.matvec(columns)[index])
    found = torch.cat(parts, 1)
    return (found + found.T) / 2


def _cut_factors(matrix: Spectral, free: Tensor) -> Spectral | None:
    """A Kronecker precision of the free rows and columns, if the free entries are some rows by some columns."""
    ridge = matrix.ridge
    rows, columns = free[0].any(1), free[0].any(0)
    if ridge is None or not (matrix.inputs.is_orthogonal and matrix.outputs.is_orthogonal):
        return None
    if not bool((free == (rows[:, None] & columns)).all()):  # the same ones in every group
        return None

    def cut(basis: Basis, values: Tensor, kept: Tensor) -> tuple[Basis, Tensor]:
        if basis.matrix is None:
            return basis, values[:, kept]
        if bool(kept.all()):
            return basis, values
        some = basis.matrix[:, kept]
        found, vectors = eigh(torch.matmul(some * values[:, None], some.mT), matrix.label)
        return Basis.orthogonal(vectors), found

    inputs, a = cut(matrix.inputs, ridge.inputs, columns)
    outputs, g = cut(matrix.outputs, ridge.outputs, rows)
    return Spectral(inputs, outputs, Ridge(g, a, ridge.shift), matrix.label)


def by_rows(matrix: Spectral, free: Tensor) -> tuple[Spectral, Tensor]:
    """A block and its mask ``(R, O, I)`` with what is mixed along the rows: turned where nothing is (tokens)."""
    if matrix.inputs.matrix is not None:
        return matrix, free
    return Spectral(matrix.outputs, matrix.inputs, matrix.grid.mT, matrix.label), free.mT


def row_block(matrix: Spectral, group: int, row: int, kept: Tensor, others: Tensor | None = None) -> Tensor:
    """Entries of the diagonal block of one output, ``B_A diag(Σ_k B_G[o, k]² S_k) B_Aᵀ``.

    Args:
        matrix: Λ of the block.
        group, row: which output.
        kept: which rows and columns, bool ``(I,)``.
        others: a vector ``(I,)`` to multiply these rows with instead.

    Returns:
        ``(F, F)`` for F kept ones, or ``(F,)``.
    """
    grid = matrix.grid[group]
    values = grid[row] if matrix.outputs.matrix is None else matrix.outputs.matrix[group, row].square() @ grid
    if matrix.inputs.matrix is None:
        return torch.diag(values[kept]) if others is None else (values * others)[kept]
    basis = matrix.inputs.matrix[group]
    some = basis[kept]
    if others is not None:
        return torch.mv(some, values * (basis.T @ others))
    return (some * values) @ some.T


def _row_solves(matrix: Spectral, free: Tensor) -> Callable[[Tensor], Tensor]:
    """Solves with the free part of every row's diagonal block, of the free entries ``(|F|, K)`` in order."""
    places = torch.arange(free.numel(), device=free.device).reshape(free.shape)
    turned, mask = by_rows(matrix, free)
    if turned is not matrix:
        inner = _row_solves(turned, mask)
        order = places.mT[mask]  # of the entries row after row
        rank = torch.searchsorted(places[free], order)
        return lambda v: torch.zeros_like(v).index_copy_(0, rank, inner(v[rank]))
    factors: list[tuple[slice, Tensor]] = []
    start = 0
    for group, mask in enumerate(free):
        for row, kept in enumerate(mask):
            count = int(kept.sum())
            if count:
                part = row_block(matrix, group, row, kept)
                factors.append((slice(start, start + count), cholesky(part, matrix.label)))
                start += count

    def solve(v: Tensor) -> Tensor:
        return torch.cat([torch.cholesky_solve(v[rows], factor) for rows, factor in factors])

    return solve
