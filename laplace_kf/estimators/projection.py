"""Random projections of the root: unbiased for the Gauss-Newton matrix (methods 4.2, 4.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_kf.draws import ExampleDraws, Source, normal, signs
from laplace_kf.errors import InvalidArgument
from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.registry import Registry
from laplace_kf.tape import Observation

Noise = Callable[[tuple[int, ...], Source, torch.dtype], Tensor]
NOISES: Registry[Noise] = Registry("projection noise")


@NOISES.register("rademacher")
def rademacher(shape: tuple[int, ...], generator: Source, dtype: torch.dtype) -> Tensor:
    """Signs of equal probability, of the given shape."""
    return signs(shape, generator, dtype)


@NOISES.register("gaussian")
def gaussian(shape: tuple[int, ...], generator: Source, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, of the given shape."""
    return normal(shape, generator, dtype)


@ESTIMATORS.register("projection")
class Projection(ColumnEstimator):
    """``S`` columns ``R v / √S`` with ``R Rᵀ = H_L`` and ``E[v vᵀ] = I``.

    Args:
        samples: number of projections ``S`` per example.
        noise: ``"rademacher"`` (less variance on the diagonal) or ``"gaussian"``.
    """

    name = "projection"
    draws = True
    by_example = True

    def __init__(self, samples: int = 1, noise: str = "rademacher") -> None:
        if samples < 1:
            raise InvalidArgument(f"samples must be at least 1, got {samples}")
        self.samples, self.noise = samples, NOISES[noise]
        self.noise_name = noise

    def options(self) -> dict[str, Any]:
        return {"samples": self.samples, "noise": self.noise_name}

    def columns(
        self,
        observation: Observation,
        likelihood: Likelihood,
        generator: torch.Generator | ExampleDraws,
        at_once: int,
    ) -> Iterator[Tensor]:
        outputs = widened(observation.outputs)
        count, positions, _ = likelihood.to_positions(outputs).shape
        width = likelihood.root_width(outputs, observation.targets)
        kept = likelihood.counted_positions(outputs, observation.targets)
        for start in range(0, self.samples, at_once):
            size = min(at_once, self.samples - start)
            v = outputs.new_zeros(size, count, positions, width)
            for one in v:  # noise for the positions that count, so that the others do not shift it
                source = generator.rows(kept) if isinstance(generator, ExampleDraws) else generator
                one[kept] = self.noise((int(kept.sum()), width), source, outputs.dtype).to(outputs.device)
            yield likelihood.root_product(outputs, v, observation.targets) / self.samples**0.5
