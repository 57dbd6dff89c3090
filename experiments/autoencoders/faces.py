"""FACES: the Olivetti photographs, turned, enlarged, cropped and reduced to 25x25 (Hinton & Salakhutdinov 2006).

40 people, ten photographs of 64x64 pixels each. A photograph is turned by -90 to 90 degrees, enlarged 1.4 to 1.8 times
and cropped to its middle; 414 pairs of the two make 103,500 training images of the first 25 people and 41,400 test
images of the last ten. The published pairs are not known: they are drawn. The published pixels were standardised; here
they stay in [0, 1], as the cross-entropy asks for (methods 13), so squared errors cannot be set beside published ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

__all__ = ["PAIRS", "SIDE", "augmented", "pairs"]

SIDE = 25
PAIRS = 414
ROTATION = 90.0
SCALES = 1.4, 1.8
FINE = 3
"""Each pixel is the mean of ``FINE²`` points, which is about the ratio of the sides: what is reduced must not alias."""


def pairs(count: int, rng: torch.Generator) -> Tensor:
    """Rotations in degrees and scales, ``(count, 2)``, uniform."""
    low, high = SCALES
    rotations = ROTATION * (2 * torch.rand(count, generator=rng) - 1)
    return torch.stack([rotations, low + (high - low) * torch.rand(count, generator=rng)], 1)


def augmented(photographs: Tensor, chosen: Tensor) -> Tensor:
    """Every photograph under every pair, pair by pair.

    Args:
        photographs: ``(N, 1, 64, 64)`` in [0, 1].
        chosen: rotations and scales ``(K, 2)``.

    Returns:
        ``(K N, 625)`` in [0, 1], rows from the top.
    """
    fine = (len(photographs), 1, SIDE * FINE, SIDE * FINE)
    made = []
    for rotation, scale in chosen.tolist():
        cos, sin = (f(math.radians(rotation)) / scale for f in (math.cos, math.sin))
        around = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(photographs), 2, 3)
        grid = affine_grid(around, list(fine), align_corners=False)
        turned = grid_sample(photographs, grid, padding_mode="border", align_corners=False)
        made.append(torch.nn.functional.avg_pool2d(turned, FINE).flatten(1))
    return torch.cat(made) if made else torch.zeros(0, SIDE * SIDE)
