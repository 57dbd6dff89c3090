"""The points of E19 and E34: a cubic with noise, in units in which inputs and targets are about 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["EDGE", "INPUT_SCALE", "LIMIT", "NOISE", "STRUCTURES", "TARGET_SCALE", "Pair", "draw_points"]

Pair = tuple[Tensor, Tensor]
STRUCTURES = {"full": "full", "diagonal": "diag", "Kronecker": "kron"}
NOISE = 3.0
"""Standard deviation of the observation noise, in the units of ``y``."""
INPUT_SCALE, TARGET_SCALE = 4 / math.sqrt(3), 64 / math.sqrt(7)
"""Standard deviations of ``x`` and ``x³`` for ``x`` uniform on [-4, 4]."""
EDGE, LIMIT = 4.0, 6.0
"""The data lie within ``|x| <= EDGE``; predictions are compared on ``|x| <= LIMIT``."""


def draw_points(count: int, rng: torch.Generator) -> Pair:
    """Inputs ``(N, 1)`` and targets ``(N, 1)`` in float64, scaled."""
    x = (2 * torch.rand(count, 1, generator=rng, dtype=torch.float64) - 1) * EDGE
    y = x**3 + NOISE * torch.randn(count, 1, generator=rng, dtype=torch.float64)
    return x / INPUT_SCALE, y / TARGET_SCALE
