"""Random projections of the root: unbiased for the Gauss-Newton matrix (methods 4.2, 4.7)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_kf.errors import UnknownName
from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("projection")
class Projection(ColumnEstimator):
    """``S`` columns ``R v / √S`` with ``R Rᵀ = H_L`` and ``E[v vᵀ] = I``.

    Args:
        samples: number of projections ``S`` per example.
        noise: ``"rademacher"`` (less variance on the diagonal) or ``"gaussian"``.
    """

    name = "projection"
    draws = True

    def __init__(self, samples: int = 1, noise: str = "rademacher") -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if noise not in ("rademacher", "gaussian"):
            raise UnknownName("projection noise", noise, ["rademacher", "gaussian"])
        self.samples, self.gaussian = samples, noise == "gaussian"

    def columns(
        self, observation: Observation, likelihood: Likelihood, generator: torch.Generator, at_once: int
    ) -> Iterator[Tensor]:
        outputs = widened(observation.outputs)
        count, positions, _ = likelihood.to_positions(outputs).shape
        width = likelihood.root_width(outputs)
        for start in range(0, self.samples, at_once):
            shape = (min(at_once, self.samples - start), count, positions, width)
            if self.gaussian:
                v = torch.randn(shape, generator=generator, device=generator.device, dtype=outputs.dtype)
            else:
                v = torch.randint(0, 2, shape, generator=generator, device=generator.device).to(outputs.dtype) * 2 - 1
            yield likelihood.root_product(outputs, v.to(outputs.device), observation.targets) / self.samples**0.5
