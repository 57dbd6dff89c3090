"""CURVES: grey images of one curve through three random points, made again from their description.

The file that the papers used (``digs3pts_1.mat``) is not public any more, and its renderer was not published. What is
known: 28x28 images of a curve through three random points, grey levels in [0, 1], so six numbers decide an image. Here
a parabola runs through three points drawn uniformly from a square around the centre, as an anti-aliased stroke. Errors
on these images can be set beside the published ones, not taken as equal to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["REMARK", "SIDE", "curves", "points_on", "render"]

SIDE = 28
MARGIN = 5.0
"""Points keep this distance, in pixels, from the border; the parabola leaves their square by 1/8 of its side."""
WIDTH = 2.0
"""Width of the stroke in pixels; its edge fades over one more."""
SEGMENTS = 16
CHUNK = 250
"""Images that are rendered at once, which bounds the memory (about 80 MB)."""

REMARK = "CURVES is a re-synthesis (experiments/curves.py): the original file is not available"
"""Belongs into every result that uses these images."""


def curves(count: int, rng: torch.Generator) -> Tensor:
    """``count`` random images ``(count, 784)``, float32 in [0, 1], decided by the generator's state."""
    inner = SIDE - 2 * MARGIN
    points = MARGIN + inner * torch.rand(count, 3, 2, generator=rng)
    return torch.cat([render(part) for part in points.split(CHUNK)]) if count else torch.zeros(0, SIDE * SIDE)


def points_on(points: Tensor, count: int) -> Tensor:
    """``count`` points ``(N, count, 2)`` along the parabolas through ``points (N, 3, 2)``, ends included, in order.

    The first point is met at ``t = 0``, the second at ``t = 1/2``, the third at ``t = 1``.
    """
    t = torch.linspace(0, 1, count, dtype=points.dtype)
    basis = torch.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)], 1)
    return basis @ points


def render(points: Tensor, segments: int = SEGMENTS) -> Tensor:
    """Images ``(N, 784)``, rows from the top, of the curves through ``points (N, 3, 2)`` (x, y in pixels).

    A pixel is as dark as its centre is deep in the stroke: 1 from half a pixel inside its edge, 0 half a pixel
    outside. The curve is drawn as ``segments`` straight pieces.
    """
    way = points_on(points, segments + 1)
    start, along = way[:, None, :-1], (way[:, 1:] - way[:, :-1])[:, None]
    centres = torch.arange(SIDE, dtype=points.dtype) + 0.5
    pixels = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(1, -1, 1, 2)
    to = pixels - start  # (N, 784, segments, 2)
    length = along.square().sum(-1).clamp_min(1e-12)
    share = ((to * along).sum(-1) / length).clamp_(0, 1)
    distance = (to - share[..., None] * along).square_().sum(-1).amin(-1).sqrt_()
    return (WIDTH / 2 + 0.5 - distance).clamp_(0, 1)
