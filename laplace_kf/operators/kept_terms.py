"""A sum of curvature terms that has no closed form, kept as its terms (methods 11.2).

Products are exact and cost one product per term. One Kronecker term plus one other that is positive definite (an
isotropic prior included) is diagonalised exactly by two generalised eigenproblems (methods 5.4) and never comes here;
for more terms, solves go by conjugate gradients, preconditioned by the diagonal of the sum in the eigenbases of its two
marginals, and draws by perturbing and solving: ``Λ⁻¹ Σ_k L_k ε_k`` has covariance ``Λ⁻¹`` if ``Λ = Σ_k L_k L_kᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import cholesky, eigh
from laplace_kf.operators.base import DENSE_WARNING, Isotropic, Matrix, product_of_sum
from laplace_kf.operators.conjugate import conjugate_gradients
from laplace_kf.operators.curvature import CurvatureBlock, DiagonalBlock
from laplace_kf.operators.eigenbasis import SpectralBlock
from laplace_kf.operators.kronecker import DAMPINGS, KroneckerBlock
from laplace_kf.operators.spectral import Basis, Spectral
from laplace_kf.operators.wide import WideBlock

__all__ = ["DRAW_TOLERANCE", "TOLERANCE", "KeptTerms", "TermSum", "diagonalised", "in_common_bases"]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # of a solve: norm of the residual over that of v
# Of a draw: error over size, both in the norm of Λ, in which all directions count alike. Its square is the share of the
# variance that is left out; a residual that small in the plain norm takes several times as many products.
DRAW_TOLERANCE = 1e-3
ITERATIONS = 1000
SPECTRUM_SIZE = 1024  # parameters up to which the eigenvalues of a sum are those of its dense matrix


class KeptTerms(CurvatureBlock):
    """``Σ_k C_k``, one term for every task of a chain.

    Args:
        terms: curvature blocks of one shape, Kronecker or in eigenbases.
        label: name of the block, for messages.
    """

    def __init__(self, terms: Sequence[CurvatureBlock], label: str) -> None:
        self._terms = tuple(terms)
        self.label = label
        self.shape = self._terms[0].shape

    @property
    def kind(self) -> str:  # type: ignore[override]
        """What it is called in a summary."""
        return f"{len(self._terms)} x {self._terms[0].kind}"

    @property
    def terms(self) -> tuple[CurvatureBlock, ...]:
        return self._terms

    def leading(self) -> tuple[Tensor, ...]:
        """The spectra of the newest term."""
        return self._terms[-1].leading()

    def spectrum(self) -> Tensor:
        """Eigenvalues ``(R, O, I)``: exact up to 1024 parameters, else the diagonal in the eigenbases of the marginals.

        That diagonal has the exact sum and is majorised by the eigenvalues.
        """
        if self.size <= SPECTRUM_SIZE:
            return torch.linalg.eigvalsh(self.dense()).clamp_min(0).reshape(self.shape)
        return in_common_bases(self._terms, self.label).grid

    def dense(self) -> Tensor:
        return torch.stack([term.dense() for term in self._terms]).sum(0)

    def diag(self) -> Tensor:
        return torch.stack([term.diag() for term in self._terms]).sum(0)

    def matvec(self, v: Tensor) -> Tensor:
        return product_of_sum(self._terms, v)

    def scaled(self, factor: float | Tensor) -> KeptTerms:
        return KeptTerms([_scaled(term, factor) for term in self._terms], self.label)

    def solve(self, v: Tensor) -> Tensor:
        return self._undamped().solve(v)

    def logdet(self) -> Tensor:
        return self._undamped().logdet()

    @property
    def device(self) -> torch.device | None:
        """Where the terms are."""
        return self._terms[0].device

    @property
    def noise_size(self) -> int:
        return self._undamped().noise_size

    def colour(self, noise: Tensor) -> Tensor:
        return self._undamped().colour(noise)

    def sums_over_nodes(self, damping: str) -> bool:
        return False

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        """By the dense matrix.

        Raises:
            IncompatiblePair: above 4096 parameters, where that matrix is too large.
        """
        _require_small(self)
        wide = prior.double().cpu()
        dense = n * factor * self.dense().double().cpu() + torch.diag_embed(wide.reshape(-1).expand(self.size))
        logdet = 2 * cholesky(dense, self.label).diagonal().log().sum()
        return logdet - (wide.log().sum() if wide.dim() else self.size * wide.log())

    def _undamped(self) -> Matrix:
        return self.precision(1.0, self.diag().new_zeros(()), "exact")

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        if DAMPINGS[damping].is_product:
            raise IncompatiblePair(
                f"block {self.label!r} is a sum of {len(self._terms)} Kronecker products, damping={damping!r} needs a "
                'single one; use damping="exact", or terms="project"'
            )
        terms = [_scaled(term, n) for term in self._terms]
        if len(terms) == 2 and not prior.requires_grad and not bool(prior.any()):
            first, second = terms
            if isinstance(first, KroneckerBlock) and isinstance(second, KroneckerBlock):
                exact = first.plus(second)
                if isinstance(exact, Spectral):
                    return exact
        return TermSum(terms, prior, self.label)

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """The terms side by side: their products for ``(P_b,)``, one after another."""
        exact = not DAMPINGS[damping].is_product
        scaled = [_scaled(term, n) for term in self._terms]
        return TermSum(scaled, prior, self.label) if exact else self.precision(n, prior, damping)


class TermSum(Matrix):
    """``Λ = Σ_k C_k + diag(prior)``; never a dense matrix except in :meth:`dense` and a small :meth:`logdet`.

    Args:
        terms: curvature blocks of one shape.
        prior: λ, 0-dim or ``(R, O, I)``.
        label: name of the block, for messages.
    """

    def __init__(self, terms: Sequence[CurvatureBlock], prior: Tensor, label: str) -> None:
        self.terms, self.prior, self.label = tuple(terms), prior, label
        self._preconditioners: list[Spectral] = []

    @property
    def size(self) -> int:
        return self.terms[0].size

    def dense(self) -> Tensor:
        total = torch.stack([term.dense() for term in self.terms]).sum(0)
        return total + torch.diag_embed(self.prior.reshape(-1).expand(self.size))

    def diag(self) -> Tensor:
        return torch.stack([term.diag() for term in self.terms]).sum(0) + self.prior.reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        flat = self.prior.reshape(-1)
        total = (flat if v.dim() == 1 else flat[:, None]) * v
        for term in self.terms:
            total = term.added_to(total, v)
        return total

    def scaled(self, factor: float | Tensor) -> TermSum:
        return TermSum([_scaled(term, factor) for term in self.terms], self.prior * factor, self.label)

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic):
            return TermSum(self.terms, self.prior + other.value, self.label)
        return super().plus(other)

    def preconditioner(self) -> Spectral:
        """The diagonal of ``Λ`` in the eigenbases of the marginals of ``Σ_k C_k``: exact for terms that commute."""
        if not self._preconditioners:
            with torch.no_grad():
                common = in_common_bases(self.terms, self.label)
                grid = common.grid + (
                    _diagonal_in(DiagonalBlock(self.prior, self.label).precision(1.0, _zero(self.prior), "exact"),
                                 common.inputs, common.outputs)
                    if self.prior.dim()
                    else self.prior
                )  # fmt: skip
            self._preconditioners.append(Spectral(common.inputs, common.outputs, grid, self.label))
        return self._preconditioners[0]

    def solve(self, v: Tensor) -> Tensor:
        """``Λ⁻¹ v`` for ``v`` ``(P,)`` or ``(P, K)``: residual at most :data:`TOLERANCE` of ``v``'s norm.

        Raises:
            NotPositiveDefinite: if the preconditioner is singular.
        """
        right = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        wanted = TOLERANCE.get(right.dtype, 1e-6) * right.norm(dim=0)
        return self._iterated(right, lambda residual, _: residual.norm(dim=0) <= wanted).reshape(v.shape)

    def _iterated(self, right: Tensor, enough: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Conjugate gradients for ``(P, K)`` until every column is ``enough (K,)``.

        ``enough`` is asked with the residual ``r (P, K)`` and ``rᵀ M⁻¹ r (K,)`` for the preconditioner ``M``.
        """
        near = self.preconditioner().solve
        return conjugate_gradients(self.matvec, near, right, enough, self.label, ITERATIONS, start=near(right))

    def logdet(self) -> Tensor:
        """Log-determinant, 0-dim, of the dense matrix.

        Raises:
            IncompatiblePair: above 4096 parameters, where that matrix is too large.
        """
        _require_small(self)
        return super().logdet()

    @property
    def noise_size(self) -> int:
        return self.size * (1 + len(self.terms))

    def colour(self, noise: Tensor) -> Tensor:
        """``Λ⁻¹ (√λ ε₀ + Σ_k L_k ε_k)`` for noise ``(n, (1 + K) P)``, up to :data:`DRAW_TOLERANCE`."""
        self.preconditioner().require_positive()
        first, *others = (part.reshape(-1, *self.terms[0].shape) for part in noise.split(self.size, 1))
        total = self.prior.sqrt() * first
        for term, part in zip(self.terms, others, strict=True):
            total = total + _rooted(term, part)
        right = total.reshape(-1, self.size).T
        wanted = DRAW_TOLERANCE**2 * (right * self.preconditioner().solve(right)).sum(0)
        return self._iterated(right, lambda _, energy: energy <= wanted).T


def _require_small(matrix: TermSum | KeptTerms) -> None:
    if matrix.size > DENSE_WARNING:
        raise IncompatiblePair(
            f"the log-determinant of block {matrix.label!r}, a sum of {len(matrix.terms)} kept terms and a prior over "
            f'{matrix.size} parameters, would need a dense matrix; chain with terms="project" for log-determinants '
            "(evidence, densities)"
        )


def in_common_bases(terms: Sequence[CurvatureBlock], label: str) -> SpectralBlock:
    """The sum of the terms in the eigenbases of its two marginals, with its exact diagonal there.

    The nearest matrix of this form in Frobenius norm for these bases; the trace stays, and it is exact for terms that
    commute. ``label`` names the block in messages.
    """
    parts = [diagonalised(term) for term in terms]
    inputs = _eigenbasis([_marginal(p.inputs, p.grid.sum(1)) for p in parts], label)
    outputs = _eigenbasis([_marginal(p.outputs, p.grid.sum(2)) for p in parts], label)
    grid = torch.stack([_diagonal_in(part, inputs, outputs) for part in parts]).sum(0)
    return SpectralBlock(inputs, outputs, grid, label)


def _scaled(term: CurvatureBlock, factor: float | Tensor) -> CurvatureBlock:
    found = term.scaled(factor)
    assert isinstance(found, CurvatureBlock)
    return found


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device)


def diagonalised(term: CurvatureBlock) -> Spectral:
    """A block ``(R, O, I)`` that is Kronecker, diagonal or known in an eigenbasis, in its own eigenbases.

    A wide one by the diagonal of its output factor.
    """
    term = term.narrowed() if isinstance(term, WideBlock) else term
    found = term.precision(1.0, _zero(term.diag()), "exact")
    assert isinstance(found, Spectral)
    return found


def _rooted(term: CurvatureBlock, noise: Tensor) -> Tensor:
    """``L W`` for ``W (n, R, O, I)`` and a root ``L Lᵀ`` of a term."""
    if isinstance(term, WideBlock):
        return term.root(noise)
    spectral = diagonalised(term)
    out = spectral.grid.sqrt() * noise
    if spectral.outputs.matrix is not None:
        out = torch.matmul(spectral.outputs.matrix, out)
    return out if spectral.inputs.matrix is None else torch.matmul(out, spectral.inputs.matrix.mT)


def _marginal(basis: Basis, weights: Tensor) -> Tensor:
    """``B diag(w) Bᵀ``, or ``w (R, d)`` itself for the identity."""
    return weights if basis.matrix is None else torch.matmul(basis.matrix * weights[:, None, :], basis.matrix.mT)


def _eigenbasis(marginals: Sequence[Tensor], label: str) -> Basis:
    if all(marginal.dim() == 2 for marginal in marginals):
        return Basis.identity()
    total = torch.stack([torch.diag_embed(m) if m.dim() == 2 else m for m in marginals]).sum(0)
    return Basis.orthogonal(eigh(total, label)[1])


def _diagonal_in(part: Spectral, inputs: Basis, outputs: Basis) -> Tensor:
    """The diagonal ``(R, O, I)`` of a matrix in other orthogonal bases."""
    grid = part.grid
    squares = _overlap(outputs.matrix, part.outputs.matrix)
    if squares is not None:
        grid = torch.matmul(squares, grid)
    squares = _overlap(inputs.matrix, part.inputs.matrix)
    return grid if squares is None else torch.matmul(grid, squares.mT)


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """``(newᵀ old)²`` entrywise; ``None`` for the identity."""
    if old is None:
        return None if new is None else new.mT.square()
    return (old if new is None else torch.matmul(new.mT, old)).square()
