"""Validation data of which every process has a share: scored where they lie, and only the scores travel.

All processes then know the same scores, in one order, and make the same choices. In that order the examples of all
shares are mixed in proportion, so that the first examples of all of them are the first of every share, and scores on
some examples can be compared with scores on more of them, as they are in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.distributed import Ranks
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.models import preserved
from laplace_kf.posterior.examples import Part
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import Drawn
from laplace_kf.posterior.objectives import Objective, OODContrast
from laplace_kf.posterior.predictors import TUNING_METHODS, Point, Predictions
from laplace_kf.posterior.validation import Score, Scorer, Validation, score_of, scores_of
from laplace_kf.posterior.work import EPOCH

__all__ = ["SharedValidation", "interleaved"]


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The places ``(rank, index)`` of all examples of shares of so many, mixed in proportion."""
    keys = [((2 * index + 1) / count, rank, index) for rank, count in enumerate(counts) for index in range(count)]
    return [(rank, index) for _, rank, index in sorted(keys)]


class SharedValidation(Validation):
    """This process's share ``(x (N, ...), y (N, ...))``, scored together with the others.

    Args:
        ranks: the processes.
        others: as of :class:`Validation`; ``max_examples`` is of all shares together.

    Raises:
        ShapeMismatch: if a process has no validation examples.
        IncompatiblePair: for an objective with far inputs, which are not shared.
        DistributedFailure: if another process fails.
    """

    def __init__(
        self,
        ranks: Ranks,
        fitted: Fitted,
        val: Iterable[Any] | tuple[Any, Tensor],
        objective: Objective,
        samples: int = 20,
        generator: torch.Generator | None = None,
        max_examples: int | None = None,
        noise: bool = False,
        pairs: bool = False,
        mixed: bool = False,
    ) -> None:
        if isinstance(objective, OODContrast):
            raise IncompatiblePair(
                'objective="ood" has inputs beside the validation data, which are not shared between processes; tune '
                "without process_group= in every process, on the same data"
            )
        self.ranks = ranks
        self._shares: list[int] | None = None
        local = None if max_examples is None else -(-max_examples // ranks.size)
        try:
            super().__init__(fitted, val, objective, samples, generator, local, noise, pairs, mixed)
            own = self._count_here()
        except ShapeMismatch as error:
            if "are empty" not in str(error):
                raise
            own = 0
        counted = own and all(self._all_count(batch.outputs, batch.targets) for batch in self.batches)
        known = (own, counted, self.seeds, getattr(self, "_passes", None))
        everyone = ranks.exchange("the validation data", known)
        empty = [rank for rank, (count, *_) in enumerate(everyone) if not count]
        if empty:
            raise ShapeMismatch(
                f"processes {empty} have no validation examples; give every process some, or tune in every process on "
                "the same data, without process_group="
            )
        self._shares = [count for count, *_ in everyone]
        self._whole = not all(counted for _, counted, *_ in everyone)
        self.seeds, (whole, again, seen) = everyone[0][2:]
        self.forward, self.epoch = again / seen, EPOCH * self.count * whole / seen
        self.order = interleaved(self._shares)

    def _count_here(self) -> int:
        return sum(batch.outputs.shape[0] for batch in self.batches)

    def _all_count(self, outputs: Tensor, targets: Any) -> bool:
        """Whether every example of outputs ``(N, ...)`` has a target that is scored."""
        counted = self.fitted.likelihood.counted(outputs, targets)
        return counted is None or bool(counted.flatten(1).any(1).all())

    @property
    def count(self) -> int:
        """Number of validation examples of all processes."""
        return self._count_here() if self._shares is None else sum(self._shares)

    def part(self, examples: float = math.inf) -> Part:
        """The first examples in the common order, this many at most; all where some have no score."""
        assert self._shares is not None
        wanted = self.count if self._whole else int(min(examples, self.count))
        mine = sum(rank == self.ranks.rank for rank, _ in self.order[:wanted])
        found = super().part(max(1, mine))
        here = self.ranks.exchange("a part of the validation data", found.here)
        return _SharedPart(found, self._within(wanted, here), self)

    def _within(self, wanted: int, here: Sequence[int]) -> int:
        """How many of the first examples lie in what the processes took: minibatches may not have been cut as asked."""
        for place, (rank, index) in enumerate(self.order[:wanted]):
            if index >= here[rank]:
                return place
        return wanted

    def scorer(self, method: str, examples: float = math.inf) -> Scorer:
        """As :meth:`Validation.scorer`."""
        if method not in TUNING_METHODS:
            raise UnknownName(TUNING_METHODS.kind, method, TUNING_METHODS)
        part = self.part(examples)
        assert isinstance(part, _SharedPart)
        return _SharedScorer(self, part, method)


class _SharedPart(Part):
    """What this process has of the first examples of all of them.

    Args:
        own: what is scored here; perhaps more than counts.
        total: number of examples of all processes that count.
        validation: knows the common order.
    """

    def __init__(self, own: Part, total: int, validation: SharedValidation) -> None:
        vars(self).update(vars(own))
        self.total, self.order = total, validation.order[:total]

    @property
    def count(self) -> int:
        """Number of validation examples of all processes."""
        return self.total


class _SharedScorer(Scorer):
    """Scores points together with the other processes."""

    validation: SharedValidation
    part: _SharedPart

    def __call__(self, points: Sequence[Point], progress: bool = False) -> dict[Point, Score]:
        """The score of every point; all of them travel at once where the noise scale is not tuned at each."""
        if self.validation.noise and self._held is None:
            return super().__call__(points, progress)
        origin = self._at_this_noise(points)
        with preserved(self.fitted.model):
            mine = {
                origin[point]: None if predictions is None else self._here(predictions, self._held)
                for point, predictions in self._predictions(list(origin))
            }
        everyone = self.validation.ranks.exchange("scores", list(mine.values()))
        together = zip(*everyone, strict=True)
        return {point: self._all_of(each, self._held) for point, each in zip(mine, together, strict=True)}

    def score(self, predictions: Predictions | None, at_map: bool = False) -> Score:
        """The score of all processes; predictions of this one are ``None`` where they are not finite."""
        if self.validation.noise and self._held is None:
            return self._tuned(predictions, at_map)
        return self._score(predictions, self._held)

    def _score(self, predictions: Predictions | None, noise: float | None = None, rough: bool = False) -> Score:
        ranks = self.validation.ranks
        mine = None if predictions is None else self._here(predictions, noise, rough)
        return self._all_of(ranks.exchange("a score", mine), noise)

    def _all_of(self, everyone: Sequence[Any], noise: float | None) -> Score:
        """The score on all examples from what every process found."""
        if any(each is None for each in everyone):
            return Score(math.inf, None, noise)
        if self.validation._whole:
            every = torch.cat([each for each, _, _, _ in everyone], 1)
        else:
            every = torch.stack([everyone[rank][0][:, index] for rank, index in self.part.order], 1)
        weight, number = (sum(each[k] for each in everyone) for k in (1, 2))
        if number:  # so that the mean over all examples is the weighted mean
            every = every / (weight / number)
        return score_of(every[0], every[1:], everyone[0][3], noise)

    def _here(
        self, predictions: Predictions, noise: float | None, rough: bool = False
    ) -> tuple[Tensor, float, int, int]:
        """Scores ``(1 + g, n)`` of this process, the sum and number of their examples' weights, and the draws.

        The first row is of all draws, the others without each of ``g`` groups of them (none if ``rough``).

        Raises:
            IncompatiblePair: for an objective that is one number for all examples.
        """
        likelihood = self.fitted.likelihood
        likelihood = likelihood if noise is None else likelihood.with_noise_scale(noise)
        found, samples = [predictions(likelihood)], 1
        if isinstance(predictions, Drawn) and not rough:
            samples = predictions.samples
            found += [predictions.make(likelihood, k) for k in range(predictions.groups)]
        rows: list[Tensor] = []
        given: list[Tensor] = []
        for each in found:
            parts, given = scores_of(self.validation.objective, each, self.part)
            if any(part.dim() != 1 for part in parts):
                raise IncompatiblePair(
                    "the objective is one number for all examples, which cannot be put together from those of several "
                    'processes; use "nll" or "brier", a function (prediction, targets) -> (N,), or tune in every '
                    "process on the same data"
                )
            rows.append(torch.cat(parts).double().cpu())
        weights = torch.cat(given).double() if given else torch.zeros(0)
        return torch.stack(rows), float(weights.sum()), len(weights), samples
