"""Exact (KFLR): every column of the output curvature's root (methods 4.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_kf.estimators.base import ESTIMATORS, ColumnEstimator, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation


@ESTIMATORS.register("exact")
class Exact(ColumnEstimator):
    """Back-propagates ``Σ_v r_v r_vᵀ = H_L`` exactly: C−1 columns for a softmax, T times as many for sequences."""

    name = "exact"

    def columns(
        self, observation: Observation, likelihood: Likelihood, generator: torch.Generator, at_once: int
    ) -> Iterator[Tensor]:
        outputs = widened(observation.outputs)
        root = likelihood.position_root(outputs, observation.targets)  # (K, N, T, C)
        positions = root.shape[2]
        if positions == 1:
            for start in range(0, root.shape[0], at_once):
                yield likelihood.from_positions(root[start : start + at_once], outputs)
            return
        # a column may touch one position only: two positions in one column would be correlated
        for start in range(0, root.shape[0] * positions, at_once):
            index = torch.arange(start, min(start + at_once, root.shape[0] * positions), device=root.device)
            column, position = index // positions, index % positions
            chunk = root.new_zeros(len(index), *root.shape[1:])
            rows = torch.arange(len(index), device=root.device)
            chunk[rows, :, position] = root[column, :, position]
            yield likelihood.from_positions(chunk, outputs)
