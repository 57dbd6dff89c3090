"""Blocks of curvature that are known in an eigenbasis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import eigh
from laplace_kf.operators.base import Matrix, Sum
from laplace_kf.operators.curvature import CurvatureBlock, DiagonalBlock
from laplace_kf.operators.kronecker import DAMPINGS
from laplace_kf.operators.kronecker_factors import diagonal, full
from laplace_kf.operators.spectral import Basis, Spectral

__all__ = ["SpectralBlock"]


class SpectralBlock(CurvatureBlock):
    """``(B_G ⊗ B_A) diag(S) (B_G ⊗ B_A)ᵀ`` with orthogonal bases: curvature that is known in an eigenbasis.

    Args:
        inputs: basis ``B_A`` of the input side.
        outputs: basis ``B_G`` of the output side.
        grid: ``S (R, O, I)``, not negative.
        label: name of the block, for messages.
    """

    kind = "eigenbasis"

    def __init__(self, inputs: Basis, outputs: Basis, grid: Tensor, label: str) -> None:
        self.inputs, self.outputs, self.grid, self.label = inputs, outputs, grid, label
        self.shape = tuple(grid.shape)  # type: ignore[assignment]

    @classmethod
    def of_sum(cls, terms: Sequence[tuple[Tensor, Tensor]], label: str) -> SpectralBlock:
        """``Σ_k G_k ⊗ A_k`` (factors ``(R, d, d)`` or diagonals ``(R, d)``) in the eigenbases of its two marginals.

        Keeps the diagonal there, hence the trace; the nearest matrix of this form in Frobenius norm for these bases,
        and exact for one term or terms that commute.
        """

        def marginal(factors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Basis, list[Tensor]]:
            weights = [diagonal(other).sum(-1) for other in others]
            if all(factor.dim() == 2 for factor in factors):
                return Basis.identity(), list(factors)
            total = torch.stack([full(f) * w[:, None, None] for f, w in zip(factors, weights, strict=True)]).sum(0)
            vectors = eigh(total, label)[1]
            rotated = [
                torch.einsum("rdk,rd->rk", vectors.square(), f) if f.dim() == 2
                else torch.einsum("rdk,rdk->rk", vectors, torch.matmul(f, vectors))
                for f in factors
            ]  # fmt: skip
            return Basis.orthogonal(vectors), [values.clamp_min(0) for values in rotated]

        outs, ins = [g for g, _ in terms], [a for _, a in terms]
        inputs, in_values = marginal(ins, outs)
        outputs, out_values = marginal(outs, ins)
        grid = torch.stack([g[:, :, None] * a[:, None, :] for g, a in zip(out_values, in_values, strict=True)]).sum(0)
        return cls(inputs, outputs, grid, label)

    def spectrum(self) -> Tensor:
        return self.grid

    def _spectral(self, grid: Tensor) -> Spectral:
        return Spectral(self.inputs, self.outputs, grid, self.label)

    def dense(self) -> Tensor:
        return self._spectral(self.grid).dense()

    def diag(self) -> Tensor:
        return self._spectral(self.grid).diag()

    def matvec(self, v: Tensor) -> Tensor:
        return self._spectral(self.grid).matvec(v)

    def solve(self, v: Tensor) -> Tensor:
        return self._spectral(self.grid).solve(v)

    def logdet(self) -> Tensor:
        return self._spectral(self.grid).logdet()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self._spectral(self.grid).sample(n, generator)

    def scaled(self, factor: float | Tensor) -> SpectralBlock:
        return SpectralBlock(self.inputs, self.outputs, self.grid * factor, self.label)

    def sums_over_nodes(self, damping: str) -> bool:
        return not DAMPINGS[damping].is_product  # which is refused

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        self._check(damping)
        return super().log_det_ratio(n, factor, prior, damping)

    def _check(self, damping: str) -> None:
        if DAMPINGS[damping].is_product:
            raise IncompatiblePair(
                f"block {self.label!r} has no single pair of Kronecker factors, which damping={damping!r} needs; use "
                'damping="exact"'
            )

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        self._check(damping)
        if prior.dim():
            return Sum((self.scaled(n), DiagonalBlock(prior, self.label)))
        return self._spectral(n * self.grid + prior)
