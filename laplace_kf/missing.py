"""NaN in a batch: a mistake, but among the targets of likelihoods that take it for a missing one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_kf.batches import Forward, check_finite, mapped, tensors_of
from laplace_kf.graphs import is_graph
from laplace_kf.linalg import all_finite
from laplace_kf.reading import Reading
from laplace_kf.returned import readable
from laplace_kf.weighting import WithWeights

__all__ = ["check_batch"]


def check_batch(batch: Any, index: int, what: str, forward: Forward | None, missing: bool) -> None:
    """As :func:`laplace_kf.batches.check_finite`; NaN among the targets is let through where it marks missing ones.

    Where it is not known what of a batch are its targets (``forward=``, graphs), NaN is let through everywhere: outputs
    that are not finite are refused later. Infinity is refused everywhere.

    Args:
        batch: of tensors.
        index: its number, for messages.
        what: it is called in messages.
        forward: what reads it.
        missing: whether NaN marks missing targets.

    Raises:
        NonFinite: names the batch.
    """
    if not missing:
        check_finite(batch, index, what)
        return
    if all(not t.is_floating_point() or all_finite(t) for t in map(readable, tensors_of(batch))):
        return
    check_finite(mapped(batch, _without_nan), index, what)
    known = _inputs(batch, forward)
    if known is not None:
        check_finite(known, index, what)


def _without_nan(t: Tensor) -> Tensor:
    return torch.where(torch.isnan(t), torch.zeros((), dtype=t.dtype, device=t.device), t)


def _inputs(batch: Any, forward: Forward | None) -> Any:
    """What of a batch are inputs for certain."""
    if isinstance(forward, WithWeights) and not forward.plain:
        forward = forward.forward if forward.pick is not None else forward
        if forward is None:
            return None
    if isinstance(forward, Reading):
        return forward.inputs(batch)
    if (forward is not None and not isinstance(forward, WithWeights)) or is_graph(batch):
        return None
    if isinstance(forward, WithWeights) and not forward.plain:
        return None
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", "label", "weights")}
    return batch[0] if isinstance(batch, (tuple, list)) and batch else None
