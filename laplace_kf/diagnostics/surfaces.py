"""The loss on a plane through the weights, and along steps with more or less damping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, run
from laplace_kf.curvature import estimate
from laplace_kf.diagnostics.base import Parameters, walked
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.operators import DAMPINGS
from laplace_kf.optim.inverse import INVERSES
from laplace_kf.optim.objective import Batch, Objective
from laplace_kf.passes import Pass
from laplace_kf.substitution import substituted

__all__ = ["DampingStudy", "damping_study", "loss_surface"]


@lasting()
def loss_surface(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    u: Tensor,
    v: Tensor,
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    parameters: Parameters = "all",
    *,
    forward: Forward | None = None,
) -> Tensor:
    """Mean negative log-likelihood at ``θ + x u + y v`` (Botev 2020, Fig. 3.1).

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`; the weights stay.
        u, v: directions ``(P,)``.
        x, y: coordinates, one axis each.

    Returns:
        ``(len(x), len(y))`` float64; NaN where outputs are not finite.

    Raises:
        ShapeMismatch: if a direction does not have one entry for every parameter, or the data are empty.
    """
    first, second = (torch.as_tensor(axis, dtype=torch.float64).reshape(-1) for axis in (x, y))
    grid = torch.cartesian_prod(first, second).reshape(-1, 2)
    losses = _losses(model, likelihood, data, torch.stack([u.reshape(-1), v.reshape(-1)]), grid, parameters, forward)
    return losses.reshape(len(first), len(second))


def _losses(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    directions: Tensor,
    grid: Tensor,
    parameters: Parameters,
    forward: Forward | None,
) -> Tensor:
    """Mean loss at ``θ + Σ_k c_k d_k`` for ``directions (K, P)`` and every row ``c`` of ``grid (M, K)``: ``(M,)``."""
    total = torch.zeros(len(grid), dtype=torch.float64)

    def visit(seen: Pass) -> None:
        if directions.shape[-1] != seen.layout.size:
            raise ShapeMismatch(
                f"expected directions of shape ({seen.layout.size},), got ({directions.shape[-1]},): one entry "
                "for each selected parameter"
            )
        for k, row in enumerate(grid):
            change = seen.layout.split((row.to(directions) @ directions)[None])
            pairs = zip(seen.layout.names, seen.weights, strict=True)
            values = {n: w.detach() + change[n][0].to(w) for n, w in pairs}
            values.update({n: b.clone() for n, b in model.named_buffers()})
            with torch.no_grad():
                outputs, targets = substituted(model, values, lambda: run(model, seen.batch, forward))
                if bool(torch.isfinite(outputs).all()):
                    total[k] -= seen.likelihood.log_prob(outputs, targets).sum(dtype=torch.float64).cpu()
                else:
                    total[k] = float("nan")

    _, count = walked(model, likelihood, data, visit, forward, parameters)
    return total / count


@dataclass(frozen=True)
class DampingStudy:
    """What steps of M different dampings bring (Martens 2016, Fig. 6.6).

    Attributes:
        gammas: the dampings γ.
        improvement: ``E(θ) − E(θ + Δ)`` of the raw steps, ``(M,)`` float64.
        rescaled: the same of ``α* Δ``, α* by the exact Gauss-Newton matrix with ``tau + l2``.
        alpha: α*.
    """

    gammas: tuple[float, ...]
    improvement: Tensor
    rescaled: Tensor
    alpha: Tensor


@lasting()
def damping_study(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Any,
    gammas: Sequence[float],
    *,
    tau: float = 0.0,
    l2: float = 0.0,
    estimator: str = "exact",
    damping: str = "balanced",
    forward: Forward | None = None,
) -> DampingStudy:
    """Improvement of the objective by one Kronecker-factored step as a function of its damping (methods 6.2).

    ``Δ = −(C̃ ⊕ γ)⁻¹ ∇E`` with both factors damped by γ (``ω γ`` and ``γ / ω``), as it is and rescaled by the exact
    quadratic model. ``E`` is the mean negative log-likelihood plus ``l2/2 ‖θ‖²``.

    Args:
        model, likelihood, data, forward: as for :func:`laplace_kf.curvature.estimate`; gone over several times.
        gammas: dampings γ > 0 (γ² on the curvature; it holds the l2 term).
        tau: damping of the exact model that rescales.
        l2: weight decay η.
        estimator, damping: of the Kronecker factors, and how they take the damping.

    Raises:
        IncompatiblePair: for a γ that is not positive.
        ShapeMismatch: if the data are empty.
    """
    if not gammas or not all(0 < gamma < float("inf") for gamma in gammas):
        raise IncompatiblePair(f"gammas must be positive numbers, got {list(gammas)}")
    statistics = estimate(model, likelihood, data, "kron", estimator, forward=forward)
    sums: list[Tensor] = []

    def visit(seen: Pass) -> None:
        theta = torch.cat([w.detach().reshape(-1) for w in seen.weights])
        found = seen.gradient()
        sums[:] = [found, theta] if not sums else [sums[0] + found, theta]

    _, count = walked(model, likelihood, data, visit, forward)
    theta = sums[1]
    gradient = sums[0] / count + l2 * theta
    solver, inverse = DAMPINGS[damping], INVERSES["block_diagonal"]
    steps = torch.stack([-inverse.build(statistics, gamma**2, solver).solve(gradient) for gamma in gammas])
    curved = torch.zeros(len(gammas), dtype=torch.float64)

    def measure(seen: Pass) -> None:
        objective = Objective(model, seen.likelihood, forward)
        batch = Batch(seen.batch, 1, objective.random_state())
        for k, step in enumerate(steps):
            curved[k] += objective.products([batch], seen.layout.split(step[None]))[0, 0].cpu()

    walked(model, likelihood, data, measure, forward)
    squares = steps.double().square().sum(1).cpu()
    alpha = -(steps @ gradient).double().cpu() / (curved / count + (tau + l2) * squares)
    rows = torch.diag(torch.ones(len(gammas), dtype=torch.float64))
    grid = torch.cat([torch.zeros_like(rows[:1]), rows, rows * alpha])
    losses = _losses(model, likelihood, data, steps, grid, "all", forward)
    at = theta.double() + grid.to(theta).double() @ steps.double()
    losses = losses + l2 / 2 * at.square().sum(1).cpu()
    improvement = losses[0] - losses[1:]
    return DampingStudy(tuple(gammas), improvement[: len(gammas)], improvement[len(gammas) :], alpha)
