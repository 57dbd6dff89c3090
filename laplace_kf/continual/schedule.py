"""Smaller steps for later tasks, whose penalties are stiffer (methods 11.6)."""

from __future__ import annotations

__all__ = ["decayed_rate"]


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
        raise ValueError(f"task and k must not be negative, got {task} and {k}")
    return rate / (1 + k * task)
