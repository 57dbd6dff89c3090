"""One factor of a Kronecker product, stored as matrices or by its diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kf.linalg import cholesky, eigh
from laplace_kf.operators.spectral import Basis

__all__ = ["definite", "diagonal", "full", "generalised_basis"]


def full(factor: Tensor) -> Tensor:
    """A factor as matrices ``(R, d, d)``."""
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def diagonal(factor: Tensor) -> Tensor:
    """Diagonals ``(R, d)`` of a factor."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)


def definite(factor: Tensor) -> bool:
    """Whether matrices ``(R, d, d)`` or diagonals ``(R, d)`` have no eigenvalue that is zero up to rounding."""
    values = factor if factor.dim() == 2 else torch.linalg.eigvalsh(factor)
    limit = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1)
    return bool((values.amin(-1) > limit).all())


def generalised_basis(matrix: Tensor, metric: Tensor, label: str) -> tuple[Tensor, Basis]:
    """``B`` with ``B Bᵀ = metric`` and ``B diag(s) Bᵀ = matrix``; returns ``s (R, d)`` and the basis."""
    if matrix.dim() == 2 and metric.dim() == 2:
        root = metric.sqrt()
        basis = Basis(torch.diag_embed(root), torch.diag_embed(1 / root), root.log().sum(-1))
        return matrix / metric, basis
    matrix, metric = full(matrix), full(metric)
    lower = cholesky(metric, label)
    half = torch.linalg.solve_triangular(lower, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.transpose(-1, -2), upper=False)
    values, vectors = eigh((whitened + whitened.transpose(-1, -2)) / 2, label)
    dual = torch.linalg.solve_triangular(lower.transpose(-1, -2), vectors, upper=True)
    logdet = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return values, Basis(torch.matmul(lower, vectors), dual, logdet)
