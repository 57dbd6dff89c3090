"""``½ (θ−μ)ᵀ Λ (θ−μ)`` at the cost of one product: ``Λ (θ−μ)`` gives the value and is the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise
from laplace_kf.tape.blocks import merged

__all__ = ["Penalty"]


class _Quadratic(torch.autograd.Function):
    """One node of the graph for all parameters: small networks would spend more on nodes than on numbers."""

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, *weights: Tensor) -> Tensor:
        energy, ctx.products = penalty.energy_and_products(weights)
        ctx.penalty = penalty
        ctx.save_for_backward(*weights)
        return energy / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        products = ctx.products
        if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated, as a function of the weights
            products = ctx.penalty.energy_and_products(ctx.saved_tensors)[1]
        return None, *ctx.penalty.as_parameters([gradient.to(product) * product for product in products])


class Penalty:
    """The quadratic ``½ (θ−μ)ᵀ Λ (θ−μ)``, to be evaluated many times.

    Args:
        precision: Λ, in a form that is cheap to multiply with.
        centre: μ as parameter-shaped tensors ``(1, *shape)`` by name.
        like: tensor ``(...)`` whose type the products are made in.
        constant: whether Λ depends on nothing that requires a gradient.
    """

    def __init__(self, precision: Blockwise, centre: Mapping[str, Tensor], like: Tensor, constant: bool) -> None:
        self.precision, self.names, self.dtype, self.constant = precision, tuple(centre), like.dtype, constant
        self._centres = [block.pack(centre).reshape(-1) for block, _ in precision.entries]

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Its value, 0-dim, at the parameters by name, each of its own ``shape``.

        Differentiable as often as wanted in them, and in what Λ was made of (λ, a noise scale).
        """
        ordered = [weights[name] for name in self.names]
        if not self.constant:
            return self.energy_and_products(ordered)[0] / 2
        value: Tensor = _Quadratic.apply(self, *ordered)
        return value

    def energy_and_products(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``(θ−μ)ᵀ Λ (θ−μ)``, 0-dim, and ``Λ (θ−μ)`` block by block, each ``(P_b,)``; weights in the order of names."""
        parts = {name: weight[None] for name, weight in zip(self.names, weights, strict=True)}
        energies, products = [], []
        for (block, matrix), centre in zip(self.precision.entries, self._centres, strict=True):
            packed = block.pack(parts).reshape(-1)
            shift = (packed - centre.to(packed.device)).to(matrix.device, self.dtype)
            product = matrix.matvec(shift)
            energies.append((shift @ product).to(self._centres[0].device))
            products.append(product.to(packed.device))
        return torch.stack(energies).sum(), products

    def as_parameters(self, products: Sequence[Tensor]) -> list[Tensor]:
        """Vectors ``(P_b,)`` of all blocks as parameter-shaped tensors ``shape`` in the order of names."""
        blocks = [block for block, _ in self.precision.entries]
        found = merged(b.unpack(p.reshape(1, *b.shape)) for b, p in zip(blocks, products, strict=True))
        return [found[name][0] for name in self.names]
