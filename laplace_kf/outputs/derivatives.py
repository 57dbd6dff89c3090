"""Output Hessians by automatic differentiation, and square roots of their positive part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, NonFinite, UnsupportedLayer
from laplace_kf.outputs.checks import allowed
from laplace_kf.outputs.rows import map_rows

__all__ = [
    "autograd_hessian",
    "one_jacobian",
    "psd_root",
    "pushed_twice",
    "require_twice",
    "shifted_root",
    "twice",
    "usable_by_autograd",
]


def psd_root(matrix: Tensor, rectify: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """Square root of the PSD part of symmetric matrices, by eigen-decomposition.

    Args:
        matrix: ``(N, T, C, C)``, symmetric up to rounding.
        rectify: what makes the eigenvalues non-negative; ``torch.relu`` clips them, ``torch.abs`` reflects them.

    Returns:
        ``(C, N, T, C)`` columns ``√λ_k v_k`` with ``Σ_k r_k r_kᵀ`` the rectified matrix.

    Raises:
        NonFinite: if a matrix has a NaN or infinite entry.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NonFinite("The output Hessian has NaN or infinite entries; check the network's outputs and the targets.")
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.transpose(-1, -2)))
    return (vectors * rectify(values).sqrt().unsqueeze(-2)).movedim(-1, 0)


def shifted_root(matrix: Tensor) -> Tensor:
    """As :func:`psd_root` of ``matrix (N, T, C, C)`` plus the multiple of the identity that makes it PSD, if any."""
    return psd_root(matrix, lambda values: (values - values[..., :1].clamp_max(0.0)).clamp_min(0.0))


def usable_by_autograd(x: Any) -> Any:
    """``x`` (targets of any structure and shape) with copies of tensors that were made in inference mode.

    No backward pass can save such tensors.
    """
    with torch.inference_mode(False):
        return map_rows(x, lambda t: t.clone() if t.is_inference() else t)


def autograd_hessian(objective: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Hessian of every position's objective by C backward passes.

    Args:
        objective: maps ``(N, T, C)`` outputs to values that sum to the total; positions must not interact.
        z: ``(N, T, C)`` outputs.

    Returns:
        ``(N, T, C, C)``, detached.

    Raises:
        IncompatiblePair: if the objective does not depend differentiably on the outputs.
    """
    # A caller's no_grad or inference_mode must not decide whether derivatives exist.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        total = objective(leaf).sum()
        if not total.requires_grad:
            raise IncompatiblePair(
                "log p does not depend differentiably on the outputs, so it has no curvature in them. Compute it from "
                "the outputs with torch operations, without detach(), no_grad(), argmax or numpy"
            )
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True, materialize_grads=True)
        if not gradient.requires_grad:  # an objective that is linear in the outputs
            return torch.zeros(*z.shape, z.shape[-1], dtype=z.dtype, device=z.device)
        columns = [
            torch.autograd.grad(gradient[..., c].sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            for c in range(z.shape[-1])
        ]
    return torch.stack(columns, -1)


_STEPS = (
    "; steps without such products are lk.optim.kfac(model, likelihood, momentum=False, rescale=False, adapt_tau=False)"
)


def pushed_twice(
    values: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """``J v`` by two backward passes: ``Jᵀ u`` is linear in ``u``, and ``J v`` the derivative of ``vᵀ (Jᵀ u)`` by it.

    Args:
        values: what the model gives (any shapes), with its graph to the leaves.
        leaves: parameters.
        directions: each one tensor a leaf.

    Returns:
        For every direction one tensor a value.

    Raises:
        UnsupportedLayer: where a function in the graph cannot be differentiated twice.
    """
    seeds = [torch.zeros_like(value, requires_grad=True) for value in values]
    used = [(value, seed) for value, seed in zip(values, seeds, strict=True) if value.requires_grad]
    pulled: Sequence[Tensor | None] = [None] * len(leaves)
    found = []
    with twice():
        if used:
            outputs, columns = zip(*used, strict=True)
            pulled = torch.autograd.grad(outputs, leaves, columns, create_graph=True, allow_unused=True)
        for direction in directions:
            pairs = [(p, v.to(p)) for p, v in zip(pulled, direction, strict=True) if p is not None and p.requires_grad]
            if not pairs:
                found.append([torch.zeros_like(value) for value in values])
                continue
            rows, along = zip(*pairs, strict=True)
            tangents = torch.autograd.grad(rows, seeds, along, retain_graph=True, materialize_grads=True)
            found.append([tangent.detach() for tangent in tangents])
    own = _own_function(values)  # of torch's own functions, what cannot be differentiated twice says so
    if own and directions and one_jacobian(values, leaves, found[0], directions[0], retain=True) is False:
        raise UnsupportedLayer(
            f"the backward pass of the autograd function {own} cannot be differentiated itself (once_differentiable, "
            "no_grad, detach() or numpy in its backward), so that products with curvature would leave out what lies "
            "before it. Compute its backward by functions of torch, of the gradient and of ctx.saved_tensors" + _STEPS
        )
    return found


def require_twice(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Refuses own functions between leaves and values (any shapes) whose backward pass has no derivative.

    Raises:
        UnsupportedLayer: names one.
    """
    if _own_function(values):
        generator = torch.Generator().manual_seed(2)
        pushed_twice(values, leaves, [[torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves]])


@contextmanager
def twice() -> Iterator[None]:
    """Around derivatives of derivatives: functions of torch that have none are named.

    Raises:
        UnsupportedLayer: with the name, and what to do.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "derivative for" not in str(error) and "differentiate twice" not in str(error):
            raise
        raise UnsupportedLayer(
            f"products with curvature differentiate twice, and a function of the network cannot be ({error}); write it "
            "by others that can (torch.cdist(a, b): (a[:, None] - b).square().sum(-1).sqrt()), or leave the layers "
            "before it out, parameters=[patterns]" + _STEPS
        ) from error


def _own_function(values: Sequence[Tensor]) -> str:
    """The name of an autograd function that is written in Python, between values (any shapes) and their leaves."""
    nodes, seen = [value.grad_fn for value in values], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return node.name().removesuffix("Backward")
        nodes += [child for child, _ in node.next_functions]
    return ""


def one_jacobian(
    values: Sequence[Tensor],
    leaves: Sequence[Tensor],
    pushed: Sequence[Tensor],
    direction: Sequence[Tensor],
    retain: bool = False,
) -> bool | None:
    """Whether forward mode differentiated what a backward pass does, by one random ``u``: ``u · (J v) = (Jᵀ u) · v``.

    It does not where a model computes under ``torch.no_grad()``, which forward mode looks into.

    Args:
        values: what the model gives (any shapes), with its graph to the leaves.
        leaves: parameters.
        pushed: ``J v`` by forward mode, one a value.
        direction: ``v``, one tensor a leaf.
        retain: whether the graph is needed afterwards.

    Returns:
        ``None`` where both sides are zero.
    """
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for value in values]
    used = [(value, seed) for value, seed in zip(values, seeds, strict=True) if value.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if used:
        outputs, columns = zip(*used, strict=True)
        found = torch.autograd.grad(outputs, leaves, columns, allow_unused=True, retain_graph=retain)
    along = sum(_product(u, p) for u, p in zip(seeds, pushed, strict=True))
    back = sum(_product(g, v) for g, v in zip(found, direction, strict=True) if g is not None)
    size = max(sum(float(p.double().square().sum()) for p in pushed) ** 0.5, abs(back))
    if size == 0:
        return None
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (*values, *leaves))
    return abs(along - back) <= allowed(rounding) * size


def _product(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
