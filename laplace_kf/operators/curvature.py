"""Curvature blocks as estimated, each able to become a precision for any (N, λ): the contract, diagonal and dense ones.

``block.precision(n, prior, damping)`` is ``n · C̄ + prior`` as a :class:`Spectral`; its eigendecomposition is made once
per block and shared by every ``(n, prior)``, so that changing them costs one grid of size ``O · I``. Of a large dense
block one ``(n, prior)`` takes a Cholesky factor, a thirtieth of the work, and only many of them the eigenbasis
(:meth:`CurvatureBlock.one_of_many`).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from laplace_kf.linalg import definite_cholesky, eigh, eigvalsh
from laplace_kf.operators.base import Isotropic, Matrix, Sum
from laplace_kf.operators.quadrature import nodes_of_products
from laplace_kf.operators.spectral import Basis, Spectral

__all__ = ["CurvatureBlock", "DenseBlock", "DiagonalBlock", "ridged"]

LARGE = 1024  # rows of a dense matrix from which on its eigenbasis is made for many (N, λ) only


class CurvatureBlock(Matrix):
    """A positive semi-definite block of curvature in canonical order ``(R, O, I)``."""

    shape: tuple[int, int, int]
    kind: str = "dense"
    _nodes: tuple[Tensor, Tensor] | None = None

    def leading(self) -> tuple[Tensor, ...]:
        """The spectra whose condition numbers tell something: of both factors, or of the whole (any shapes)."""
        return (self.spectrum(),)

    def effective(self, n: float, prior: Tensor) -> float:
        """Effective number of parameters ``tr(N C̄ (N C̄ + λ)⁻¹)`` for a prior of 0-dim or ``(R, O, I)`` (its mean)."""
        grid = n * self.spectrum().double()
        total = grid + prior.detach().double().mean()
        return float((grid / total.where(total > 0, 1.0)).sum())

    @property
    def terms(self) -> tuple[CurvatureBlock, ...]:
        """The blocks whose sum this is: itself, unless several are kept side by side."""
        return (self,)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        """The exact sum with a block of the same size as one block of the same kind, where there is one."""
        return None

    def undecomposed(self, many: bool = True) -> dict[str, Tensor]:
        """The symmetric matrices ``(..., d, d)`` whose eigenbases are made on first need and are not there yet.

        Args:
            many: those that many (N, λ) need; else those that :meth:`precision` at a single one needs.
        """
        return {}

    def take_eigenbasis(self, key: str, values: Tensor, vectors: Tensor) -> None:
        """Takes what was made elsewhere of one of :meth:`undecomposed`: ``(..., d)`` and ``(..., d, d)``.

        Raises:
            KeyError: for a name that is not one of them, as any is for a block that keeps no eigenbases.
        """
        raise KeyError(key)

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Eigenvalues as a grid ``(R, O, I)``."""

    @abstractmethod
    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """``n · C̄ + diag(prior)``, damped as asked where there is a choice.

        Args:
            n: data count ``N``.
            prior: λ, 0-dim, or one value for every parameter ``(R, O, I)``.
            damping: a name of :data:`DAMPINGS`; only Kronecker blocks have a choice.
        """

    def one_of_many(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """The matrix of :meth:`precision`, its arguments, in bases that all ``(n, prior)`` share."""
        return self.precision(n, prior, damping)

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """The matrix of :meth:`precision`, its arguments, in the form that is cheapest to multiply ``(P_b,)`` with."""
        return self.precision(n, prior, damping)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``(M,)`` that stand for the spectrum (:mod:`laplace_kf.operators.quadrature`); kept."""
        if self._nodes is None:
            self._nodes = nodes_of_products(self.spectrum().reshape(1, -1))
        return self._nodes

    def sums_over_nodes(self, damping: str) -> bool:
        """Whether :meth:`log_det_ratio` for one λ is the sum over :meth:`nodes`, so that blocks can share one sum."""
        return True

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        """``log|n f C̄ + prior| − log|prior|``, 0-dim in float64, differentiable in ``f`` and ``prior`` (methods 9.4).

        With one λ for the block it is ``Σ log(1 + n s / λ)``, a sum over a few nodes: neither its cost nor that of its
        gradient grows with the block, and the eigenbasis is made once.

        Args:
            n: data count.
            factor: f on the curvature, a number or 0-dim (see :meth:`scaled`).
            prior: λ, 0-dim, or one value for every parameter ``(R, O, I)``.
            damping: a name of :data:`DAMPINGS`.
        """
        if prior.dim():
            scaled = self.scaled(factor)
            assert isinstance(scaled, CurvatureBlock)
            precision = scaled.precision(n, prior, damping)
            return precision.logdet().double().cpu() - prior.log().sum().double().cpu()
        values, weights = self.nodes()
        return (weights * (n * factor * values / prior).log1p()).sum()

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def plus(self, other: Matrix) -> Matrix:
        """Adding a multiple of the identity is damping: closed form."""
        if isinstance(other, Isotropic):
            self._same_size(other)
            return self.precision(1.0, other.value, "exact")
        return super().plus(other)


class DiagonalBlock(CurvatureBlock):
    """A diagonal, ``(R, O, I)``."""

    kind = "diag"

    def __init__(self, values: Tensor, label: str) -> None:
        self.values, self.label = values, label
        self.shape = tuple(values.shape)  # type: ignore[assignment]

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diag())

    def diag(self) -> Tensor:
        return self.values.reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        return self._spectral(self.values).matvec(v)

    def spectrum(self) -> Tensor:
        return self.values

    def scaled(self, factor: float | Tensor) -> DiagonalBlock:
        return DiagonalBlock(self.values * factor, self.label)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Spectral:
        return self._spectral(n * self.values + prior)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        return DiagonalBlock(self.values + other.values, self.label) if isinstance(other, DiagonalBlock) else None

    def plus(self, other: Matrix) -> Matrix:
        if isinstance(other, DiagonalBlock):
            self._same_size(other)
            return DiagonalBlock(self.values + other.values, self.label)
        return super().plus(other)

    def solve(self, v: Tensor) -> Tensor:
        return self._spectral(self.values).solve(v)

    def logdet(self) -> Tensor:
        return self._spectral(self.values).logdet()

    def colour(self, noise: Tensor) -> Tensor:
        return self._spectral(self.values).colour(noise)

    def _spectral(self, values: Tensor) -> Spectral:
        return Spectral(Basis.identity(), Basis.identity(), values, self.label)


class DenseBlock(CurvatureBlock):
    """A dense block ``(P_b, P_b)``; the eigenbasis is made on first need and kept.

    The precision of more than :data:`LARGE` parameters is kept by its Cholesky factor ``L``, as a basis that is not
    orthogonal: ``L I Lᵀ``.
    """

    kind = "full"

    def __init__(self, matrix: Tensor, label: str, eigen: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.matrix, self.label = matrix, label
        self.shape = (1, matrix.shape[0], 1)
        self._eigen: list[tuple[Tensor, Tensor]] = eigen if eigen is not None else []
        self._values: Tensor | None = None
        self._basis: Basis | None = None  # one object, by which precisions are known to share it

    def dense(self) -> Tensor:
        return self.matrix

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ self._checked(v)

    def spectrum(self) -> Tensor:
        if self.size > LARGE and not self._eigen:
            if self._values is None:
                self._values = eigvalsh(self.matrix, self.label)
            return self._values.reshape(self.shape)
        return self._decomposed()[0].reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> DenseBlock:
        return DenseBlock(self.matrix * factor, self.label)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        # not if the eigenbasis is there: draws of one (N, λ) do not depend on what was asked before
        found = self._factorised(n, prior) if self.size > LARGE else None
        return self.one_of_many(n, prior, damping) if found is None else found

    def one_of_many(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        if prior.dim():
            found = self._factorised(n, prior)
            spread = torch.diag_embed(prior.reshape(-1))
            return DenseBlock(n * self.matrix + spread, self.label) if found is None else found
        values, vectors = self._decomposed()
        if self._basis is None:
            self._basis = Basis.orthogonal(vectors[None])
        return Spectral(Basis.identity(), self._basis, (n * values + prior).reshape(self.shape), self.label)

    def _factorised(self, n: float | Tensor, prior: Tensor) -> Spectral | None:
        """``n · C̄ + diag(prior)`` as ``L I Lᵀ``; ``None`` where rounding hides that it is at least the prior.

        No squared pivot is below the smallest eigenvalue, nor that below the smallest prior.
        """
        total = n * self.matrix
        diagonal = prior.reshape(-1).expand(self.size)
        if total.requires_grad or diagonal.requires_grad:
            total = total + torch.diag_embed(diagonal)
        else:
            total.diagonal().add_(diagonal)
        lower = definite_cholesky(total, self.label)
        if lower is None or not bool(lower.detach().diagonal().square().min() > 0.5 * diagonal.detach().min()):
            return None
        eye = torch.eye(self.size, dtype=lower.dtype, device=lower.device)
        dual = torch.linalg.solve_triangular(lower, eye, upper=False).transpose(-1, -2)
        basis = Basis(lower[None], dual[None], lower.diagonal().log().sum()[None])
        return Spectral(Basis.identity(), basis, torch.ones_like(lower[:, 0]).reshape(self.shape), self.label)

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """One product with the dense matrix for ``(P_b,)``; no eigenbasis."""
        return ridged(self.scaled(n), prior)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        return DenseBlock(self.matrix + other.matrix, self.label) if isinstance(other, DenseBlock) else None

    def plus(self, other: Matrix) -> Matrix:
        if isinstance(other, (DenseBlock, DiagonalBlock)):
            self._same_size(other)
            return DenseBlock(self.matrix + other.dense(), self.label)
        return super().plus(other)

    def undecomposed(self, many: bool = True) -> dict[str, Tensor]:
        needed = not self._eigen and (many or self.size <= LARGE)
        return {self.kind: self.matrix} if needed else {}

    def take_eigenbasis(self, key: str, values: Tensor, vectors: Tensor) -> None:
        self._eigen.append((values, vectors))

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        if not self._eigen:
            self._eigen.append(eigh(self.matrix, self.label))
        return self._eigen[0]


def ridged(block: CurvatureBlock, prior: Tensor) -> Sum:
    """A block ``(R, O, I)`` with ``diag(prior)`` beside it."""
    return Sum((DiagonalBlock(prior, block.label) if prior.dim() else Isotropic(block.size, prior), block))
