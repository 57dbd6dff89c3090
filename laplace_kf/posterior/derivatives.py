"""Means and variances of what is linear in the network: its derivatives to the inputs, sums over parts, residuals.

Under the linearised network ``f(x) + J(x) ε``, ``ε ~ N(0, Λ⁻¹)``, a linear operator ``D`` of the function is normal:
``D f`` with covariance ``(D J) Λ⁻¹ (D J)ᵀ``, where ``D J`` is the derivative of ``D f`` to the weights. For an operator
that is not linear this is the first-order (delta) approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, run
from laplace_kf.errors import NonFinite, ShapeMismatch, UnsupportedLayer
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise
from laplace_kf.predictive.calls import require_movable
from laplace_kf.predictive.linearized import Stand

__all__ = ["Derivatives", "Operator", "derivatives"]

Operator = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
ROWS = 2**25  # numbers of the rows (weights by values) that are made at once


@dataclass(frozen=True)
class Derivatives:
    """Normal values.

    Attributes:
        mean: ``(N, C, *x.shape[1:])``, or the shape that the operator returns.
        epistemic_variance: in the same shape.
        covariance: of all values, flattened, ``(K, K)``; ``None`` unless it was asked for.
    """

    mean: Tensor
    epistemic_variance: Tensor
    covariance: Tensor | None = None


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``∂f/∂x (N, C, *x.shape[1:])``; an example's outputs depend on its own inputs alone."""
    outputs = f(x).flatten(1)
    each = [torch.autograd.grad(column.sum(), x, create_graph=True, allow_unused=True)[0] for column in outputs.T]
    return torch.stack([torch.zeros_like(x) if one is None else one for one in each], 1)


def derivatives(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    x: Tensor,
    operator: Operator | None,
    joint: bool,
) -> Derivatives:
    """Values and their variances; arguments as of ``LaplacePosterior.derivatives``, ``x (N, ...)``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeMismatch(
            f"derivatives need inputs as one tensor of floating type, got {what}; for other inputs give forward= that "
            "makes them of one, or operator= with the values that are wanted"
        )
    like = precision.diag()
    with preserved(model), torch.enable_grad():
        leaves = {name: value.detach().clone().requires_grad_() for name, value in mean.items()}
        stand = Stand(model, forward, leaves)
        require_movable(model, forward, mean, x)
        inputs = x.detach().clone().requires_grad_()
        values = (gradient if operator is None else operator)(lambda z: run(model, z, stand)[0], inputs)
        if not isinstance(values, Tensor):
            raise ShapeMismatch(f"operator= must return a tensor of values, got {type(values).__name__}")
        if not values.requires_grad:
            raise UnsupportedLayer(
                "the values do not depend on the weights with a graph: make derivatives with create_graph=True "
                "(torch.autograd.grad(f(x).sum(), x, create_graph=True)), and detach nothing"
            )
        if not bool(torch.isfinite(values).all()):
            raise NonFinite("the derivatives at the posterior mean have NaN or infinite entries")
        flat = values.flatten()
        variances = torch.zeros(len(flat), dtype=like.dtype, device=like.device)
        kept = []
        for some in torch.arange(len(flat)).split(max(1, ROWS // precision.size)):
            rows = _rows(flat, some, leaves, precision)
            kept += [rows] if joint else []
            solved = precision.solve(rows.T)
            variances[some] = (rows.T * solved).sum(0)
        covariance = None
        if joint:
            rows = torch.cat(kept)
            covariance = rows @ precision.solve(rows.T)
            covariance = (covariance + covariance.T) / 2
    return Derivatives(values.detach(), variances.reshape(values.shape), covariance)


def _rows(flat: Tensor, some: Tensor, leaves: Mapping[str, Tensor], precision: Blockwise) -> Tensor:
    """Derivatives of some values to the weights, ``(K, P)``."""
    like = precision.diag()
    found: list[dict[str, Tensor]] = []
    for index in some.tolist():
        parts = torch.autograd.grad(flat[index], list(leaves.values()), retain_graph=True, allow_unused=True)
        found.append(
            {
                name: (torch.zeros_like(leaf) if part is None else part).to(like)[None]
                for (name, leaf), part in zip(leaves.items(), parts, strict=True)
            }
        )
    return torch.cat([precision.layout.join(one) for one in found])
