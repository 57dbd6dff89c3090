"""Sums of outer products of rows, of which half the products are made: on and below the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_columns", "add_gram", "add_sketch", "row_length", "symmetrised", "triangles", "widened"]

LEAF = 128  # columns per strip of a half Gram; smaller strips save more products but feed the BLAS less well
LINE = 64  # bytes; products of float32 whose rows begin within a cache line take half as long again to write


def row_length(width: int, itemsize: int) -> int:
    """Numbers from one row to the next of sums ``(width, width)``: whole cache lines, but for small ones."""
    line = LINE // itemsize
    return width if width <= LEAF else -(-width // line) * line


def triangles(like: Tensor, *shape: int) -> Tensor:
    """Zeros ``(..., d, d)`` for sums of :func:`add_gram`, in the type and on the device of ``like``.

    Their rows begin at whole cache lines, which those of ``d = 1025`` (1024 inputs and the constant 1) would not.
    """
    length = row_length(shape[-1], like.element_size())
    return torch.zeros((*shape[:-1], length), dtype=like.dtype, device=like.device)[..., : shape[-1]]


def add_gram(total: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    """Adds ``alpha · rowsᵀ rows`` to the lower triangle of ``total`` in place, by strips of columns.

    Args:
        total: ``(d, d)``; entries above the diagonal are left undefined.
        rows: ``(K, d)``, cast to the type of ``total`` and moved to its device.
    """
    rows = rows.to(total)  # also from another device
    width = rows.shape[1]
    if width <= LEAF:
        total.addmm_(rows.T, rows, alpha=alpha)
        return
    for start in range(0, width, LEAF):
        stop = min(start + LEAF, width)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop], alpha=alpha)


def add_columns(total: Tensor, rows: Tensor) -> None:
    """Adds ``rowsᵀ rows`` to the lower triangle ``(d, d)``, or its diagonal to ``(d,)``."""
    if total.dim() == 1:
        total += rows.to(total).square().sum(0)
    else:
        add_gram(total, rows)


def add_sketch(total: Tensor, rows: Tensor, directions: Tensor) -> None:
    """Adds ``rowsᵀ (rows Ω)`` for rows ``(K, d)`` and ``Ω (d, k)`` to ``total (d, k)``."""
    total.addmm_(rows.to(total).T, rows.to(total) @ directions)


def widened(tensor: Tensor) -> Tensor:
    """A tensor of any shape in float32 at least: half precision neither sums nor squares safely."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def symmetrised(total: Tensor) -> Tensor:
    """Completes matrices ``(..., d, d)`` filled on and below the diagonal, in place, and returns them."""
    width = total.shape[-1]
    if width <= LEAF:
        above = total.tril(-1).mT
        return total.tril_().add_(above)
    for start in range(0, width, LEAF):
        stop = min(start + LEAF, width)
        total[..., :start, start:stop] = total[..., start:stop, :start].transpose(-1, -2)
        corner = total[..., start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).transpose(-1, -2))
    return total
