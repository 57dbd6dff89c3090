"""One operator for every precision: a basis that factorises over inputs and outputs, and a positive grid.

``Λ = (B_G ⊗ B_A) diag(S) (B_G ⊗ B_A)ᵀ`` acts on canonical ``(R, O, I)`` matrices as ``B_G (S ∘ (B_Gᵀ V B_A)) B_Aᵀ``.
Diagonal, dense, exactly damped Kronecker, factored Kronecker, eigenvalue-corrected Kronecker and a sum of two
Kronecker products (methods 5.3, 5.4) are all of this form; so products, solves, determinants and draws are written
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.linalg import require_positive
from laplace_kf.operators.base import Isotropic, Matrix, standard_normal

__all__ = ["Basis", "Ridge", "Spectral"]


FEW = 32  # rows or columns of one draw below which products of several draws are one
LITTLE = 4096  # entries of a grid that are looked at faster than the numbers it is made of


@dataclass(frozen=True)
class Basis:
    """One side of the basis: ``matrix (R, d, d)`` and the transpose of its inverse.

    ``matrix`` is ``None`` for the identity. For an orthogonal basis both tensors are the same.
    """

    matrix: Tensor | None
    dual: Tensor | None
    logdet: Tensor | None = None

    @classmethod
    def identity(cls) -> Basis:
        """The identity."""
        return cls(None, None)

    @classmethod
    def orthogonal(cls, vectors: Tensor) -> Basis:
        """Eigenvectors as columns, ``(R, d, d)``."""
        return cls(vectors, vectors)

    @property
    def is_orthogonal(self) -> bool:
        """Whether ``matrix`` is orthogonal (so that it keeps multiples of the identity)."""
        return self.matrix is self.dual


def _left(matrix: Tensor | None, v: Tensor, transpose: bool) -> Tensor:
    if matrix is None:
        return v
    matrix = matrix.transpose(-1, -2) if transpose else matrix
    n, groups, out, inp = v.shape
    if groups == 1 and n > 1 and inp < FEW:  # one product, where matmul would read the basis once for every draw
        flat = matrix[0] @ v[:, 0].permute(1, 0, 2).reshape(out, -1)
        return flat.reshape(-1, n, inp).transpose(0, 1)[:, None]
    return torch.matmul(matrix, v)


def _right(v: Tensor, matrix: Tensor | None, transpose: bool) -> Tensor:
    if matrix is None:
        return v
    matrix = matrix.transpose(-1, -2) if transpose else matrix
    if v.shape[1] == 1 and v.shape[0] > 1 and v.shape[2] < FEW:
        return (v.reshape(-1, v.shape[-1]) @ matrix[0]).reshape(v.shape)
    return torch.matmul(v, matrix)


@dataclass(frozen=True)
class Ridge:
    """A grid ``outputs inputsᵀ + shift`` for each group: what damping a Kronecker product gives (methods 5.2, 5.3).

    Attributes:
        outputs: ``(R, O)``, not negative; a data count and a scale are multiplied in.
        inputs: ``(R, I)``, not negative.
        shift: 0-dim, or ``None`` for 0.
    """

    outputs: Tensor
    inputs: Tensor
    shift: Tensor | None = None

    def grid(self) -> Tensor:
        """The grid itself, ``(R, O, I)``."""
        product = self.outputs[:, :, None] * self.inputs[:, None, :]
        if self.shift is None:
            return product
        own = not (product.requires_grad or self.shift.requires_grad) and product.dtype == self.shift.dtype
        return product.add_(self.shift) if own else product + self.shift

    def smallest(self) -> Tensor:
        """The smallest entry of every group ``(R,)``; NaN or infinite if some entry is."""
        low, high = (
            get(self.outputs, 1) * get(self.inputs, 1) + (0 if self.shift is None else self.shift)
            for get in (torch.amin, torch.amax)
        )
        return torch.where(torch.isfinite(high), low, high)


class Spectral(Matrix):
    """``(B_G ⊗ B_A) diag(S) (B_G ⊗ B_A)ᵀ``, positive definite: every operation is two rotations and one grid.

    Args:
        inputs: basis ``B_A`` of the input side.
        outputs: basis ``B_G`` of the output side.
        grid: ``S (R, O, I)``, or the few numbers it is made of.
        label: name of the block, for messages.

    Attributes:
        ridge: what the grid is made of, where it is known.
    """

    def __init__(self, inputs: Basis, outputs: Basis, grid: Tensor | Ridge, label: str) -> None:
        self.inputs, self.outputs, self.label = inputs, outputs, label
        self.ridge = grid if isinstance(grid, Ridge) else None
        self._grid = grid if isinstance(grid, Tensor) else None
        self._positive = False  # whether it is known to be; nothing writes into a matrix

    @property
    def grid(self) -> Tensor:
        """``S (R, O, I)``; a ridge is multiplied out on first need."""
        if self._grid is None:
            assert self.ridge is not None
            self._grid = self.ridge.grid()
        return self._grid

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(R, O, I)``."""
        r, o, i = self.grid.shape if self.ridge is None else (*self.ridge.outputs.shape, self.ridge.inputs.shape[1])
        return r, o, i

    @property
    def like(self) -> Tensor:
        """An empty tensor ``(0,)`` in the type and on the device of the grid."""
        return (self.grid if self.ridge is None else self.ridge.inputs).new_empty(0)

    def require_positive(self) -> None:
        """Raises :class:`NotPositiveDefinite` unless every entry of the grid is finite and positive."""
        if self._positive:
            return
        little = self.ridge is None or self.size <= LITTLE
        require_positive(self.grid if little else self.ridge.smallest(), self.label)  # type: ignore[union-attr]
        self._positive = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def _canonical(self, v: Tensor) -> Tensor:
        columns = v[:, None] if v.dim() == 1 else v
        return columns.T.reshape(-1, *self.shape)

    def _apply(self, v: Tensor, grid: Tensor, dual: bool) -> Tensor:
        """``B (grid ∘ (Bᵀ V))`` with the basis or its dual."""
        g = self.outputs.dual if dual else self.outputs.matrix
        a = self.inputs.dual if dual else self.inputs.matrix
        inner = grid * _right(_left(g, self._canonical(self._checked(v)), True), a, False)
        return _right(_left(g, inner, False), a, True).reshape(-1, self.size).T.reshape(v.shape)

    def matvec(self, v: Tensor) -> Tensor:
        return self._apply(v, self.grid, False)

    def solve(self, v: Tensor) -> Tensor:
        require_positive(self.grid, self.label)
        return self._apply(v, 1 / self.grid, True)

    def quadratic(self, v: Tensor) -> Tensor:
        require_positive(self.grid, self.label)
        whitened = self.whiten(v)
        return whitened.T @ whitened if v.dim() == 2 else whitened @ whitened

    def whiten(self, v: Tensor) -> Tensor:
        """``S^{-1/2} B⁻¹ v``, whose squared norm is ``vᵀ Λ⁻¹ v``; same shape as ``v``."""
        rotated = _right(_left(self.outputs.dual, self._canonical(self._checked(v)), True), self.inputs.dual, False)
        return (rotated / self.grid.sqrt()).reshape(-1, self.size).T.reshape(v.shape)

    def energy(self, v: Tensor) -> Tensor:
        """``vᵀ Λ v``, 0-dim, for ``v (P,)``: half the products of ``v @ matvec(v)``."""
        rotated = _right(_left(self.outputs.matrix, self._canonical(self._checked(v)), True), self.inputs.matrix, False)
        return (self.grid * rotated.square()).sum()

    def logdet(self) -> Tensor:
        require_positive(self.grid, self.label)
        total = self.grid.log().sum()
        _, out, inp = self.grid.shape
        if self.inputs.logdet is not None:
            total = total + 2 * out * self.inputs.logdet.sum()
        if self.outputs.logdet is not None:
            total = total + 2 * inp * self.outputs.logdet.sum()
        return total

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.colour(standard_normal((n, self.size), self.grid, generator))

    def colour(self, noise: Tensor) -> Tensor:
        return self.rotate_back(self.spread(noise)).reshape(-1, self.size)

    def spread(self, noise: Tensor) -> Tensor:
        """Standard normal ``(n, P)`` to draws in the dual basis, ``S^{-1/2} ∘ noise`` as ``(n, R, O, I)``."""
        require_positive(self.grid, self.label)
        return noise.reshape(-1, *self.grid.shape) * self.grid.rsqrt()

    def rotate_back(self, v: Tensor) -> Tensor:
        """From coordinates in the dual basis to canonical ones: ``B_G⁻ᵀ V B_A⁻¹``, both ``(n, R, O, I)``."""
        return _right(_left(self.outputs.dual, v, False), self.inputs.dual, True)

    def rotate(self, v: Tensor) -> Tensor:
        """The inverse of :meth:`rotate_back`: ``B_Gᵀ V B_A``, both ``(n, R, O, I)``."""
        return _right(_left(self.outputs.matrix, v, True), self.inputs.matrix, False)

    def diag(self) -> Tensor:
        grid = self.grid
        if self.outputs.matrix is not None:
            grid = torch.matmul(self.outputs.matrix.square(), grid)
        if self.inputs.matrix is not None:
            grid = torch.matmul(grid, self.inputs.matrix.square().transpose(-1, -2))
        return grid.reshape(-1)

    def dense(self) -> Tensor:
        return self.matvec(torch.eye(self.size, dtype=self.grid.dtype, device=self.grid.device))

    def scaled(self, factor: float | Tensor) -> Spectral:
        return Spectral(self.inputs, self.outputs, self.grid * factor, self.label)

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic) and self.inputs.is_orthogonal and self.outputs.is_orthogonal:
            return Spectral(self.inputs, self.outputs, self.grid + other.value, self.label)
        if (
            isinstance(other, Spectral)
            and self.inputs.matrix is other.inputs.matrix
            and self.outputs.matrix is other.outputs.matrix
        ):
            return Spectral(self.inputs, self.outputs, self.grid + other.grid, self.label)
        return super().plus(other)

    def to(self, dtype: torch.dtype) -> Spectral:
        """The same operator in another floating type."""

        def cast(basis: Basis) -> Basis:
            if basis.matrix is None or basis.dual is None:
                return basis
            matrix = basis.matrix.to(dtype)
            dual = matrix if basis.is_orthogonal else basis.dual.to(dtype)
            return Basis(matrix, dual, None if basis.logdet is None else basis.logdet.to(dtype))

        return Spectral(cast(self.inputs), cast(self.outputs), self.grid.to(dtype), self.label)
