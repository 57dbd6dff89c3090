"""How predictions at many settings ``(N, λ)`` are made, so that settings share what they can.

``Λ(c N, c λ) = c Λ(N, λ)`` for every structure and damping, so that all settings with one ratio ``λ / N`` share their
weight draws up to the factor ``1/√c``: they are drawn once per ratio, not per setting.
Linearised networks are rotated into the eigenbases once and then serve all settings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood, Prediction
from laplace_kf.operators import Blockwise
from laplace_kf.outputs.spread import Spread, scaled
from laplace_kf.posterior.examples import OUTPUT_DRAWS, Part
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import Drawn, groups
from laplace_kf.posterior.kept_scores import KeptScores
from laplace_kf.predictive import Linearization, at_once, outputs_at, over_draws
from laplace_kf.predictive.activations import examples
from laplace_kf.predictive.suffix import Site
from laplace_kf.registry import Registry

__all__ = ["MAP", "TUNING_METHODS", "Linearized", "Point", "Predictions", "Shared", "TuningPredictor", "rounded"]

Point = tuple[float, float]
MAP: Point = (math.inf, math.inf)
"""The point ``(N, λ) = (∞, ∞)``: no spread at all."""

Noise = dict[str, Tensor]
"""Several draws, by parameter name: ``(K, *shape)`` without the mean."""

Predictions = Callable[[Likelihood], list[Prediction]]
"""Predictions of every pool of validation data under a likelihood (which carries the noise scale)."""

KEPT_NOISE = 2**26  # numbers of the draws of one ratio that are kept between calls
STACKED = 2**22  # numbers of outputs that are predicted from at once, without each group of draws


def rounded(ratio: float) -> float:
    """The ratio ``λ / N`` as settings are told apart by it."""
    return float(f"{ratio:.9e}")


@dataclass(frozen=True)
class Shared:
    """What all predictions of a search have in common.

    Attributes:
        fitted: the posterior; its likelihood and precisions are asked for.
        mean: posterior mean by parameter name, each of its parameter's shape.
        seeds: of S weight draws.
        pairs: whether weight draws come in pairs ``θ* ± ε``.
        kept: what an interrupted search left.
    """

    fitted: Fitted
    mean: Mapping[str, Tensor]
    seeds: Sequence[int]
    pairs: bool
    kept: KeptScores | None = None


class TuningPredictor(ABC):
    """Predictions at points; one object for all points of a search, so that it can keep what they share.

    Attributes:
        separate: whether points of different ratios ``λ / N`` share nothing, and are dear.
    """

    separate: ClassVar[bool] = False

    def __init__(self, shared: Shared, part: Part) -> None:
        self.common, self.part, self.fitted = shared, part, shared.fitted
        self.pools = part.pools

    @abstractmethod
    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        """Every point with its predictions, in any order; None where outputs are not finite. ``MAP`` is not asked."""

    def passed(self, points: Sequence[Point]) -> None:
        """Points of one ratio were asked for here, and their scores are known already."""
        return

    def at_mean(self, temperature: float = 1.0) -> Predictions | None:
        """Predictions at the mean weights, less certain by a temperature."""
        tempered = self.fitted.likelihood.tempered
        return self.from_samples([[tempered(z, temperature)[None] for z in found] for found in self.part.means])

    def from_samples(self, outputs: Sequence[Sequence[Tensor]]) -> Predictions | None:
        """Predictions from sampled outputs ``(S, N, ...)`` of every batch of every set of pools."""
        joined = [z for pool, parts in zip(self.pools, outputs, strict=True) for z in pool.joined(parts, dim=1)]
        if not all(bool(torch.isfinite(z).all()) for z in joined):
            return None
        samples = len(joined[0])
        left = groups(samples, self.common.pairs)

        def make(likelihood: Likelihood, without: int | None) -> list[Prediction]:
            return [likelihood.predict(z if without is None else z[left[without].to(z.device)]) for z in joined]

        def stacked(likelihood: Likelihood) -> list[Prediction]:
            index = torch.stack(left, 1)  # (S_k, g)
            return [likelihood.predict(z[index.to(z.device)].flatten(1, 2)) for z in joined]

        numbers = len(left) * sum(z.numel() for z in joined)
        fits = numbers <= STACKED and len({len(k) for k in left}) == 1
        return Drawn(make, samples, len(left), stacked if fits else None)


TUNING_METHODS: Registry[type[TuningPredictor]] = Registry("prediction method of tune")


@TUNING_METHODS.register("map")
class AtMean(TuningPredictor):
    """The mean weights, whatever the point."""

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        for point in points:
            yield point, self.at_mean()


@TUNING_METHODS.register("mc")
class Sampled(TuningPredictor):
    """Outputs at weight draws (methods 10.1), on request in pairs ``θ* ± ε``.

    A pair has no mean shift of its own. Among few independent draws that shift is of first order in the spread, where
    what the spread really does is of second order: a search would find draws that happen to be better weights.
    """

    separate = True

    def __init__(self, shared: Shared, part: Part) -> None:
        super().__init__(shared, part)
        self._drawn: tuple[float, Point, list[Noise] | None] | None = None  # None: when they are needed
        self._inputs = max((examples(inputs) for pool in self.pools for _, _, inputs in pool.sites), default=1)

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        groups: dict[float, list[Point]] = {}
        for n, p in points:
            groups.setdefault(rounded(p / n), []).append((n, p))
        for ratio, members in groups.items():
            yield from self._with_one_ratio(ratio, members)

    def _with_one_ratio(self, ratio: float, members: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        mean = self.common.mean
        drawn = {point: [[[] for _ in pool.sites] for pool in self.pools] for point in members}  # type: ignore[var-annotated]
        for count, noise in self._noises(ratio, members[0]):
            for n, p in members:
                weights = {name: mean[name] + math.sqrt(count / n) * value for name, value in noise.items()}
                for pool, lists in zip(self.pools, drawn[n, p], strict=True):
                    for site, found in zip(pool.sites, lists, strict=True):
                        with torch.no_grad():
                            found.append(over_draws(site[0], partial(_outputs, site, mean), weights, "tune"))
        for point in members:
            stacked = [[torch.cat(parts) for parts in lists] for lists in drawn.pop(point)]
            yield point, self.from_samples(stacked)

    def passed(self, points: Sequence[Point]) -> None:
        n, p = points[0]
        ratio = rounded(p / n)
        if len(self.common.seeds) * self.fitted.layout.size > KEPT_NOISE:
            self._drawn = None
        elif self._drawn is None or self._drawn[0] != ratio:
            self._drawn = ratio, (n, p), None

    def _noises(self, ratio: float, point: Point) -> Iterator[tuple[float, Noise]]:
        """The N they were drawn at, and draws that are run together, until there is one for every seed.

        Those of the last ratio are kept if they are small.
        """
        self.passed([point])
        at = point if self._drawn is None else self._drawn[1]
        kept = None if self._drawn is None else self._drawn[2]
        if kept is None:
            fresh = self._fresh(self.fitted.one_of_many(*at))
            if self._drawn is None:
                yield from ((at[0], noise) for noise in fresh)
                return
            kept = list(fresh)
            self._drawn = ratio, at, kept
        yield from ((at[0], noise) for noise in kept)

    def _fresh(self, precision: Blockwise) -> Iterator[Noise]:
        """One draw for every seed; in pairs, both signs of one for every second seed."""
        seeds, mean, signs = self.common.seeds, self.common.mean, 2 if self.common.pairs else 1
        blocks = [block for block, _ in precision.entries]
        size = at_once(blocks, len(seeds), self._inputs, max(value.element_size() for value in mean.values()))
        step = max(size // signs, 1) * signs
        for start in range(0, len(seeds), step):
            some = seeds[start : start + step]
            noise = {name: value.to(mean[name]) for name, value in precision.draws(some[::signs]).items()}
            if signs == 2:
                noise = {n: torch.stack([v, -v], 1).flatten(0, 1)[: len(some)] for n, v in noise.items()}
            for first in range(0, len(some), size):
                yield {name: value[first : first + size] for name, value in noise.items()}


def _outputs(site: Site, mean: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
    """Outputs ``(N, ...)`` at one draw of weights; parameters that are not drawn keep their mean."""
    model, forward, inputs = site
    return outputs_at(model, forward, {**mean, **drawn}, inputs)


@TUNING_METHODS.register("linearized")
class Linearized(TuningPredictor):
    """Normal outputs of the network linearised at the mean weights, through the likelihood's default link."""

    link: ClassVar[str | None] = None

    def __init__(self, shared: Shared, part: Part) -> None:
        super().__init__(shared, part)
        likelihood = self.fitted.likelihood
        if self.link is not None and self.link not in likelihood.links():
            raise IncompatiblePair(f'{likelihood!r} has no {self.link} approximation; use method="linearized"')
        self.marginal = likelihood.link(self.link).marginal
        self._spreads: dict[float, tuple[float, list[Tensor], list[Tensor | Spread] | None]] = {}

    @property
    def ratios(self) -> set[float]:
        """The ratios ``λ / N`` that no further pass is needed for."""
        return set(self._spreads)

    def prepare(self, points: Sequence[Point]) -> None:
        """Passes over the data once for all points whose ratio is new, ``K`` of them; what it finds is kept.

        Kept are variances ``(K, N, ...)`` and, for links that need them, covariances of positions ``(K, N, T, C, C)``;
        of many outputs, what these are made of.
        """
        new = {rounded(p / n): (n, p) for n, p in points if rounded(p / n) not in self._spreads}
        if not new:
            return
        kept, key = self.common.kept, [self.marginal, self.part.count, *new.values()]
        if kept is not None and (known := kept.variances(key)) is not None:
            self._take(new, [one.to(self.part.means[0][0].device) for one in known])
            return
        precisions = [self.fitted.one_of_many(*point) for point in new.values()]
        mean, found = self.common.mean, []
        with torch.no_grad():
            for pool in self.pools:
                found.append(
                    [
                        self._spread(Linearization(model, forward, mean, inputs, keep=False), precisions)
                        for model, forward, inputs in pool.sites
                    ]
                )
        for k, (ratio, (n, _)) in enumerate(new.items()):
            variances = self._joined([[spread[0][k] for spread in spreads] for spreads in found])
            full = None
            if not self.marginal:
                parts = [[spread[1][k] for spread in spreads] for spreads in found]
                full = [c for pool, mine in zip(self.pools, parts, strict=True) for c in pool.joined_spreads(mine)]
            self._spreads[ratio] = n, variances, full
        if kept is not None:
            spreads = [self._spreads[ratio] for ratio in new]
            kept.keep_variances(key, [one for _, first, full in spreads for one in (*first, *(full or ()))])

    def _take(self, new: Mapping[float, Point], known: Sequence[Tensor]) -> None:
        """Takes what was found at these ratios before, tensors of any shapes in the order of :meth:`prepare`."""
        size = len(known) // len(new)
        for k, (ratio, (n, _)) in enumerate(new.items()):
            mine = list(known[k * size : (k + 1) * size])
            half = size if self.marginal else size // 2
            self._spreads[ratio] = n, mine[:half], None if self.marginal else [*mine[half:]]

    def shared(self, other: Linearized) -> None:
        """Takes over what another one found on the same examples, as far as it is enough for this link."""
        for ratio, (n, variances, full) in other._spreads.items():
            if self.marginal or full is not None:
                self._spreads.setdefault(ratio, (n, variances, None if self.marginal else full))

    def __call__(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        self.prepare(points)
        outputs = self._joined(self.part.means)
        for n, p in points:
            count, variances, full = self._spreads[rounded(p / n)]
            scale = count / n  # the covariance of a ratio goes with 1 / N
            yield (
                (n, p),
                self._predictions(outputs, [scale * v for v in variances], full and [scaled(c, scale) for c in full]),
            )

    def _spread(self, network: Linearization, precisions: list[Blockwise]) -> tuple[Tensor, Sequence[Tensor | Spread]]:
        """Variances in the layout of the outputs, and covariances of a position (unless only variances count)."""
        return network.moments(precisions, self.fitted.likelihood, marginal=self.marginal)

    def _joined(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [z for pool, mine in zip(self.pools, parts, strict=True) for z in pool.joined(mine)]

    def _predictions(
        self, outputs: list[Tensor], variances: list[Tensor], covariances: list[Tensor | Spread] | None
    ) -> Predictions | None:
        if not all(bool(torch.isfinite(variance).all()) for variance in variances):
            return None
        full: Sequence[Tensor | Spread | None] = covariances or [None] * len(outputs)
        seed, samples = self.common.seeds[0], max(len(self.common.seeds), OUTPUT_DRAWS)

        def predict(likelihood: Likelihood) -> list[Prediction]:
            return [
                likelihood.predict_gaussian(z, v, c, self.link, samples, torch.Generator().manual_seed(seed))
                for z, v, c in zip(outputs, variances, full, strict=True)
            ]

        return predict


@TUNING_METHODS.register("probit")
class Probit(Linearized):
    """As linearised, with the probit approximation, which needs the variances of the outputs only."""

    link: ClassVar[str | None] = "probit"
