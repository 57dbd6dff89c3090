"""Preconditioned conjugate gradients for Hessian-free steps (methods 7.2-7.5, 7.7).

Minimises ``q(x) = ½ xᵀAx − bᵀx``, which is ``M(x) − M(0)`` of the quadratic model with ``b = −∇E``. Vectors keep
their type, scalars are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_kf.errors import InvalidArgument

__all__ = ["Map", "Progress", "Run", "conjugate_gradients"]

Map = Callable[[Tensor], Tensor]
PIECE = 65_536  # entries of vectors that are converted at once


@dataclass(frozen=True)
class Progress:
    """Termination by relative progress (methods 7.3).

    Attributes:
        tolerance: stops when ``(q(x_j) − q(x_{j−k})) / q(x_j)`` falls below it; 0 never stops.
        window: least ``k``; it grows to a tenth of the steps made.
    """

    tolerance: float = 1e-4
    window: int = 10

    def stops(self, values: list[float]) -> bool:
        """Whether to stop, from ``q`` after every step so far (the start is entry 0)."""
        j = len(values) - 1
        k = max(self.window, math.ceil(j / 10))
        # with a warm start q(x_0) > q(0) = 0 is normal: never stop there
        return j > k and values[j] < 0 and (values[j] - values[j - k]) / values[j] < self.tolerance


@dataclass
class Run:
    """What one run found.

    Attributes:
        x: the last iterate ``(P,)``.
        values: ``q`` at the start and after every step.
        kept: some iterates with their step numbers, the last one included.
        reason: why it stopped.
    """

    x: Tensor
    values: list[float]
    kept: list[tuple[int, Tensor]] = field(default_factory=list)
    reason: str = "limit"


def conjugate_gradients(
    product: Map,
    b: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Map | None = None,
    metric: Map | None = None,
    radius: float | None = None,
    limit: int = 250,
    progress: Progress | None = None,
    spacing: float = 1.3,
    watch: Callable[[int, Tensor], bool] | None = None,
) -> Run:
    """PCG on ``A x = b`` (methods 7.2); with a radius the Steihaug–Toint trust-region method (methods 7.7).

    Args:
        product: ``v -> A v``, both ``(P,)``.
        b: ``(P,)``.
        start: ``x₀``; zero by default.
        precondition: ``r -> P⁻¹ r``; nothing for the identity.
        metric: ``v -> P v``, in which the radius is measured; nothing for the identity.
        radius: bound on ``‖x‖_P``; needs a zero start.
        limit: largest number of steps.
        progress: termination rule.
        spacing: iterates are kept at steps ``⌈spacing^i⌉``.
        watch: called with step number and iterate ``(P,)`` at kept steps; stops the run by returning true.

    Raises:
        ValueError: for a radius with a start.
    """
    if radius is not None and start is not None:
        raise InvalidArgument("a trust region needs a zero start: leave out start (decay=0), or radius")
    solve: Map = precondition if precondition is not None else _same
    measure: Map = metric if metric is not None else _same
    progress = progress if progress is not None else Progress()
    x = torch.zeros_like(b) if start is None else start.clone()
    r = -b.clone() if start is None else product(x) - b
    y = solve(r)
    p, ry = -y, _dot(r, y)
    run = Run(x, [0.5 * _dot(r - b, x)])
    keep = 1.0
    for j in range(1, limit + 1):
        if ry <= 0:
            run.reason = "solved"
            break
        curved = product(p)
        along = _dot(p, curved)
        if along <= 0 and radius is None:
            run.reason = "negative curvature"
            break
        alpha = ry / along if along > 0 else math.inf
        if radius is not None:
            reach = _to_boundary(x, p, radius, measure)
            if alpha >= reach:
                x, r = x + reach * p, r + reach * curved
                run.values.append(0.5 * _dot(r - b, x))
                run.reason = "boundary"
                break
        x, r = torch.add(x, p, alpha=alpha), r.add_(curved, alpha=alpha)  # iterates are kept, residuals are not
        run.values.append(0.5 * _dot(r - b, x))
        if j >= keep:
            run.kept.append((j, x))
            while math.ceil(keep) <= j:
                keep *= spacing
            if watch is not None and watch(j, x):
                run.reason = "watched"
                break
        if progress.stops(run.values):
            run.reason = "progress"
            break
        y = solve(r)
        fresh = _dot(r, y)
        p, ry = p.mul_(fresh / ry).sub_(y), fresh
    run.x = x
    last = len(run.values) - 1
    if last and (not run.kept or run.kept[-1][0] != last):
        run.kept.append((last, x))
    return run


def _same(v: Tensor) -> Tensor:
    return v


def _dot(u: Tensor, v: Tensor) -> float:
    """In float64, piece by piece: converted pieces stay in the processor's cache."""
    pieces = zip(u.split(PIECE), v.split(PIECE), strict=True) if u.device.type == "cpu" else [(u, v)]
    return float(torch.stack([a.double() @ b.double() for a, b in pieces]).sum())


def _to_boundary(x: Tensor, p: Tensor, radius: float, measure: Map) -> float:
    """The ``t ≥ 0`` with ``‖x + t p‖_P = radius``."""
    mp = measure(p)
    a, b, c = _dot(p, mp), _dot(x, mp), _dot(x, measure(x)) - radius**2
    return (-b + math.sqrt(max(b * b - a * c, 0.0))) / a
