"""How far: minimisers of the quadratic model along given directions, and the backtracking line search.

The model is ``M(δ) − M(0) = ∇Eᵀδ + ½ δᵀC̄δ`` with ``C̄ = G + (τ + η) I`` and the exact Gauss-Newton matrix ``G``
(methods 6). Along ``K`` directions it needs only the ``K × K`` matrix of their products, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["line_search", "model_change", "optimal_coefficients"]

DEGENERATE = 1e-12  # determinant over product of diagonals below which two directions count as one (methods 6.2)


def optimal_coefficients(curvature: Tensor, slope: Tensor) -> Tensor:
    """The coefficients that minimise ``slopeᵀc + ½ cᵀ curvature c`` (α* of methods 6.1; (α, μ) of 6.2).

    Where the directions are linearly dependent (the first step has no previous update), the ones after the first are
    left out one by one. Without positive finite curvature along the first there is no minimum, and all are 0.

    Args:
        curvature: ``(K, K)`` products ``uᵀ C̄ v`` of the directions.
        slope: ``(K,)`` products with the gradient.

    Returns:
        ``(K,)`` float64.
    """
    curvature, slope = curvature.double(), slope.double()
    out = torch.zeros_like(slope)
    for count in range(len(slope), 0, -1):
        a, b = curvature[:count, :count], slope[:count]
        diagonal = a.diagonal()
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all() and (diagonal > 0).all()):
            continue
        scale = diagonal.sqrt()
        normal = a / (scale[:, None] * scale[None, :])
        if count > 1 and float(torch.linalg.det(normal)) < DEGENERATE:
            continue
        out[:count] = -torch.linalg.solve(normal, b / scale) / scale
        break
    return out


def model_change(coefficients: Tensor, curvature: Tensor, slope: Tensor) -> float:
    """``M(δ) − M(0)`` for ``δ = Σ c_k u_k``, with ``c (K,)`` and arguments as in :func:`optimal_coefficients`."""
    c = coefficients.double()
    return float(slope.double() @ c + 0.5 * c @ curvature.double() @ c)


def line_search(
    objective: Callable[[float], float],
    start: float,
    slope: float,
    *,
    sufficient: float = 1e-2,
    shrink: float = 0.8,
    trials: int = 60,
) -> tuple[float, float]:
    """Backtracking from α = 1 until ``E(α) ≤ E(0) + sufficient · α · slope`` (methods 7.7; Martens 2016, 4.6.8).

    Args:
        objective: ``E(θ + α δ)`` as a function of α.
        start: ``E(θ)``.
        slope: ``∇Eᵀδ``.
        sufficient: part of the linear decrease that is asked for.
        shrink: factor on α after a failed trial.
        trials: how many values are tried.

    Returns:
        α and ``E`` there; ``(0.0, start)`` if every trial fails.
    """
    alpha = 1.0
    for _ in range(trials):
        value = objective(alpha)
        if value <= start + sufficient * alpha * slope:  # NaN fails the comparison
            return alpha, value
        alpha *= shrink
    return 0.0, start
