"""What a quadratic model can promise at the most, and how much of its matrix can be other than zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.diagnostics.base import Parameters, walked
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting, require_memory
from laplace_kf.passes import Pass

__all__ = ["Ranks", "ranks", "reduction_bound"]


def output_curvature(seen: Pass) -> tuple[Tensor, Tensor]:
    """PSD output curvature of every position, ``(N, T, C, C)``, and scores of the positions, ``(N, T, C)``."""
    outputs = seen.outputs.detach()
    outputs = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
    curvature = seen.likelihood.curvature(outputs, seen.targets)
    curvature = curvature if curvature.dim() == 4 else curvature[:, None]
    return curvature, seen.likelihood.to_positions(seen.likelihood.score(outputs, seen.targets))


@lasting()
def reduction_bound(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    *,
    forward: Forward | None = None,
) -> Tensor:
    """The most that the Gauss-Newton model can promise, ``1/(2N) Σ_n ∇ᵀ H⁺ ∇`` in the outputs (methods 2.5).

    ``M(0) − M(δ)`` of the quadratic model of the mean loss, with gradient and curvature of the same data, is at most
    this for every step δ (Martens 2016, 4.10.1 and 5.9). Infinite where the gradient of an example has a part in which
    its output curvature is zero: then the model may fall without bound.

    Args:
        model, likelihood, data, forward: as for :func:`laplace_kf.curvature.estimate`.

    Returns:
        0-dim float64, never negative.

    Raises:
        ShapeMismatch: if the data are empty.
    """
    total = torch.zeros((), dtype=torch.float64)

    def visit(seen: Pass) -> None:
        curvature, score = output_curvature(seen)
        values, vectors = torch.linalg.eigh(curvature.double())
        along = torch.einsum("ntcd,ntc->ntd", vectors, score.double())
        limit = values.amax(-1, keepdim=True).clamp_min(0) * values.shape[-1] * torch.finfo(curvature.dtype).eps
        curved = values > limit
        parts = torch.where(curved, along.square() / torch.where(curved, values, 1), 0)
        loose = torch.where(curved, torch.zeros_like(along), along).norm(dim=-1)
        size = along.norm(dim=-1)
        unbounded = loose > 1e3 * torch.finfo(score.dtype).eps * torch.maximum(size, torch.ones_like(size))
        total.add_(float("inf") if bool(unbounded.any()) else parts.sum().cpu())

    _, count = walked(model, likelihood, data, visit, forward)
    return total / (2 * count)


@dataclass(frozen=True)
class Ranks:
    """Rank of a Gauss-Newton matrix and its bounds.

    Attributes:
        measured: numerical rank of the matrix.
        bound: ``min(P, Σ_n rank H_L)``: no larger rank is possible with these data (methods 2.5).
        outputs: the cruder bound ``N`` times the outputs of an example.
        sampled: the bound ``N · S`` of a Fisher with S drawn targets an example, or of the empirical one (S = 1).
        parameters: P.
    """

    measured: int
    bound: int
    outputs: int
    sampled: int
    parameters: int


@lasting()
def ranks(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    parameters: Parameters = "all",
    *,
    samples: int = 1,
    forward: Forward | None = None,
) -> Ranks:
    """Measured rank of the Gauss-Newton matrix beside what it can be (methods 2.5; Botev 2020, 3.6).

    The rank is that of the rows ``H_L^½ J`` of all examples: their singular values, not their squares, are compared
    with the rounding of the type, so float64 networks are told apart best.

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`.
        samples: S of the bound ``sampled``.

    Raises:
        ShapeMismatch: if the data are empty, or ``samples`` is no positive whole number.
        IncompatiblePair: if the rows do not fit into the memory.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ShapeMismatch(f"samples must be a whole number of at least 1, got {samples!r}")
    kept: list[Tensor] = []
    tally = {"bound": 0, "outputs": 0}

    def visit(seen: Pass) -> None:
        outputs, size = seen.outputs.detach(), seen.layout.size
        curvature, _ = output_curvature(seen)
        tally["bound"] += int(torch.linalg.matrix_rank(curvature.double(), hermitian=True).sum())
        tally["outputs"] += seen.count * outputs[0].numel()
        root = seen.likelihood.hessian_root(outputs, seen.targets)  # (V, N, ...)
        rows = root.shape[0] * root.shape[1]
        require_memory(
            rows * (size + outputs.numel()) * root.element_size(),
            outputs.device,
            f"{rows} rows of a root of the Gauss-Newton matrix",
            "Leave parameters out with parameters=[patterns], or take fewer examples.",
        )
        single = outputs.new_zeros(rows, *outputs.shape)
        place = torch.arange(rows, device=outputs.device)
        single[place, place % root.shape[1]] = root.reshape(rows, *outputs.shape[1:])
        found = seen.pulled(single[single.flatten(1).any(1)])
        stacked = torch.cat([*kept, found])
        kept[:] = [torch.linalg.qr(stacked, mode="r").R if len(stacked) > size else stacked]

    layout, count = walked(model, likelihood, data, visit, forward, parameters)
    measured = int(torch.linalg.matrix_rank(kept[0])) if kept[0].numel() else 0
    bound = min(layout.size, tally["bound"])
    return Ranks(measured, bound, tally["outputs"], count * samples, layout.size)
