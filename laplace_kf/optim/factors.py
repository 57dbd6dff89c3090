"""Running curvature of an optimiser: the engine's statistics, averaged over steps (methods 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from laplace_kf.engine import Statistics, StructureRule
from laplace_kf.optim.schedules import averaging_weight
from laplace_kf.posterior.store import packed, unpacked

__all__ = ["averaged", "dumped", "loaded"]


def averaged(running: Statistics | None, new: Statistics, step: int, limit: float) -> Statistics:
    """``ε · running + (1 − ε) · new`` of the means, with ``ε = min(1 − 1/step, limit)``; its count is 1.

    Both sides weigh by the step, not by the number of examples: a larger minibatch counts no more.

    Args:
        running: what there is so far (count 1), ``None`` at first.
        new: statistics of one step.
        step: 1, 2, ...
        limit: largest ε; 0 keeps the new one only.
    """
    weight = averaging_weight(step, limit) if running is not None else 0.0
    mean = new.scale((1 - weight) / new.count)
    return mean if running is None or weight == 0.0 else running.scale(weight) + mean


def dumped(statistics: Statistics | None) -> dict[str, Any] | None:
    """Statistics as plain values and tensors."""
    if statistics is None:
        return None
    tensors, described = packed(statistics)
    return {"tensors": tensors, "described": described}


def loaded(state: Mapping[str, Any] | None, structure: StructureRule, device: torch.device) -> Statistics | None:
    """The inverse of :func:`dumped`."""
    return None if state is None else unpacked(state["tensors"], state["described"], structure, device)
