"""The exact Gauss-Newton matrix beside its Kronecker form between all layers, and their inverses (methods 4.1, 5.5)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.diagnostics.base import Parameters, repeatable
from laplace_kf.diagnostics.expectation import moments
from laplace_kf.errors import IncompatiblePair, UnsupportedLayer
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting

__all__ = ["Structure", "fisher_structure"]


@dataclass(frozen=True)
class Structure:
    """What :func:`fisher_structure` found; all matrices ``(P, P)``, layer after layer, each layer's ``[W b]`` by rows.

    Attributes:
        exact: F, the mean Gauss-Newton matrix (the Fisher of natural likelihoods).
        kronecker: F̃ with ``E[a aᵀ] ⊗ E[g gᵀ]`` in every block, also between layers.
        exact_inverse, kronecker_inverse: of both plus the damping.
        sizes: parameters of every layer, by name.
    """

    exact: Tensor
    kronecker: Tensor
    exact_inverse: Tensor
    kronecker_inverse: Tensor
    sizes: dict[str, int]

    def block_means(self, matrix: Tensor) -> Tensor:
        """Mean absolute value of every block of a matrix ``(P, P)``: ``(L, L)`` for L layers (Martens, Fig. 6.2)."""
        parts = list(self.sizes.values())
        rows = [[block.abs().mean() for block in row.split(parts, 1)] for row in matrix.split(parts)]
        return torch.stack([torch.stack(row) for row in rows])


@lasting()
def fisher_structure(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    damping: float,
    parameters: Parameters = "all",
    *,
    forward: Forward | None = None,
) -> Structure:
    """Exact and Kronecker-factored Fisher of all layers with their damped inverses (Martens 2016, Fig. 6.1 to 6.5).

    Args:
        model, likelihood, data, parameters, forward: as for :func:`laplace_kf.curvature.estimate`; small networks, or
            some layers of one, whose layers use their weights once an example.
        damping: added to the diagonal of both before they are inverted, positive.

    Raises:
        IncompatiblePair: for a damping that is not positive; if the matrices do not fit into the memory.
        UnsupportedLayer: for layers that share their weights over positions, or are no Kronecker products.
    """
    if not 0 < damping < float("inf"):
        raise IncompatiblePair(f"damping must be positive, got {damping}")
    data = repeatable(data)
    found, blocks = moments(model, likelihood, data, parameters, forward)
    if len(found) != len(blocks) ** 2:
        left = next(name for name in blocks if (name, name) not in found)
        raise UnsupportedLayer(
            f"block {left!r} shares its weight over positions, or is no Kronecker product; F̃ between all layers is for "
            "layers that use their weight once an example"
        )
    exact = torch.cat([torch.cat([found[k, m].exact() for m in blocks], 1) for k in blocks])
    exact = (exact + exact.T) / 2
    kronecker = torch.cat([torch.cat([found[k, m].product() for m in blocks], 1) for k in blocks])
    shift = damping * torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    sizes = {name: block.size for name, block in blocks.items()}
    return Structure(exact, kronecker, torch.linalg.inv(exact + shift), torch.linalg.inv(kronecker + shift), sizes)
