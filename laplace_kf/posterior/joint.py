"""Tuning the posteriors of a mixture together: one (N, λ), noise scale, temperature and method for all components.

The search is that of one posterior (:mod:`laplace_kf.posterior.tuning`); what it scores are the mixture's predictions.
A training epoch, in which a budget is counted, is one of all components.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import weighting
from laplace_kf.errors import IncompatiblePair, UnknownName
from laplace_kf.likelihoods import Likelihood, Prediction, mixed
from laplace_kf.posterior.examples import Part
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import Drawn
from laplace_kf.posterior.objectives import Objective, OODContrast
from laplace_kf.posterior.predictors import TUNING_METHODS, Linearized, Point, Predictions, TuningPredictor, rounded
from laplace_kf.posterior.prior import PriorPrecision
from laplace_kf.posterior.validation import Scorer, Validation
from laplace_kf.predictive import draw_seeds

__all__ = ["Joint", "JointValidation"]


class Joint:
    """The components as the search sees them: one fitted posterior. Asked for a curvature, it gives the first one's.

    Args:
        members: fitted posteriors.
        shares: weights of the components, adding up to 1.
    """

    def __init__(self, members: Sequence[Fitted], shares: Sequence[float]) -> None:
        self.members, self.shares = tuple(members), tuple(shares)
        self.first = self.members[0]
        self.model = nn.ModuleList([member.model for member in members])
        self.likelihood: Likelihood = self.first.likelihood

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)

    @property
    def noise(self) -> dict[str, float]:
        """Of all components."""
        return {f"{k}/{n}": value for k, each in enumerate(self.members) for n, value in each.noise.items()}

    @property
    def count(self) -> float:
        """The mean over components of the number of examples that they were fitted on."""
        return sum(member.count for member in self.members) / len(self.members)

    def evidence(self, n: float, prior: PriorPrecision) -> Any:
        """The mean log evidence of the components, as ``.total``, 0-dim."""
        found = [member.evidence(n, prior).total for member in self.members]
        return SimpleNamespace(total=torch.stack([each.cpu() for each in found]).mean())

    def mixed(self, parts: Sequence[Sequence[Prediction]], likelihood: Likelihood) -> list[Prediction]:
        """The mixtures of the components' predictions of every pool."""
        return [mixed(likelihood, pool, self.shares) for pool in zip(*parts, strict=True)]

    def own(self, member: Fitted, likelihood: Likelihood) -> Likelihood:
        """A component's likelihood where the search uses this one: with its noise scale, if that was moved."""
        if likelihood is self.likelihood or likelihood.noise_scale is None:
            return member.likelihood
        return member.likelihood.with_noise_scale(likelihood.noise_scale)


class JointValidation(Validation):
    """Validation data ``(x (N, ...), y (N, ...))`` for every component; arguments, errors as of :class:`Validation`.

    Attributes:
        parts: the validation of each component; batches stand in the same order in all of them.
    """

    def __init__(
        self,
        fitted: Any,
        val: Iterable[Any] | tuple[Any, Tensor],
        objective: Objective,
        samples: int = 20,
        generator: torch.Generator | None = None,
        max_examples: int | None = None,
        noise: bool = False,
        pairs: bool = False,
        mixed: bool = False,
    ) -> None:
        joint: Joint = fitted
        scales = {member.likelihood.noise_scale for member in joint.members}
        if noise and len(scales) > 1:
            raise IncompatiblePair(
                f"the components have several noise scales ({', '.join(sorted(map(str, scales)))})"
                ", and one for all would be tuned: leave noise=True out, or set one scale for all before fit"
            )
        seeds = draw_seeds(1 + len(joint.members), generator)
        read = weighting.batches(val, joint.weights, joint.first.model)
        data = list(read if max_examples is None else islice(read, math.ceil(max_examples)))

        def make(mix: bool) -> list[Validation]:
            return [
                Validation(
                    member, iter(data), objective, samples, torch.Generator().manual_seed(seeds[0]), max_examples,
                    noise, pairs, mix,
                )
                for member in joint.members
            ]  # fmt: skip

        parts = make(mixed)
        if len({tuple(batch.outputs.shape[0] for batch in part.batches) for part in parts}) > 1:
            parts = make(False)  # one component's minibatches cannot be cut
        for part, seed in zip(parts, seeds[1:], strict=True):
            part.seeds = draw_seeds(samples, torch.Generator().manual_seed(seed))
        self.parts, self.mean = parts, parts[0].mean
        self.fitted, self.objective, self.noise, self.pairs, self.mixed = fitted, objective, noise, pairs, mixed
        self.seeds, self.batches, self.device = parts[0].seeds, parts[0].batches, parts[0].device
        self.contrast = objective if isinstance(objective, OODContrast) else None
        self.epoch = sum(part.epoch for part in parts) / len(parts)
        self.forward = sum(part.forward for part in parts) / len(parts)
        self.exponent, self.lowest = 0.0, parts[0].lowest

    def redrawn(self, samples: int) -> JointValidation:
        """The same data, and so many other weight draws of every component."""
        other = copy.copy(self)
        other.parts = [part.redrawn(samples) for part in self.parts]
        other.seeds = other.parts[0].seeds
        return other

    def parts_of(self, examples: float) -> list[Part]:
        """The first examples for every component: the same ones, all where minibatches cannot be cut alike."""
        found = [part.part(examples) for part in self.parts]
        same = len({tuple(each.inside.sizes) for each in found}) == 1
        return found if same else [part.part() for part in self.parts]

    def part(self, examples: float = math.inf) -> Part:
        """Those of the first component, as :meth:`Validation.part`."""
        return self.parts_of(examples)[0]

    def scorer(self, method: str, examples: float = math.inf) -> Scorer:
        """As :meth:`Validation.scorer`."""
        if method not in TUNING_METHODS:
            raise UnknownName(TUNING_METHODS.kind, method, TUNING_METHODS)
        return _JointScorer(self, self.parts_of(examples), method)


class _JointScorer(Scorer):
    """Scores of the mixture's predictions."""

    def __init__(self, validation: JointValidation, parts: Sequence[Part], method: str) -> None:
        super().__init__(validation, parts[0], "map")
        own = [each.scorer(method, part.count).predictor for each, part in zip(validation.parts, parts, strict=True)]
        kind = _JointLinearized if isinstance(own[0], Linearized) else _JointTuningPredictor
        self.predictor = kind(validation, own)


class _JointTuningPredictor(TuningPredictor):
    """The components' predictions at points, mixed."""

    def __init__(self, validation: JointValidation, members: Sequence[TuningPredictor]) -> None:
        self.members = members
        self.part, self.pools = members[0].part, members[0].pools
        joint: Any = validation.fitted
        self.joint: Joint = joint

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        groups: dict[float, list[Point]] = {}
        for n, p in points:
            groups.setdefault(rounded(p / n), []).append((n, p))
        for group in groups.values():
            found = [dict(member(group)) for member in self.members]
            for point in group:
                yield point, self._together([each[point] for each in found])

    def at_mean(self, temperature: float = 1.0) -> Predictions | None:
        return self._together([member.at_mean(temperature) for member in self.members])

    def _together(self, found: Sequence[Predictions | None]) -> Predictions | None:
        known = [each for each in found if each is not None]
        if len(known) != len(found):
            return None
        drawn = [each for each in known if isinstance(each, Drawn)]
        if len(drawn) != len(known):
            return partial(self._mixed, known)

        def make(likelihood: Likelihood, without: int | None) -> list[Prediction]:
            return self._mixed([lambda own, make=each.make: make(own, without) for each in drawn], likelihood)  # type: ignore[misc]

        return Drawn(make, drawn[0].samples, min(each.groups for each in drawn))

    def _mixed(self, found: Sequence[Predictions], likelihood: Likelihood) -> list[Prediction]:
        members = self.joint.members
        parts = [each(self.joint.own(member, likelihood)) for each, member in zip(found, members, strict=True)]
        return self.joint.mixed(parts, likelihood)


class _JointLinearized(_JointTuningPredictor, Linearized):
    """As well, for linearised components."""

    members: Sequence[Linearized]

    @property
    def ratios(self) -> set[float]:
        return set.intersection(*(member.ratios for member in self.members))

    def prepare(self, points: Sequence[Point]) -> None:
        for member in self.members:
            member.prepare(points)

    def shared(self, other: Linearized) -> None:
        assert isinstance(other, _JointLinearized)
        for mine, theirs in zip(self.members, other.members, strict=True):
            mine.shared(theirs)
