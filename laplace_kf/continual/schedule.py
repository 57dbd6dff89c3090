"""Smaller steps for later tasks, whose penalties are stiffer (methods 11.6)."""

from __future__ import annotations

import math

from laplace_kf.errors import InvalidArgument

__all__ = ["EarlyStopping", "decayed_rate"]


def decayed_rate(rate: float, task: int, k: float) -> float:
    """The initial learning rate of a task, ``rate / (1 + k · task)``.

    Args:
        rate: that of the first task.
        task: number of tasks before it.
        k: decay; for two tasks ``λ_c / 10`` (Kronecker) or ``λ_c / 1000`` (diagonal) were used (methods 11.6).

    Raises:
        ValueError: for a negative ``task`` or ``k``.
    """
    if task < 0 or k < 0:
        raise InvalidArgument(f"task and k must not be negative, got {task} and {k}")
    return rate / (1 + k * task)


class EarlyStopping:
    """Ends the training of a task when the validation loss has not improved for a while (Botev 2020, 5.4.2)::

        early = EarlyStopping()
        for epoch in range(epochs):
            ...
            if early.over(validation_loss):
                break

    Args:
        patience: epochs without an improvement after which it is over, at least 1.
        least: epochs that are trained in any case.

    Attributes:
        best: lowest loss so far.
        best_epoch: when it was met, from 1; 0 before the first loss.
        epoch: losses seen.

    Raises:
        ValueError: for a ``patience`` below 1 or a negative ``least``.
    """

    def __init__(self, patience: int = 5, least: int = 10) -> None:
        if patience < 1 or least < 0:
            raise InvalidArgument(f"expected patience >= 1 and least >= 0, got {patience} and {least}")
        self.patience, self.least = patience, least
        self.best = math.inf
        self.best_epoch = self.epoch = 0

    def over(self, loss: float) -> bool:
        """Takes the validation loss of one more epoch in; a loss that is not a number is no improvement."""
        self.epoch += 1
        if loss < self.best:
            self.best, self.best_epoch = loss, self.epoch
        return self.epoch >= self.least and self.epoch - self.best_epoch >= self.patience
