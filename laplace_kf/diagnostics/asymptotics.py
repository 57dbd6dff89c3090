"""Stochastic steps on a quadratic, simulated and in closed form (methods 8.4; Martens 2016, 5.7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.linalg import cholesky
from laplace_kf.models import lasting
from laplace_kf.operators import fresh_generator

__all__ = ["Convergence", "convergence"]

DECAYING = "1/k"


@dataclass(frozen=True)
class Convergence:
    """Excess ``E(θ_k) − E*`` after each of K steps; every entry ``(K,)`` float64.

    Attributes:
        excess: mean over the simulated repetitions.
        error: its standard error.
        predicted: closed form of the leading term: ``1/(4k) tr((I − ½ B^½ H⁻¹ B^½)⁻¹ B^-½ Σ B^-½)`` for the rate
            ``1/(k+1)``, ``α/4 tr(B⁻¹ Σ)`` for a constant α (methods 8.4).
        exact: the expectation itself, by the recursion of the second moments.
        averaged: mean excess of the average of the iterates ``θ_0 … θ_k``.
        averaged_bound: the bound of Theorem 8 for it (constant rates with ``2 α λ_max(B⁻¹ H) < 1``;
            infinite otherwise).
    """

    excess: Tensor
    error: Tensor
    predicted: Tensor
    exact: Tensor
    averaged: Tensor
    averaged_bound: Tensor


@lasting()
def convergence(
    hessian: Tensor,
    preconditioner: Tensor,
    noise: Tensor,
    *,
    steps: int = 100,
    repetitions: int = 100,
    start: Tensor | None = None,
    rate: float | str = DECAYING,
    generator: torch.Generator | None = None,
) -> Convergence:
    """Simulates ``θ_{k+1} = θ_k − α_k B⁻¹ g_k`` on ``E(θ) = ½ θᵀ H θ`` (methods 8.4).

    Args:
        hessian: ``H (D, D)``, positive definite.
        preconditioner: ``B (D, D)``, positive definite.
        noise: ``Σ (D, D)``, covariance of the gradients ``g_k = H θ_k + ε_k``, positive semi-definite.
        steps: how many.
        repetitions: independent runs.
        start: ``θ_0 (D,)``; default: the optimum, 0.
        rate: ``"1/k"`` for ``α_k = 1/(k+1)`` (k = 0, 1, …), or a constant α.
        generator: random numbers; a fresh private one by default.

    Raises:
        ShapeMismatch: if the matrices or the start do not fit each other.
        IncompatiblePair: for another rate; if ``1/k`` is too fast for the preconditioner
            (``λ_min(B⁻¹ H) ≤ ½``), or a constant one diverges (``α λ_max(B⁻¹ H) ≥ 2``).
        NotPositiveDefinite: for matrices that are not.
    """
    h, b, s = (matrix.detach().double().cpu() for matrix in (hessian, preconditioner, noise))
    size = len(h)
    origin = torch.zeros(size, dtype=torch.float64) if start is None else start.detach().double().cpu()
    shapes = [tuple(m.shape) for m in (h, b, s, origin)]
    if shapes != [(size, size)] * 3 + [(size,)] or steps < 1 or repetitions < 1:
        raise ShapeMismatch(
            f"expected three (D, D) matrices and (D,), steps and repetitions of 1 at least, got {shapes}"
        )
    lower = cholesky(b, "preconditioner")
    cholesky(h, "hessian")
    pencil = torch.linalg.eigvalsh(_both(lower, h))
    alphas = _rates(rate, steps, pencil)
    root = _root(s)
    generator = generator if generator is not None else fresh_generator()
    theta = origin.expand(repetitions, size).clone()
    total = theta.clone()
    mean, second = origin.clone(), torch.outer(origin, origin)
    inverse = torch.cholesky_inverse(lower)
    spread = inverse @ s @ inverse
    rows: dict[str, list[Tensor]] = {name: [] for name in ("excess", "error", "exact", "averaged")}
    for k, alpha in enumerate(alphas):
        drawn = torch.randn(repetitions, size, generator=generator, device=generator.device, dtype=torch.float64)
        theta = theta - alpha * (theta @ h + drawn.cpu() @ root.T) @ inverse
        total = total + theta
        shrink = torch.eye(size, dtype=torch.float64) - alpha * inverse @ h
        mean, second = shrink @ mean, shrink @ second @ shrink.T + alpha**2 * spread
        energy = 0.5 * torch.einsum("rd,de,re->r", theta, h, theta)
        average = total / (k + 2)
        rows["excess"].append(energy.mean())
        rows["error"].append(energy.std(correction=0) / repetitions**0.5)
        rows["exact"].append(0.5 * (h * second).sum())
        rows["averaged"].append(0.5 * torch.einsum("rd,de,re->r", average, h, average).mean())
    found = {name: torch.stack(values) for name, values in rows.items()}
    predicted, bound = _closed(h, b, s, origin, alphas, rate, lower, pencil)
    return Convergence(predicted=predicted, averaged_bound=bound, **found)


def _rates(rate: float | str, steps: int, pencil: Tensor) -> list[float]:
    if rate == DECAYING:
        if float(pencil[0]) <= 0.5:
            raise IncompatiblePair(
                f'rate="1/k" needs λ_min(B⁻¹ H) > ½, got {float(pencil[0]):.3g}: the error then falls more slowly than '
                "1/k. Scale the preconditioner down, or give a constant rate"
            )
        return [1 / (k + 1) for k in range(steps)]
    if isinstance(rate, (str, bool)) or not 0 < float(rate) < float("inf"):
        raise IncompatiblePair(f'rate must be "1/k" or a positive number, got {rate!r}')
    if float(rate) * float(pencil[-1]) >= 2:
        raise IncompatiblePair(f"rate={rate} diverges: it must be below 2 / λ_max(B⁻¹ H) = {2 / float(pencil[-1]):.3g}")
    return [float(rate)] * steps


def _both(lower: Tensor, matrix: Tensor) -> Tensor:
    """``L⁻¹ M L⁻ᵀ`` for a Cholesky factor and a symmetric matrix, both ``(D, D)``."""
    half = torch.linalg.solve_triangular(lower, matrix, upper=False)
    whole = torch.linalg.solve_triangular(lower, half.T, upper=False)
    return (whole + whole.T) / 2


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()


def _closed(
    h: Tensor,
    b: Tensor,
    s: Tensor,
    origin: Tensor,
    alphas: list[float],
    rate: float | str,
    lower: Tensor,
    pencil: Tensor,
) -> tuple[Tensor, Tensor]:
    """Leading term, and the bound of the average (Theorem 8), each ``(steps,)``."""
    k = torch.arange(1, len(alphas) + 1, dtype=torch.float64)
    size = len(h)
    if rate == DECAYING:
        # with B = L Lᵀ in the place of the symmetric root, which gives the same trace
        inner = torch.eye(size, dtype=torch.float64) - 0.5 * lower.T @ torch.linalg.solve(h, lower)
        trace = torch.trace(torch.linalg.solve(inner, _both(lower, s)))
        return trace / (4 * k), torch.full_like(k, float("inf"))
    alpha = alphas[0]
    scatter = float(torch.trace(_both(lower, s)))
    predicted = torch.full_like(k, alpha / 4 * scatter)
    if 2 * alpha * float(pencil[-1]) >= 1:
        return predicted, torch.full_like(k, float("inf"))
    moved = b @ origin
    starts = torch.stack(
        [
            float(moved @ torch.linalg.solve(h, moved)) / ((k + 1) ** 2 * alpha**2),
            float(origin @ moved) / ((k + 1) * alpha),
            torch.full_like(k, 1.5 * float(origin @ h @ origin)),
        ]
    ).amin(0)
    noise = (float(torch.trace(torch.linalg.solve(h, s))) / (k + 1)).clamp_max(alpha / 2 * scatter)
    return predicted, noise + starts
