"""Schedules around the optimisers: batch sizes, averages, Nesterov momentum."""

from __future__ import annotations

import math

from laplace_kf.errors import InvalidArgument

__all__ = ["PUBLISHED_RATES", "PUBLISHED_SHARES", "averaging_weight", "batch_size", "halving", "nesterov_momentum"]

PUBLISHED_RATES = tuple(2.0**-power for power in range(6, 14))
"""Learning rates of the grid that first-order baselines were searched over (methods 8.1)."""
PUBLISHED_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Shares of a run after which the rate was halved, again and again (methods 8.1); 1 is never."""


def batch_size(step: int, n_data: int, first: int = 1000, reaches: int = 500) -> int:
    """Minibatch size of step ``step`` (1, 2, ...): exponential, all data at step ``reaches`` (methods 6.3).

    ``min(first · e^{(step−1)/b}, n_data)`` with ``b = (reaches − 1) / ln(n_data / first)``, rounded.

    Raises:
        ValueError: for a step below 1.
    """
    if step < 1:
        raise InvalidArgument(f"steps are numbered from 1, got {step}; pass optimizer.steps + 1 for the next one")
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


def halving(step: int, steps: int, share: float) -> float:
    """Factor on the learning rate of step ``step`` (0, 1, ...): halved whenever another ``share`` of a run is over.

    For ``torch.optim.lr_scheduler.LambdaLR``; the published grid of Adam is :data:`PUBLISHED_RATES` times
    :data:`PUBLISHED_SHARES` (methods 8.1; Botev 2020, 4.5.1).

    Raises:
        ValueError: for a share outside (0, 1], no steps, or a negative step.
    """
    if not 0 < share <= 1 or steps < 1 or step < 0:
        raise InvalidArgument(f"expected a share in (0, 1], steps >= 1 and step >= 0, got {share}, {steps} and {step}")
    return 0.5 ** int(step / (share * steps) + 1e-9)
