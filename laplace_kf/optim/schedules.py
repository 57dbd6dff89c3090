"""Schedules around the optimisers: batch sizes, averages, Nesterov momentum."""

from __future__ import annotations

import math

__all__ = ["averaging_weight", "batch_size", "nesterov_momentum"]


def batch_size(step: int, n_data: int, first: int = 1000, reaches: int = 500) -> int:
    """Minibatch size of step ``step`` (1, 2, ...): exponential, all data at step ``reaches`` (methods 6.3).

    ``min(first · e^{(step−1)/b}, n_data)`` with ``b = (reaches − 1) / ln(n_data / first)``, rounded.

    Raises:
        ValueError: for a step below 1.
    """
    if step < 1:
        raise ValueError(f"steps are numbered from 1, got {step}")
    if n_data <= first:
        return n_data
    growth = math.log(n_data / first) / max(1, reaches - 1)
    return min(n_data, round(first * math.exp(min(growth * (step - 1), math.log(n_data)))))


def averaging_weight(step: int, limit: float) -> float:
    """``min(1 − 1/step, limit)``: the plain mean at first, then an exponential average (methods 4.3, 6.1, 6.3)."""
    return min(1 - 1 / step, limit)


def nesterov_momentum(step: int, limit: float = 0.99) -> float:
    """Momentum of step ``step`` (0, 1, ...) of the NAG baseline: ``min(1 − 2^{−1−log₂(⌊step/250⌋+1)}, limit)``.

    Martens 2016 only refers to it (methods 16).
    """
    return min(1 - 2.0 ** (-1 - math.log2(step // 250 + 1)), limit)
