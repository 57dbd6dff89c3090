"""``½ vᵀ Λ v`` whose gradient costs nothing more: the product ``Λ v`` that gives the value is the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise

__all__ = ["half_energy"]


class _HalfEnergy(torch.autograd.Function):
    """``value``, with ``products`` as its gradient in ``shifts``."""

    @staticmethod
    def forward(ctx: Any, matrix: Blockwise, value: Tensor, products: Mapping[str, Tensor], *shifts: Tensor) -> Tensor:
        ctx.matrix, ctx.products = matrix, products
        ctx.save_for_backward(*shifts)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        products = ctx.products
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated, as a function of the shifts
            products = ctx.matrix.energy_and_product(dict(zip(products, ctx.saved_tensors, strict=True)))[1]
        return None, None, None, *(gradient.to(product) * product for product in products.values())


def half_energy(matrix: Blockwise, shifts: Mapping[str, Tensor]) -> Tensor:
    """``½ vᵀ Λ v``, 0-dim, for ``v`` as parameter-shaped tensors ``(1, *shape)`` by name.

    Differentiable as often as wanted in ``v`` and in what the matrix was made of (λ, a noise scale).
    """
    energy, products = matrix.energy_and_product({name: shift.detach() for name, shift in shifts.items()})
    if energy.requires_grad:  # the matrix has a graph of its own
        return matrix.energy_and_product(shifts)[0] / 2
    value: Tensor = _HalfEnergy.apply(matrix, energy / 2, products, *(shifts[name] for name in products))
    return value
