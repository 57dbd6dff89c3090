"""Dense Jacobians and Hessians of small networks, and quadratic forms without a backward pass (methods 2.5, 2.7)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite, predicted
from laplace_kf.diagnostics.base import Parameters, require_dense, walked
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting, preserved, require_memory, usable
from laplace_kf.optim.objective import Batch, Objective
from laplace_kf.passes import Pass, columns_of
from laplace_kf.tape import Tracer

__all__ = ["hessian", "jacobian", "quadratic_form"]

AT_ONCE = 64  # output entries whose gradients are kept together before they are put in place


@lasting()
def jacobian(model: nn.Module, x: Any, parameters: Parameters = "all", *, forward: Forward | None = None) -> Tensor:
    """Jacobians of every example's outputs in the parameters (methods 2.5).

    Args:
        model: module; evaluated in eval mode and left as it was.
        x: inputs, what ``predict`` takes: what the model takes, N examples.
        parameters: ``"all"``, ``"last_layer"`` or name patterns.
        forward: ``(model, batch) -> (outputs, targets)``.

    Returns:
        ``(N, K, P)``, K outputs of an example flattened, P selected parameters in flat order.

    Raises:
        IncompatiblePair: if it does not fit into the memory.
        NonFinite: for NaN or infinity in the inputs or outputs.
    """
    model = usable(model)
    check_finite(x, 0, "the input")
    with preserved(model):
        tracer = Tracer(model, lambda model, batch: (predicted(model, batch, forward), None), parameters)
        seen = tracer.observe(x)
        outputs = seen.outputs.detach()
        count, size, total = len(outputs), outputs[0].numel(), tracer.layout.size
        each = count * size * total * outputs.element_size()
        require_memory(each, outputs.device, f"a Jacobian of shape ({count}, {size}, {total})", "Take fewer examples.")
        found = outputs.new_zeros(count, size, total)
        tracer.require_all_seen()
        unit = torch.eye(size, dtype=outputs.dtype, device=outputs.device).reshape(size, 1, *outputs.shape[1:])
        with torch.no_grad():
            for start in range(0, size, AT_ONCE):
                columns = unit[start : start + AT_ONCE].expand(-1, count, *outputs.shape[1:])
                for name, signal in seen.signals(columns).items():
                    places = tracer.layout.positions(tracer.blocks[name]).to(outputs.device)
                    rows = signal.jacobian().reshape(len(columns), count, -1).transpose(0, 1).to(found)
                    found[:, start : start + len(columns), places] += rows
        return found


@lasting()
def hessian(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    parameters: Parameters = "all",
    *,
    forward: Forward | None = None,
) -> Tensor:
    """Dense Hessian of the mean negative log-likelihood, ``(P, P)`` (methods 2.2).

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`.

    Raises:
        IncompatiblePair: if it does not fit into the memory.
        ShapeMismatch: if the data are empty.
    """
    sums: list[Tensor] = []

    def visit(seen: Pass) -> None:
        size, like = seen.layout.size, seen.weights[0]
        require_dense(size, like, "the Hessian")
        found = seen.hessian_rows(torch.eye(size, dtype=like.dtype, device=like.device))
        sums[:] = [found if not sums else sums[0] + found]

    _, count = walked(model, likelihood, data, visit, forward, parameters)
    mean = sums[0] / count
    return (mean + mean.T) / 2


@lasting()
def quadratic_form(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    u: Tensor,
    v: Tensor | None = None,
    parameters: Parameters = "all",
    *,
    forward: Forward | None = None,
) -> Tensor:
    """``uᵀ G v`` with the mean Gauss-Newton matrix, one Jacobian product a vector (methods 2.7; Martens 2016, B.3).

    Forward-mode differentiation, no backward pass: two where an operation has no rule for it, or where the first
    product shows that it is the derivative of another function.

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`.
        u: ``(P,)``.
        v: ``(P,)``; ``None`` for ``u`` itself.

    Returns:
        0-dim, in the type of ``u``.

    Raises:
        ShapeMismatch: if a vector does not have one entry for every parameter, or the data are empty.
    """
    total: list[Tensor] = []
    objective: Objective | None = None

    def visit(seen: Pass) -> None:
        nonlocal objective
        rows = torch.cat([columns_of(part.reshape(-1), seen.layout) for part in ([u] if v is None else [u, v])])
        objective = Objective(model, seen.likelihood, forward) if objective is None else objective
        batch = Batch(seen.batch, 1, objective.random_state())
        found = objective.products([batch], seen.layout.split(rows))[0, -1]
        total[:] = [found if not total else total[0] + found]

    model = usable(model)
    _, count = walked(model, likelihood, data, visit, forward, parameters)
    return (total[0] / count).to(u)
