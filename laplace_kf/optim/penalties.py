"""The matrix D of the damping ``λ D`` of Hessian-free steps, by name (methods 7.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.operators import Matrix
from laplace_kf.optim.cg import Map
from laplace_kf.registry import Registry

__all__ = ["PENALTIES", "Curvature", "Penalty", "Scaling"]


@dataclass(frozen=True)
class Curvature:
    """What a penalty may be made of, each measured on first need and once a step.

    Attributes:
        gradient: ``(P,)``, for type and device.
        diagonal: ``estimator -> diag(G) (P,)`` on the curvature data.
        structured: the undamped curvature of the preconditioner.
        product: ``v -> B v`` with the undamped matrix of the model, both ``(P,)``.
    """

    gradient: Tensor
    diagonal: Callable[[str], Tensor]
    structured: Callable[[], Matrix]
    product: Map


@dataclass(frozen=True)
class Scaling:
    """D as a map of vectors ``(P,)``, and the mean of its diagonal (the multiple of I that a preconditioner takes)."""

    apply: Map
    mean: float


Penalty = Callable[[Curvature], Scaling]
PENALTIES: Registry[Penalty] = Registry("damping matrix D")


@PENALTIES.register("identity")
def _identity(curvature: Curvature) -> Scaling:
    """``D = I``: Tikhonov."""
    return Scaling(torch.clone, 1.0)


@PENALTIES.register("diagonal")
def _diagonal(curvature: Curvature) -> Scaling:
    """``D = diag(G)``, exact."""
    return _by_entry(curvature.diagonal("exact").to(curvature.gradient))


@PENALTIES.register("sampled_diagonal")
def _sampled_diagonal(curvature: Curvature) -> Scaling:
    """``D ≈ diag(G)`` from one sampled target an example: unbiased where G is the Fisher."""
    return _by_entry(curvature.diagonal("sampled").to(curvature.gradient))


@PENALTIES.register("preconditioner")
def _preconditioner(curvature: Curvature) -> Scaling:
    """``D = Cᵀ C`` with the structured curvature of the preconditioner: Tikhonov in the coordinates ``C θ``."""
    matrix = curvature.structured()
    return Scaling(lambda v: matrix.matvec(v).to(v), float(matrix.diag().mean()))


@PENALTIES.register("curvature")
def _curvature(curvature: Curvature) -> Scaling:
    """``D = B``, the model's own matrix: the step of ``λ = 0`` over ``1 + λ``."""
    return Scaling(curvature.product, 0.0)


def _by_entry(values: Tensor) -> Scaling:
    return Scaling(lambda v: values * v, float(values.mean()))
