"""Kronecker algebra with one convention: ``vec`` stacks columns (methods 1.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch

__all__ = ["khatri_rao", "kron_logdet", "kron_matvec", "kron_rank", "mixed_product", "unvec", "vec"]


def vec(matrix: Tensor) -> Tensor:
    """The columns of ``(O, I)`` one under the other, ``(O*I,)``."""
    return matrix.T.reshape(-1)


def unvec(vector: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`vec`: ``(O*I,)`` to ``(O, I)`` with ``rows`` = O.

    Raises:
        ShapeMismatch: if the length is no multiple of the rows.
    """
    if vector.dim() != 1 or rows < 1 or len(vector) % rows:
        raise ShapeMismatch(
            f"a vector of shape {tuple(vector.shape)} is not that of a matrix with {rows} rows; its length must be a "
            "multiple"
        )
    return vector.reshape(-1, rows).T


def kron_matvec(a: Tensor, b: Tensor, vector: Tensor) -> Tensor:
    """``(A ⊗ B) vec(X) = vec(B X Aᵀ)`` without forming the product.

    Args:
        a: ``(I', I)``.
        b: ``(O', O)``.
        vector: ``vec(X) (O*I,)`` of ``X (O, I)``.

    Raises:
        ShapeMismatch: if they do not fit.
    """
    if vector.shape != (a.shape[1] * b.shape[1],):
        raise ShapeMismatch(f"expected a vector of shape ({a.shape[1] * b.shape[1]},), got {tuple(vector.shape)}")
    return vec(b @ unvec(vector, b.shape[1]) @ a.T)


def mixed_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of ``(A ⊗ B)(C ⊗ D) = AC ⊗ BD``.

    Args:
        first: A and B, ``(I, J)`` and ``(O, Q)``.
        second: C and D, ``(J, K)`` and ``(Q, R)``.

    Raises:
        ShapeMismatch: if the factors cannot be multiplied.
    """
    for left, right in zip(first, second, strict=True):
        if left.shape[-1] != right.shape[-2]:
            raise ShapeMismatch(
                f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied; transpose one"
            )
    return first[0] @ second[0], first[1] @ second[1]


def khatri_rao(a: Tensor, b: Tensor, a_sizes: Sequence[int], b_sizes: Sequence[int]) -> Tensor:
    """Khatri–Rao product ``A * B`` of matrices of blocks: block ``(k, l)`` is ``A_kl ⊗ B_kl``.

    Args:
        a: ``(I, I)``, cut by ``a_sizes`` along both axes.
        b: ``(O, O)``, cut by ``b_sizes``.
        a_sizes, b_sizes: sizes of the blocks, as many for both.

    Returns:
        ``(P, P)`` with ``P = Σ_k a_k b_k``.

    Raises:
        ShapeMismatch: if the sizes do not add up to the matrices.
    """
    if len(a_sizes) != len(b_sizes) or tuple(a.shape) != (sum(a_sizes),) * 2 or tuple(b.shape) != (sum(b_sizes),) * 2:
        raise ShapeMismatch(
            f"matrices {tuple(a.shape)} and {tuple(b.shape)} are not cut by {list(a_sizes)} and {list(b_sizes)}"
        )
    rows = []
    for left, right in zip(a.split(list(a_sizes)), b.split(list(b_sizes)), strict=True):
        pairs = zip(left.split(list(a_sizes), 1), right.split(list(b_sizes), 1), strict=True)
        rows.append(torch.cat([torch.kron(one.contiguous(), two.contiguous()) for one, two in pairs], 1))
    return torch.cat(rows)


def kron_rank(a: Tensor, b: Tensor) -> int:
    """Rank of ``A ⊗ B``, the product of those of ``A (I, J)`` and ``B (O, Q)``."""
    return int(torch.linalg.matrix_rank(a)) * int(torch.linalg.matrix_rank(b))


def kron_logdet(a: Tensor, b: Tensor) -> Tensor:
    """``log|det(A ⊗ B)| = O log|det A| + I log|det B|`` of ``(I, I)`` and ``(O, O)``, 0-dim."""
    return len(b) * torch.linalg.slogdet(a).logabsdet + len(a) * torch.linalg.slogdet(b).logabsdet
