"""A likelihood: normal noise on the differences of neighbouring outputs, whose curvature has rank C − 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from laplace_kf.likelihoods.base import LIKELIHOODS, Likelihood
from laplace_kf.likelihoods.prediction import Prediction, normal_mixture
from laplace_kf.outputs.checks import refuse_nonfinite, refuse_shape
from laplace_kf.outputs.layout import from_positions, to_positions


@LIKELIHOODS.register("increments")
class Increments(Likelihood):
    """``y_k ~ N(z_{k+1} − z_k, 1)``; targets ``(N, C − 1)``, ``(N, T, C − 1)`` or ``(N, C − 1, H, W)``.

    A position whose targets are all equal to ``ignore_index`` contributes nothing.
    """

    natural = True  # the Hessian does not depend on the targets

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        axis = 1 if len(shape) == 4 else len(shape) - 1
        refuse_shape("Increments", shape, targets, (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]))
        refuse_nonfinite("Increments", targets)
        y = to_positions(targets if targets.is_floating_point() else targets.double())
        if self.ignore_index is None:
            return y, None
        keep = (y != self.ignore_index).any(-1, keepdim=True)
        return torch.where(keep, y, torch.zeros_like(y)), keep

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        squares = (y - z.diff(dim=-1)).square() + math.log(2 * math.pi)
        return -0.5 * squares.sum(-1, keepdim=True)

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        columns = eye[1:] - eye[:-1]  # (K, C) with K = C − 1
        return columns[:, None, None].expand(-1, *z.shape)

    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        mean = z.diff(dim=-1)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return from_positions(mean + noise, shape)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        mean = z.diff(dim=-1)
        return normal_mixture(mean, torch.zeros_like(mean), shape, partial(self._density, tuple(shape), z.dtype))
