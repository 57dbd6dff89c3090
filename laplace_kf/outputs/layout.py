"""One layout for all outputs, *positions* ``(N, T, C)`` (see :mod:`laplace_kf.likelihoods.base`), and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch

__all__ = ["check_layout", "from_positions", "masked", "scalar_shape", "to_positions"]


def check_layout(shape: Sequence[int]) -> None:
    """Raises :class:`ShapeMismatch` for outputs that fit none of the layouts."""
    if len(shape) < 2:
        hint = " Use outputs[:, None] for one output per example." if len(shape) == 1 else ""
        raise ShapeMismatch(
            f"Outputs of shape {tuple(shape)} fit no layout: expected (N, C), sequences (N, T, C) with the channel "
            f"last, or images and volumes (N, C, H, W), (N, C, D, H, W), ... with the channel second.{hint}"
        )


def to_positions(outputs: Tensor) -> Tensor:
    """Brings network outputs to the layout ``(N, T, C)``.

    Args:
        outputs: ``(N, C)`` (T = 1), ``(N, T, C)`` (channel last) or ``(N, C, H, W)`` (channel second, T = H·W), with
            two spatial axes or more.

    Returns:
        A ``(N, T, C)`` tensor; a view where the memory layout allows one.

    Raises:
        ShapeMismatch: for fewer than 2 dimensions.
    """
    check_layout(outputs.shape)
    if outputs.ndim == 2:
        return outputs.unsqueeze(1)
    return outputs if outputs.ndim == 3 else outputs.flatten(2).transpose(1, 2)


def from_positions(x: Tensor, like: Tensor | Sequence[int]) -> Tensor:
    """Inverse of :func:`to_positions`, with any number of leading dimensions.

    Args:
        x: ``(..., N, T, E)``; E need not be the C of ``like``.
        like: outputs (or their shape) whose layout the result takes.

    Returns:
        ``(..., N, E)``, ``(..., N, T, E)`` or ``(..., N, E, H, W)``; with E = C this is ``(..., *like.shape)``.
    """
    shape = tuple(like.shape) if isinstance(like, Tensor) else tuple(like)
    check_layout(shape)
    if len(shape) == 2:
        return x.squeeze(-2)
    return x if len(shape) == 3 else x.transpose(-1, -2).reshape(*x.shape[:-2], x.shape[-1], *shape[2:])


def scalar_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a tensor with one number per position: ``(N,)``, ``(N, T)`` or ``(N, H, W)``."""
    return tuple(shape[:2]) if len(shape) == 3 else (shape[0], *shape[2:])


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """``x`` of any shape, zero where ``keep`` (broadcastable to it; None keeps all) is False.

    By ``where`` and not as a product, so that ``0 · inf`` cannot appear.
    """
    return x if keep is None else torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
