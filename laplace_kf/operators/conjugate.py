"""Preconditioned conjugate gradients for several right sides at a time, each with steps of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.linalg import KNOB

__all__ = ["conjugate_gradients"]

Map = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Map,
    precondition: Map,
    right: Tensor,
    enough: Callable[[Tensor, Tensor], Tensor],
    label: str,
    iterations: int,
    start: Tensor | None = None,
) -> Tensor:
    """``Λ⁻¹ B`` for a positive definite ``Λ``, until every column is ``enough``; warns where that is not reached.

    Args:
        product: ``Λ v`` for ``v (P, K)``.
        precondition: ``M⁻¹ v`` for ``v (P, K)``, ``M`` near ``Λ``.
        right: ``B (P, K)``.
        enough: which columns are done, bool ``(K,)``, by the residual ``r (P, K)`` and ``rᵀ M⁻¹ r (K,)``.
        label: name of the block, for the warning.
        iterations: products at most.
        start: where to begin, ``(P, K)``; default 0.
    """
    x = torch.zeros_like(right) if start is None else start
    residual = right.clone() if start is None else right - product(start)
    z = precondition(residual)
    direction, square = z, (residual * z).sum(0)
    for _ in range(iterations):
        active = ~enough(residual, square)
        if not bool(active.any()):
            return x
        image = product(direction)
        curvature = (direction * image).sum(0)
        step = torch.where(active & (curvature > 0), square / curvature, torch.zeros_like(square))
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        following = (residual * z).sum(0)
        ratio = torch.where(square > 0, following / square, torch.zeros_like(square))
        direction, square = z + ratio * direction, following
    reached = float((residual.norm(dim=0) / right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny)).max())
    warnings.warn(
        f"block {label!r}: conjugate gradients stopped after {iterations} steps with a relative residual of "
        f"{reached:.2g}. {KNOB}",
        RuntimeWarning,
        stacklevel=users_line(),
    )
    return x
