"""Noise that is known for every example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.outputs.checks import refuse_values
from laplace_kf.outputs.layout import scalar_shape, to_positions

__all__ = ["known_noise"]


def known_noise(who: str, scale: Tensor, shape: Sequence[int], keep: Tensor | None) -> Tensor:
    """Standard deviations by position, broadcastable to ``(N, T, C)``, for outputs of ``shape``.

    Args:
        who: name of the likelihood, for messages.
        scale: ``(N,)``, one a position, or of the outputs' shape with 1 for dimensions that share a number.
        shape: of the outputs.
        keep: which entries count; the others may have any scale and come back with 1.

    Raises:
        ShapeMismatch: for another shape.
        ValueError: for a scale that is not positive and finite.
    """
    found, full = tuple(scale.shape), tuple(shape)
    positions = scalar_shape(shape)
    if len(found) == len(full) and all(a in (1, b) for a, b in zip(found, full, strict=True)) and found[0] == full[0]:
        by_position = to_positions(scale.expand(*found[:1], *[a if k == channel(full) else b for k, (a, b) in
                                   enumerate(zip(found, full, strict=True)) if k]))  # fmt: skip
    elif found == positions:
        by_position = scale.reshape(full[0], -1, 1)
    elif found == full[:1]:
        by_position = scale.reshape(full[0], 1, 1)
    else:
        raise ShapeMismatch(
            f"{who}: known noise of shape {found} does not fit outputs of shape {full}; expected ({full[0]},), "
            f"{positions} or {full} (1 where a number is shared)"
        )
    if not by_position.is_floating_point():
        by_position = by_position.double()
    if keep is not None:
        by_position = torch.where(keep, by_position, torch.ones((), dtype=by_position.dtype, device=scale.device))
    refuse_values(f"{who} (known noise)", by_position, ~((by_position > 0) & torch.isfinite(by_position)), "(0, inf)")
    return by_position


def channel(shape: Sequence[int]) -> int:
    """The dimension of the outputs that is no position."""
    return 1 if len(shape) > 3 else len(shape) - 1
