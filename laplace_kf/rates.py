"""How fast this machine is at what cannot be tried on one minibatch: measured once in a process, in some 50 ms.

A symmetric eigendecomposition takes ``a d² + b d³`` seconds; ``a`` and ``b`` follow from two sides. What a minibatch
takes is measured on a minibatch (:mod:`laplace_kf.posterior.planning`), not counted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import torch

from laplace_kf.linalg import eigh

__all__ = ["Clock", "decomposition_seconds"]

Clock = Callable[[], float]
SIDES = 128, 512  # that are timed
ROUNDS = 3  # of which the fastest counts


def decomposition_seconds(
    sides: Iterable[int], device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> float:
    """Seconds of the eigendecompositions of symmetric matrices with these sides, one after the other.

    Args:
        sides: d of each.
        device, dtype: where and in what type they are made.
        clock: what is read before and after.
    """
    sides = list(sides)
    if not sides:
        return 0.0
    square, cube = _coefficients(device, dtype, torch.get_num_threads(), clock)
    return sum(square * side**2 + cube * side**3 for side in sides)


@functools.cache
def _coefficients(device: torch.device, dtype: torch.dtype, threads: int, clock: Clock) -> tuple[float, float]:
    """``a`` and ``b`` from the two sides, at so many threads."""
    small, large = SIDES
    first, second = (_timed(side, device, dtype, clock) / side**2 for side in SIDES)
    cube = max((second - first) / (large - small), 0.2 * second / large)
    return max(first - cube * small, 0.0), cube


def _timed(side: int, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    generator = torch.Generator().manual_seed(side)
    root = torch.randn(side, side, generator=generator).to(device, dtype)
    matrix = root @ root.T / side
    found = []
    for _ in range(ROUNDS):
        start = clock()
        values, _ = eigh(matrix, "of the calibration")
        values.sum().item()  # an accelerator has finished by then
        found.append(clock() - start)
    return min(found)
