"""Low rank plus diagonal on flat vectors: ``U diag(l) Uᵀ + diag(d)``, through ``k``-sized systems only (Woodbury)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.errors import ShapeMismatch
from laplace_kf.linalg import cholesky, require_positive
from laplace_kf.operators.base import DENSE_WARNING, Isotropic, Matrix, standard_normal
from laplace_kf.operators.curvature import CurvatureBlock
from laplace_kf.operators.quadrature import nodes_of_products

__all__ = ["LowRank", "LowRankBlock"]


class LowRank(Matrix):
    """``Λ = U diag(l) Uᵀ + diag(d)``; never a ``(P, P)`` object except in :meth:`dense`.

    Every result is differentiable in ``prior`` and ``values``.

    Args:
        vectors: ``U (P, k)`` with orthonormal columns.
        values: ``l (k,)``, not negative.
        prior: ``d``, 0-dim or ``(P,)``: the prior precision and any other diagonal part; positive for everything but
            products.
        label: name of the block, for messages.
    """

    def __init__(self, vectors: Tensor, values: Tensor, prior: Tensor, label: str = "") -> None:
        if vectors.shape[1:] != values.shape or prior.shape not in ((), vectors.shape[:1]):
            raise ShapeMismatch(
                f"vectors {tuple(vectors.shape)}, values {tuple(values.shape)} and prior {tuple(prior.shape)} do not "
                "fit: they must be (P, k), (k,) and () or (P,)"
            )
        self.vectors, self.values, self.prior, self.label = vectors, values, prior, label

    @property
    def size(self) -> int:
        return self.vectors.shape[0]

    def _columns(self, v: Tensor) -> Tensor:
        return self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)

    def _diagonal(self) -> Tensor:
        """``d`` as a column that broadcasts over ``(P, K)``."""
        return self.prior if self.prior.dim() == 0 else self.prior[:, None]

    def inner_factor(self) -> Tensor:
        """Cholesky factor of ``I + √l Uᵀ D⁻¹ U √l``, ``(k, k)``."""
        require_positive(self.prior, self.label)
        root = self.values.sqrt()
        if self.prior.dim() == 0:  # the columns are orthonormal
            gram = torch.diag_embed(self.values / self.prior)
        else:
            gram = root[:, None] * (self.vectors.T @ (self.vectors / self._diagonal())) * root
        return cholesky(torch.eye(len(root), dtype=gram.dtype, device=gram.device) + gram, self.label)

    def dense(self) -> Tensor:
        return (self.vectors * self.values) @ self.vectors.T + torch.diag_embed(self.prior.expand(self.size))

    def diag(self) -> Tensor:
        return self.vectors.square() @ self.values + self.prior

    def matvec(self, v: Tensor) -> Tensor:
        columns = self._columns(v)
        low = self.vectors @ (self.values[:, None] * (self.vectors.T @ columns))
        return (low + self._diagonal() * columns).reshape(v.shape)

    def solve(self, v: Tensor) -> Tensor:
        factor, root = self.inner_factor(), self.values.sqrt()
        plain = self._columns(v) / self._diagonal()
        inner = torch.cholesky_solve(root[:, None] * (self.vectors.T @ plain), factor)
        return (plain - self.vectors @ (root[:, None] * inner) / self._diagonal()).reshape(v.shape)

    def variances(self) -> Tensor:
        """The diagonal of the inverse, ``(P,)``."""
        factor, root = self.inner_factor(), self.values.sqrt()
        scaled = torch.linalg.solve_triangular(factor, (self.vectors * root).T, upper=False)  # (k, P)
        return 1 / self.prior - scaled.square().sum(0) / self.prior.square()

    def logdet(self) -> Tensor:
        inner = 2 * self.inner_factor().diagonal().log().sum()
        return inner + (self.size * self.prior.log() if self.prior.dim() == 0 else self.prior.log().sum())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.colour(standard_normal((n, self.noise_size), self.vectors, generator))

    @property
    def noise_size(self) -> int:
        return self.size + len(self.values)

    def colour(self, noise: Tensor) -> Tensor:
        """``Λ⁻¹ (√d ε + U √l ε')`` with standard normal ``ε (P,)``, ``ε' (k,)``: its covariance is ``Λ⁻¹``."""
        require_positive(self.prior, self.label)
        wide, low = noise.split([self.size, len(self.values)], 1)
        return self.solve((wide * self.prior.sqrt() + (low * self.values.sqrt()) @ self.vectors.T).T).T

    def scaled(self, factor: float | Tensor) -> LowRank:
        return LowRank(self.vectors, self.values * factor, self.prior * factor, self.label)

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic):
            return LowRank(self.vectors, self.values, self.prior + other.value, self.label)
        return super().plus(other)


class LowRankBlock(CurvatureBlock):
    """``C̄ ≈ U diag(l) Uᵀ + diag(r)`` over a flat vector, ``(1, P, 1)``.

    Args:
        vectors: ``U (P, k)`` with orthonormal columns.
        values: ``l (k,)``, not negative.
        remainder: ``r``, 0-dim or ``(P,)``, not negative: what the low rank leaves of the exact diagonal.
        label: name of the block, for messages.
    """

    def __init__(self, vectors: Tensor, values: Tensor, remainder: Tensor, label: str) -> None:
        self.vectors, self.values, self.remainder, self.label = vectors, values, remainder, label
        self.shape = (1, vectors.shape[0], 1)
        self.kind = f"low rank ({len(values)})" + (" + diag" if remainder.dim() else "")

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> LowRank:
        diagonal = n * self.remainder + (prior.reshape(-1) if prior.dim() else prior)
        return LowRank(self.vectors, n * self.values, diagonal, self.label)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        """The exact sum; its rank is that of both together."""
        if not isinstance(other, LowRankBlock):
            return None
        half = torch.cat([self.vectors * self.values.sqrt(), other.vectors * other.values.sqrt()], 1)
        vectors, singular, _ = torch.linalg.svd(half, full_matrices=False)
        return LowRankBlock(vectors, singular.square(), self.remainder + other.remainder, self.label)

    def truncated(self, rank: int) -> tuple[LowRankBlock, float]:
        """The leading ``rank`` vectors, and the relative Frobenius error.

        A diagonal remainder takes in the diagonal of what is dropped, so that the exact diagonal stays.
        """
        order = self.values.argsort(descending=True)
        kept, dropped = order[:rank], order[rank:]
        left = self.vectors[:, dropped].square() @ self.values[dropped]
        error = self.values[dropped].double().square().sum()
        remainder = self.remainder
        if remainder.dim():
            remainder, error = remainder + left, error - left.double().square().sum()
        rest = self.remainder.double().expand(self.size)
        low = self.diag().double() - rest
        norm = self.values.double().square().sum() + (2 * low * rest + rest.square()).sum()
        block = LowRankBlock(self.vectors[:, kept], self.values[kept], remainder, self.label)
        return block, float((error.clamp_min(0) / norm).sqrt()) if float(norm) > 0 else 0.0

    def _plain(self) -> LowRank:
        return LowRank(self.vectors, self.values, self.remainder, self.label)

    def spectrum(self) -> Tensor:
        """Eigenvalues ``(1, P, 1)``: those of the low rank and zeros; with a remainder, those of the dense matrix."""
        if self.remainder.dim() == 0:
            padded = self.values.new_zeros(self.size)
            padded[: len(self.values)] = self.values
            return (padded + self.remainder).reshape(self.shape)
        if self.size > DENSE_WARNING:
            warnings.warn(
                f"the spectrum of low rank plus diagonal of size {self.size} goes through a dense matrix",
                RuntimeWarning,
                stacklevel=users_line(),
            )
        return torch.linalg.eigvalsh(self.dense()).clamp_min(0).reshape(self.shape)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """With a remainder those of low rank and remainder side by side, since together they need a dense matrix."""
        if self._nodes is None:
            parts = self.values, self.remainder.expand(self.size)
            self._nodes = nodes_of_products(torch.cat(parts)[None])
        return self._nodes

    def sums_over_nodes(self, damping: str) -> bool:
        return False

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        """Through the ``k``-sized system; without a remainder every eigenvalue outside the low rank is zero."""
        ratio = self.scaled(factor).precision(n, prior, damping).logdet().double().cpu()
        logs = prior.log().double().cpu()
        return ratio - (logs.sum() if prior.dim() else self.size * logs)

    def leading(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def effective(self, n: float, prior: Tensor) -> float:
        """Without the spectrum: ``P − tr(λ Λ⁻¹)``."""
        flat = prior.reshape(-1) if prior.dim() else prior
        if not bool((n * self.remainder + flat > 0).all()):
            return super().effective(n, prior)
        variances = self.precision(n, prior.to(self.values.dtype), "exact").variances()
        return float((1 - flat * variances.double()).sum())

    def dense(self) -> Tensor:
        return self._plain().dense()

    def diag(self) -> Tensor:
        return self._plain().diag()

    def matvec(self, v: Tensor) -> Tensor:
        return self._plain().matvec(v)

    def scaled(self, factor: float | Tensor) -> LowRankBlock:
        return LowRankBlock(self.vectors, self.values * factor, self.remainder * factor, self.label)
