"""How well an update points where the Gauss-Newton direction does (methods 5.7; Botev 2020, 4.5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.curvature import ggn_vector_product
from laplace_kf.diagnostics.base import Dense, cosine, dense, walked
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.optim.cg import Progress, conjugate_gradients
from laplace_kf.passes import Pass
from laplace_kf.tape import FlatLayout

__all__ = ["Steps", "alignment", "block_diagonal_residual", "gauss_newton_steps", "minimum_norm"]

DENSE = 1500  # parameters up to which the systems are solved by an eigendecomposition


def minimum_norm(matrix: Tensor, vector: Tensor, damping: float = 0.0) -> Tensor:
    """``(matrix + damping I)⁺ vector`` of a symmetric PSD matrix ``(P, P)`` and ``(P,)`` or ``(P, K)``."""
    values, vectors = torch.linalg.eigh(matrix)
    limit = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    values = torch.where(values > limit, values, 0) + damping
    inverse = torch.where(values > 0, 1 / torch.where(values > 0, values, 1), 0)
    along = vectors.T @ vector
    return vectors @ (along * (inverse if vector.dim() == 1 else inverse[:, None]))


@lasting()
def alignment(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    update: Tensor | Mapping[str, Tensor],
    damping: float = 0.0,
    *,
    steps: int = 500,
    forward: Forward | None = None,
) -> dict[str, float]:
    """Cosines of an update with the Gauss-Newton steps ``−(G + damping I)⁻¹ ∇`` (Botev 2020, 4.5.2).

    Up to 1500 parameters the systems are solved exactly (by the pseudo-inverse where they are singular), beyond by
    conjugate gradients from zero, whose solution is the one of least norm, too.

    Args:
        model, likelihood, data, forward: as for :func:`laplace_kf.curvature.estimate`; large systems go over the data
            once a product.
        update: ``δ`` of ``θ ← θ + δ``: ``(P,)`` in flat order, or parameter-shaped by name.
        damping: added to the diagonal.
        steps: of conjugate gradients at most.

    Returns:
        Cosines by name: ``"full"`` with the full matrix, ``"block_diagonal"`` with the blocks of all layers together,
        and one for every module with parameters, with its own block.

    Raises:
        ShapeMismatch: if the update does not have one entry for every parameter, or the data are empty.
        IncompatiblePair: for a negative damping.
    """
    found = gauss_newton_steps(model, likelihood, data, damping, steps=steps, forward=forward)
    flat = _flat(update, found.layout).to(found.full)
    cosines = {"full": cosine(flat, found.full), "block_diagonal": cosine(flat, found.blocks)}
    return {**cosines, **{m: cosine(flat[at], found.blocks[at]) for m, at in found.modules.items()}}


@dataclass(frozen=True)
class Steps:
    """Gauss-Newton steps ``−(G + damping I)⁻¹ ∇`` of a network.

    Attributes:
        full: with the full matrix, ``(P,)``.
        blocks: with the blocks of all modules, each solved on its own, ``(P,)``.
        gradient: ``∇`` of the mean loss, ``(P,)``.
        modules: positions ``(P_l,)`` of the parameters of every module, by its path.
        layout: flat order of the parameters.
    """

    full: Tensor
    blocks: Tensor
    gradient: Tensor
    modules: dict[str, Tensor]
    layout: FlatLayout


@lasting()
def gauss_newton_steps(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    damping: float = 0.0,
    *,
    steps: int = 500,
    forward: Forward | None = None,
) -> Steps:
    """The steps that :func:`alignment` compares with, for several updates at one point (Botev 2020, 4.5.2).

    Args:
        model, likelihood, data, damping, steps, forward: as for :func:`alignment`.

    Raises:
        ShapeMismatch: if the data are empty.
        IncompatiblePair: for a negative damping.
    """
    if not 0 <= damping < float("inf"):
        raise IncompatiblePair(f"damping must be finite and not negative, got {damping}")
    sums: list[Tensor] = []

    def visit(seen: Pass) -> None:
        found = seen.gradient()
        sums[:] = [found if not sums else sums[0] + found]

    layout, count = walked(model, likelihood, data, visit, forward)
    gradient = sums[0] / count
    small = layout.size <= DENSE
    problem = dense(model, likelihood, data, forward) if small else Dense(gradient, gradient[:0], layout, count)

    def solved(places: Tensor | None, names: list[str] | str) -> Tensor:
        right = -(gradient if places is None else gradient[places])
        if small:
            matrix = problem.ggn if places is None else problem.ggn[places][:, places]
            return minimum_norm(matrix, right, damping)
        patterns: Any = names

        def product(v: Tensor) -> Tensor:
            found = ggn_vector_product(model, likelihood, data, v, parameters=patterns, forward=forward)
            return found + damping * v

        return conjugate_gradients(product, right, limit=steps, progress=Progress(1e-10)).x

    together = torch.zeros_like(gradient)
    for module, places in problem.modules.items():
        names = [name for name in layout.names if name.rpartition(".")[0] == module]
        together[places] = solved(places, [name.replace("[", "[[]") for name in names])
    return Steps(solved(None, "all"), together, gradient, problem.modules, layout)


def _flat(update: Tensor | Mapping[str, Tensor], layout: FlatLayout) -> Tensor:
    if isinstance(update, Tensor):
        if update.shape != (layout.size,):
            raise ShapeMismatch(f"expected an update of shape ({layout.size},), got {tuple(update.shape)}")
        return update.detach()
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    wrong = [n for n in shapes if n not in update or tuple(update[n].shape) != shapes[n]]
    wrong += [n for n in update if n not in shapes]
    if wrong:
        raise ShapeMismatch(
            f"an update by name needs a tensor of its shape for every parameter and no other; {wrong[0]!r} does not fit"
        )
    return torch.cat([update[name].detach().reshape(-1) for name in layout.names])


@lasting()
def block_diagonal_residual(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    *,
    forward: Forward | None = None,
) -> float:
    """``‖G (G_diag⁻¹ ∇ / L) − ∇‖ / ‖∇‖``: how far the block diagonal is from being enough (methods 5.7).

    0 (up to rounding) for linear networks of square invertible layers without biases, with an output curvature that
    is the same for all examples and invertible second moments of the inputs (Botev 2020, Lemma 4.1): there the step
    through the block diagonal, divided by the number of layers L, solves the full system.

    Args:
        model, likelihood, data, forward: as for :func:`laplace_kf.curvature.estimate`; small networks.

    Raises:
        IncompatiblePair: if the matrix does not fit into the memory.
        ShapeMismatch: if the data are empty.
    """
    problem = dense(model, likelihood, data, forward)
    step = torch.zeros_like(problem.gradient)
    for places in problem.modules.values():
        step[places] = minimum_norm(problem.ggn[places][:, places], problem.gradient[places])
    left = problem.ggn @ step / len(problem.modules)
    size = float(problem.gradient.norm())
    return float((left - problem.gradient).norm()) / size if size else 0.0
