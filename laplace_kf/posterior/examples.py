"""Validation examples as values: minibatches read once, and parts of them put together to be scored."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.outputs.spread import Spread, together
from laplace_kf.outputs.weighted import WeightedTargets, bare, concatenated
from laplace_kf.predictive.suffix import Site

__all__ = ["OUTPUT_DRAWS", "Batch", "Part", "Pools"]

POOL = 2**24  # sampled outputs that are scored at once
OUTPUT_DRAWS = 100  # least number of draws of outputs: they cost next to nothing


@dataclass(frozen=True)
class Batch:
    """One minibatch of validation examples.

    Attributes:
        site: what to run for it at other weights.
        outputs: at the posterior's mean, ``(N, ...)``.
        targets: as the likelihood takes them.
    """

    site: Site
    outputs: Tensor
    targets: Any


class Pools:
    """Batches of inputs, and how their outputs are put together to be scored at once.

    Args:
        sites: of every batch, the model to run, its ``forward=`` and what it takes.
        outputs: of every batch at the mean weights, each ``(N, ...)``.
        samples: S, so that a pool has at most ``POOL`` sampled outputs.
    """

    def __init__(self, sites: list[Site], outputs: list[Tensor], samples: int) -> None:
        self.sites = sites
        self.groups: list[list[int]] = []
        for index, found in enumerate(outputs):
            if self.groups and found.shape[1:] == outputs[self.groups[-1][-1]].shape[1:]:
                size = sum(outputs[k].numel() for k in self.groups[-1]) + found.numel()
                if max(samples, OUTPUT_DRAWS) * size <= POOL:
                    self.groups[-1].append(index)
                    continue
            self.groups.append([index])
        self.sizes = [sum(outputs[k].shape[0] for k in group) for group in self.groups]

    def joined_targets(self, parts: Sequence[Any]) -> list[Any]:
        """The targets of every pool from those of every batch, of whatever structure."""
        return [concatenated([parts[k] for k in group]) for group in self.groups]

    def joined_spreads(self, parts: Sequence[Tensor | Spread]) -> list[Tensor | Spread]:
        """Covariances of every pool from those of every batch, ``(N, T, C, C)`` or what they are made of."""
        return [together([parts[k] for k in group]) for group in self.groups]

    def joined(self, parts: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
        """One tensor for every pool from one ``(..., N, ...)`` for every batch, with the examples along ``dim``."""
        return [torch.cat([parts[k] for k in group], dim) for group in self.groups]


class Part:
    """The first examples of the validation data, put together to be scored; and the far ones of a contrast.

    Args:
        batches: in the order of the data, outputs ``(N, ...)``.
        far: sites and outputs of out-of-distribution inputs.
        samples: S.
    """

    def __init__(self, batches: Sequence[Batch], far: tuple[list[Site], list[Tensor]] | None, samples: int) -> None:
        self.inside = Pools([batch.site for batch in batches], [batch.outputs for batch in batches], samples)
        given = self.inside.joined_targets([batch.targets for batch in batches])
        self.targets = [bare(y) for y in given]
        self.weights = [y.weights if isinstance(y, WeightedTargets) else None for y in given]
        self.outside = None if far is None else Pools(*far, samples)
        self.pools = [self.inside, *([self.outside] if self.outside is not None else [])]
        self.means = [[batch.outputs for batch in batches], *([far[1]] if far is not None else [])]
        self._repeated: dict[int, Part] = {}

    def repeated(self, count: int) -> Part | None:
        """This with the targets and weights of every pool so many times; None where targets are not one tensor."""
        if any(not isinstance(y, Tensor) or len(y) != n for y, n in zip(self.targets, self.inside.sizes, strict=True)):
            return None
        if count not in self._repeated:
            other = self._repeated[count] = copy.copy(self)
            other.targets = [torch.cat([y] * count) for y in self.targets]
            other.weights = [None if w is None else torch.cat([w] * count) for w in self.weights]
        return self._repeated[count]

    @property
    def here(self) -> int:
        """Number of validation examples that this process has of it."""
        return sum(self.inside.sizes)

    @property
    def count(self) -> int:
        """Number of validation examples."""
        return self.here
