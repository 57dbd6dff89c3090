"""One Kronecker product with positive definite factors, solved by the factors' own inverses (methods 5.1, 5.2).

Where the same factors meet many vectors of one kind and no other (N, λ), two Cholesky inverses are several times
cheaper than two eigendecompositions, and each solve takes two products instead of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kf.linalg import cholesky, require_positive
from laplace_kf.operators.base import Matrix
from laplace_kf.operators.kronecker import KroneckerBlock

__all__ = ["KroneckerProduct"]


class KroneckerProduct(Matrix):
    """``G ⊗ A`` on row-major ``W (O, I)``, one pair for each of ``R`` groups, both factors positive definite.

    Args:
        inputs: ``A (R, I, I)``, or its diagonal ``(R, I)``.
        outputs: ``G (R, O, O)``, or its diagonal ``(R, O)``.
        label: name of the block, for messages.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, label: str) -> None:
        self.inputs, self.outputs, self.label = inputs, outputs, label
        self.shape = (outputs.shape[0], outputs.shape[1], inputs.shape[1])
        self._inverses: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def dense(self) -> Tensor:
        return KroneckerBlock(self.inputs, self.outputs, self.label).dense()

    def scaled(self, factor: float | Tensor) -> KroneckerProduct:
        return KroneckerProduct(self.inputs, self.outputs * factor, self.label)

    def matvec(self, v: Tensor) -> Tensor:
        return KroneckerBlock(self.inputs, self.outputs, self.label).matvec(v)

    def inverses(self) -> tuple[Tensor, Tensor]:
        """``A⁻¹ (R, I, I)`` and ``G⁻¹ (R, O, O)``, or their diagonals, made once.

        Raises:
            NotPositiveDefinite: if a factor is singular.
        """
        if self._inverses is None:
            self._inverses = (
                self._inverse(self.inputs, "input factor A"),
                self._inverse(self.outputs, "output factor G"),
            )
        return self._inverses

    def _inverse(self, factor: Tensor, which: str) -> Tensor:
        label = f"{self.label} ({which})"
        if factor.dim() == 2:
            require_positive(factor, label)
            return 1 / factor
        return torch.cholesky_inverse(cholesky(factor, label))

    def solve(self, v: Tensor) -> Tensor:
        a, g = self.inverses()
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        w = _on_the_right(columns.T.reshape(-1, *self.shape), a)
        w = w * g[:, :, None] if g.dim() == 2 else torch.matmul(g, w)
        return w.reshape(-1, self.size).T.reshape(v.shape)

    def solve_outer(self, g: Tensor, a: Tensor) -> Tensor:
        """``matrix⁻¹ Σ_n g_n ⊗ a_n`` as ``(R, O, I)``, for ``g (N, R, O)`` and ``a (N, R, I)`` (methods 5.6).

        Cheaper than forming the sum first when ``N < O·I·(O+I) / (O²+I²)``.
        """
        inverse_a, inverse_g = self.inverses()
        left = _on_the_right(g.transpose(0, 1), inverse_g)  # (R, N, O)
        return torch.matmul(left.transpose(1, 2), _on_the_right(a.transpose(0, 1), inverse_a))


def _on_the_right(v: Tensor, factor: Tensor) -> Tensor:
    """``v (..., R, n, d)`` times symmetric matrices ``(R, d, d)`` or diagonals ``(R, d)``."""
    return v * factor[:, None, :] if factor.dim() == 2 else torch.matmul(v, factor)
