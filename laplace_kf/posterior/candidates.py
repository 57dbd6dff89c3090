"""The predictives that compete in ``tune``, within a budget: MAP, MAP with a temperature, linearised ones, Monte Carlo.

Every candidate is at its own best setting and is compared with MAP, and with each other, on the same validation
examples. What they cost is known beforehand (:mod:`laplace_kf.posterior.work`), and the number of examples each of them
looks at is chosen so that the budget is kept:

* MAP and the temperature need the outputs at the mean weights, which are there anyway: all examples;
* the linearised candidates need variances of outputs at a few ratios ``λ / N``: one pass for all of them, after which
  every size of the posterior is free (the covariance of a ratio goes with ``1 / N``);
* Monte Carlo pays for every draw at every setting. It starts at the setting of the linearised candidates, where there
  is one, on as many examples as let it look around. Scores of few draws are extrapolated to those of ``predict``
  (:mod:`laplace_kf.posterior.jackknife`), and the best setting is measured once more with as many, if they are left.

The setting of a posterior by default, N as counted and λ = 1, is among those that are looked at. So is, linearised, a
modest spread at the same ratio (:data:`MODEST`), the only one that the search has no part in: it needs a gain over MAP,
where all that were searched for need one beyond the noise, over MAP and over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from tqdm.auto import tqdm

from laplace_kf.errors import NonFinite
from laplace_kf.likelihoods import to_positions
from laplace_kf.operators import CurvatureBlock
from laplace_kf.posterior.examples import OUTPUT_DRAWS
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import PREDICTED
from laplace_kf.posterior.predictors import Linearized, rounded
from laplace_kf.posterior.search import Plane, Search, champion, coarse_to_fine, compared, nearby, on_all, rows
from laplace_kf.posterior.validation import MAP, Point, Score, Scorer, Validation
from laplace_kf.posterior.work import EPOCH, FIXED, Budget, Costs, scored

__all__ = ["CANDIDATES", "CAUTION", "Candidate", "Contest", "described", "setting"]

CANDIDATES = ("map", "temperature", "probit", "linearized", "mc")
"""All candidates, in the order in which they are tried."""
CAUTION = 1.0, 0.5
"""Standard errors by which a challenger's gain over MAP, and over another point or candidate, is discounted.

Settled, with the floor of the noise scale, on splits 5 to 12 of UCI tables, not on those of the published comparison;
looked at once more, with new draws for Monte Carlo's best setting, on Friedman's functions and scikit-learn's tables.
"""
MODEST = -1.0, -2.5
"""Decades of nats (:class:`laplace_kf.posterior.search.Plane`) of the modest spread: with a noise scale, and without.

Without one the curvature is that of outputs which are surer of the training data than of others, and nats are dearer
than they look. Settled on splits 5 to 12 of UCI tables and of images, Friedman's functions and scikit-learn's tables
(17 sets, 82 problems, networks alone and mixtures of five): the better of MAP and the modest spread on validation data
is on test data worse than MAP on no set beyond the noise and better on 15 (mixtures: 14).
"""
TEMPERATURES = 0.05, 20.0
LEAST = 16  # examples on which a candidate is looked at, unless there are fewer
LINEARISED_SHARE = 0.45  # of the budget, where Monte Carlo follows
SETTINGS = (40, 8, 5, 3, 1)  # of Monte Carlo, as many as let it see enough examples
ENOUGH = 256  # examples
COVARIANCES = 2**26  # numbers of covariances that are kept


@dataclass(frozen=True)
class Candidate:
    """A way to predict, at its best setting.

    Attributes:
        method: a name of :data:`CANDIDATES`.
        score: on the examples it saw.
        reference: MAP's score on the same.
        point: ``(N, λ)``, ``MAP`` for those without a posterior.
        temperature: of that one.
        at_edge: whether the search ended at its limits.
        wins: whether it beats MAP beyond the noise, or at the modest spread at all.
        search: everything it looked at.
        left_out: why it was not measured.
        not_finite: whether that is because nothing it tried is finite.
    """

    method: str
    score: Score = field(default_factory=lambda: Score(math.inf))
    reference: Score = field(default_factory=lambda: Score(math.inf))
    point: Point = MAP
    temperature: float | None = None
    at_edge: bool = False
    wins: bool = False
    search: Search | None = None
    left_out: str = ""
    not_finite: bool = False


class Contest:
    """Measures candidates one after the other and says who wins.

    Args:
        validation: the posterior and the data.
        name: of the objective.
        budget: training epochs of the validation examples, None for no limit.
        progress: whether to show a bar of what was spent.
        draws: weight draws that may take the place of the validation's: the first larger number that the budget allows
            to look around with on all examples, or a smaller one where it does not even allow those of the validation.
    """

    def __init__(
        self, validation: Validation, name: str, budget: float | None, progress: bool, draws: Sequence[int] = ()
    ) -> None:
        self.draws = draws
        self.fitted, self.validation, self.name, self.progress = validation.fitted, validation, name, progress
        self.budget = Budget(budget, validation.epoch)
        self.budget.pay(validation.epoch / EPOCH)  # reading
        self.found: dict[str, Candidate] = {}
        self._map = validation.scorer("map")
        score = self._map([MAP])[MAP]
        self.found["map"] = Candidate("map", score, score)
        outputs = validation.batches[0].outputs
        self._outputs = math.prod(outputs.shape[1:])
        self._channels = to_positions(outputs[:1]).shape[-1]
        self._guide: Candidate | None = None  # where Monte Carlo begins

    @cached_property
    def plane(self) -> Plane:
        """Coordinates of settings; its size counts nats at MAP's noise scale, where that is tuned."""
        noise, before = self.found["map"].score.noise, self.fitted.likelihood.noise_scale
        return _plane(self.fitted, 1.0 if noise is None or before is None else (before / noise) ** 2)

    @cached_property
    def default(self) -> list[Point]:
        """The setting of a posterior by default, if it lies within the limits of the search."""
        point = float(self.fitted.count), 1.0
        return [point] if self.plane.holds(point) else []

    @cached_property
    def modest(self) -> list[Point]:
        """The default setting's shape with a spread of :data:`MODEST` nats, where that setting is within the limits."""
        x = [self.plane.place(point)[0] for point in self.default]
        nats = MODEST[0] if self.fitted.likelihood.noise_scale is not None else MODEST[1]
        return [self.plane.point(each, nats) for each in x]

    @cached_property
    def costs(self) -> Costs:
        """Of marginal variances and of draws; made once, with the decompositions that it takes."""
        precision = self.fitted.one_of_many(*self.plane.point(-2.5, -1.0))
        found = Costs(precision, self.validation.forward, self._outputs)
        self.budget.at_least(found.decomposition() / FIXED)
        self.budget.pay(found.decomposition())
        return found

    def offered(self) -> list[str]:
        """The candidates that this likelihood has."""
        likelihood = self.fitted.likelihood
        probit = likelihood.has_logits and "probit" in likelihood.links()
        has = {"temperature": likelihood.has_temperature, "probit": probit}
        return [method for method in CANDIDATES if has.get(method, True)]

    def run(self, methods: Sequence[str]) -> None:
        """Measures the named candidates."""
        with self._bar():
            if "temperature" in methods:
                self.found["temperature"] = self._temperature()
            linearized = [method for method in ("probit", "linearized") if method in methods]
            if linearized or "mc" in methods:
                self._linearized(linearized or self._guides(), alone="mc" not in methods, wanted=linearized)
            if "mc" in methods:
                self.found["mc"] = self._monte_carlo()

    def winner(self) -> Candidate:
        """MAP, unless candidates beat it, then each other, beyond the noise (in the order of :data:`CANDIDATES`).

        One at the modest spread need not be beyond it.
        """
        scores = {method: found.score for method, found in self.found.items() if not found.left_out}
        beforehand = [method for method in scores if self.found[method].point in self.modest]
        return self.found[champion(scores, "map", *CAUTION, beforehand)]

    @contextmanager
    def _bar(self) -> Iterator[None]:
        """A bar of training epochs."""
        limit = self.budget.limit / self.budget.epoch
        with tqdm(
            total=limit if math.isfinite(limit) else None, desc="tune", unit="epoch", disable=not self.progress,
            bar_format=None if not math.isfinite(limit) else "{l_bar}{bar}| {n:.1f}/{total:.0f} epochs [{elapsed}]",
        ) as bar:  # fmt: skip
            bar.update(self.budget.cost)
            self.budget.told = bar.update
            try:
                yield
            finally:
                self.budget.told = None

    # -- without a posterior -------------------------------------------------------------------------------------------

    def _temperature(self) -> Candidate:
        """The temperature with the best objective, on logits or on predicted noise."""
        from scipy.optimize import minimize_scalar  # its import changes the filters of warnings

        known: dict[float, Score] = {}

        def value(log: float) -> float:
            known[log] = self._map.score(self._map.predictor.at_mean(math.exp(log)))
            self.budget.pay(self.validation.count * scored(self._outputs))
            return known[log].value if math.isfinite(known[log].value) else 1e30

        low, high = (math.log(limit) for limit in TEMPERATURES)
        minimize_scalar(value, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
        best = min(known, key=lambda log: known[log].value)
        reference = self.found["map"].score
        gain, error = compared(reference, known[best])
        edge = min(best - low, high - best) < 0.01
        wins = gain > CAUTION[0] * (error or 0.0)
        return Candidate("temperature", known[best], reference, MAP, math.exp(best), edge, wins)

    # -- linearised ----------------------------------------------------------------------------------------------------

    def _guides(self) -> list[str]:
        """A linearised candidate that is only looked at to know where Monte Carlo should begin."""
        return [method for method in self.offered() if method in ("probit", "linearized")][:1]

    def _linearized(self, methods: Sequence[str], alone: bool, wanted: Sequence[str]) -> None:
        """One pass at a few ratios for all of the methods; those that need covariances look around the first."""
        costs = self.costs
        share = self.budget.left * (0.95 if alone else LINEARISED_SHARE)
        link = self.fitted.likelihood.link
        marginal = {m: link("probit" if m == "probit" else None).marginal for m in methods}
        width = 1 if all(marginal.values()) else self._channels
        steps = rows(0.75), rows(1.5)
        costs = replace(costs, width=width)
        each = {len(step): costs.linearized(len(step) + len(self.default)) for step in steps}
        chosen = steps[0] if each[len(steps[0])] < 1.5 * each[len(steps[1])] else steps[1]
        draws = {m: 1 if m == "probit" or self._closed() else OUTPUT_DRAWS for m in methods}
        scoring = sum(scored(self._outputs, draws[m]) * (60 if k == 0 else 12) for k, m in enumerate(methods))
        examples = self._cut_to(self._affordable(share, each[len(chosen)] + scoring))
        full = width > 1 and len(chosen) * examples * self._outputs * self._channels > COVARIANCES
        if not examples or full:
            cheaper = [m for m in methods if marginal[m]]
            reason = (
                f"covariances of {self._channels} outputs at {len(chosen)} settings are too large to keep"
                if examples
                else self._too_dear(each[len(chosen)] + scoring)
            )
            for method in methods:
                if (method not in cheaper or cheaper == list(methods)) and method in wanted:
                    self.found[method] = Candidate(method, left_out=reason)
            if cheaper and cheaper != list(methods):
                self._linearized(cheaper, alone, [m for m in wanted if m in cheaper])
            return
        finest = chosen[1] - chosen[0]
        points = [*(self.plane.point(x, -1.0) for x in chosen), *self.default]
        scorers = {method: self.validation.scorer(method, examples) for method in methods}
        first: Linearized | None = None
        for method in sorted(methods, key=lambda m: marginal[m]):  # covariances first: variances are in them
            predictor = scorers[method].predictor
            assert isinstance(predictor, Linearized)
            if first is None:
                self.budget.pay(scorers[method].part.count * each[len(chosen)])
                predictor.prepare(points)
                first = predictor
            else:
                predictor.shared(first)
        start: Point | None = None
        for method, scorer in scorers.items():
            search = Search(self._paid(scorer, draws[method]), self.name, afford=self._prepared(scorer))
            search.look([MAP, *self.default, *self.modest])
            try:
                if start is None or draws[method] == 1:
                    best, edge = coarse_to_fine(search, self.plane, finest)
                else:
                    best, edge = nearby(search, self.plane, start), False
            except NonFinite as error:  # MAP and the temperature may be of use all the same
                if method in wanted:
                    self.found[method] = Candidate(method, left_out=str(error), not_finite=True)
                continue
            start = best
            self._guide = self._settled(method, search, best, edge)
            if method in wanted:
                self.found[method] = self._settled(method, search, best, edge, self.modest)

    def _closed(self) -> bool:
        """Whether the likelihood's default link needs no draws."""
        return next(iter(self.fitted.likelihood.links())) != "mc"

    def _paid(self, scorer: Scorer, draws: int) -> Callable[[Sequence[Point], bool], dict[Point, Score]]:
        def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
            self.budget.pay(len(points) * scorer.part.count * scored(self._outputs, draws))
            return scorer(points)

        return measure

    @staticmethod
    def _prepared(scorer: Scorer) -> Callable[[Sequence[Point]], bool]:
        """Whether points need no further pass over the data."""
        predictor = scorer.predictor
        assert isinstance(predictor, Linearized)
        return lambda points: not {rounded(p / n) for n, p in points if (n, p) != MAP} - predictor.ratios

    # -- Monte Carlo ---------------------------------------------------------------------------------------------------

    def _monte_carlo(self) -> Candidate:
        """Around the linearised candidates' setting, or from coarse to fine, on as many examples as can be afforded."""
        costs, start = self.costs, self._guide
        fewest = len(self.validation.seeds)
        more_draws = [(SETTINGS[0], draws) for draws in self.draws if draws > fewest]
        fewer_draws = [(settings, draws) for draws in self.draws if draws < fewest for settings in SETTINGS[-2:]]
        for settings, draws in [*more_draws, *((settings, fewest) for settings in SETTINGS), *fewer_draws]:
            drawing = (draws / 2 if self.validation.pairs else draws) * costs.draw()
            each = costs.sampled(draws)
            ratios = -(-settings // 2) if start is None or settings == SETTINGS[0] else -(-settings // 4)
            # more than it looks at: the default setting, other draws at the best one, one that is MAP in effect
            default = self.default if settings > 1 else []
            more = (2 if draws >= fewest else 1) + len(default)  # of the fewest draws, none is left for other ones
            examples = self._affordable(self.budget.left - (ratios + more) * drawing, (settings + more) * each)
            wanted = ENOUGH if draws == fewest and settings > 1 else 1 if draws <= fewest else math.inf
            if examples >= min(self.validation.count, wanted):
                break
        validation = self.validation if draws == fewest else self.validation.redrawn(draws)
        if not self._cut_to(examples):
            return Candidate("mc", left_out=self._too_dear(each))
        scorer = validation.scorer("mc", examples)
        before: list[float] = []

        def work(points: Sequence[Point]) -> float:
            real = [(n, p) for n, p in points if (n, p) != MAP]
            new = {rounded(p / n) for n, p in real} - set(before[-1:])
            return len(new) * drawing + len(real) * scorer.part.count * each

        def afford(points: Sequence[Point]) -> bool:
            return not before or work(points) <= self.budget.left

        def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
            self.budget.pay(work(points))
            before.extend(rounded(p / n) for n, p in points if (n, p) != MAP)
            return scorer(points)

        search = Search(measure, self.name, afford=afford)
        search.look([MAP, *default])
        try:
            if start is None or start.point == MAP or settings == SETTINGS[0]:
                best, edge = coarse_to_fine(search, self.plane)
            else:
                best, edge = nearby(search, self.plane, start.point), False
            self._redraw(search, validation, examples, (drawing + scorer.part.count * each) / draws)
        except NonFinite as error:
            return Candidate("mc", left_out=str(error), not_finite=True)
        return self._settled("mc", search, best, edge)

    def _redraw(self, search: Search, validation: Validation, examples: int, each: float) -> None:
        """Measures the best point once more, with draws that it was not chosen by, and so on while another one is best.

        All settings are compared on the same draws, and at some of them these few fit the examples better than others
        would: such a setting wins the search and loses afterwards. The new draws are up to as many as ``predict`` uses,
        of which half of what is left of the budget may be spent on a point.

        Args:
            search: what was measured.
            validation: with the draws that it was measured by.
            examples: how many are looked at.
            each: multiply-adds of a draw.
        """
        fewest = len(validation.seeds)
        seen: set[Point] = set()
        while (point := search.champion(*CAUTION)) not in {MAP, *seen} and self.budget.left >= fewest * each:
            afforded = PREDICTED if math.isinf(self.budget.left) else int(self.budget.left / each / 2) // 2 * 2
            draws = max(fewest, min(PREDICTED, afforded))
            self.budget.pay(draws * each)
            search.scores.update(validation.redrawn(draws).scorer("mc", examples)([point]))
            seen.add(point)

    # -- common --------------------------------------------------------------------------------------------------------

    def _affordable(self, work: float, each: float) -> int:
        """How many examples fit, up to all; 0 if they are too few to tell anything."""
        count = self.validation.count
        found = count if not math.isfinite(work) else int(min(count, max(0.0, work) / each))
        return found if found >= min(count, LEAST) else 0

    def _cut_to(self, examples: int) -> int:
        """So many, or 0 where the minibatches cannot be cut to as few."""
        return examples if examples and self.validation.part(examples).count <= 1.5 * examples else 0

    def _too_dear(self, each: float) -> str:
        needed = min(self.validation.count, LEAST) * each / self.budget.epoch
        return (
            f"a look at {min(self.validation.count, LEAST)} examples needs {needed:.2g} training epochs, "
            f"{max(0.0, self.budget.left) / self.budget.epoch:.2g} are left; raise budget="
        )

    def _settled(
        self, method: str, search: Search, best: Point, at_edge: bool, beforehand: Sequence[Point] = ()
    ) -> Candidate:
        """The candidate at the point that beats MAP and the others beyond the noise, else at its best one.

        Those that were named beforehand need only be better than MAP.
        """
        chosen = search.champion(*CAUTION, beforehand)
        wins = chosen != MAP
        point = chosen if wins else best
        edge = at_edge and point == best
        return Candidate(method, search.scores[point], search.scores[MAP], point, None, edge, wins, search)


def _plane(fitted: Fitted, scale: float) -> Plane:
    factor = fitted.factor
    parts = [matrix.nodes() for _, matrix in fitted.curvature.entries if isinstance(matrix, CurvatureBlock)]
    values, weights = (torch.cat(each) for each in zip(*parts, strict=True))
    return Plane(factor * values, weights, scale)


def setting(point: Point, score: Score, before: float | None) -> dict[str, float]:
    """``n_data``, ``prior_precision`` and ``noise`` of a point; ``before`` is the noise scale its N is counted at."""
    # the curvature goes with 1/σ²: at another σ the same precision has another N
    n = point[0] if before is None or score.noise is None else point[0] * (score.noise / before) ** 2
    found = {"n_data": n, "prior_precision": point[1]}
    return found if score.noise is None else {**found, "noise": score.noise}


def described(candidate: Candidate, overall: Score, before: float | None) -> dict[str, Any]:
    """What ``TuningResult.candidates`` holds of a candidate; objectives are on the scale of all examples.

    Of a candidate that saw some of the examples only they are estimates (:func:`laplace_kf.posterior.search.on_all`).

    Args:
        candidate: measured or left out.
        overall: MAP's score on all examples.
        before: the posterior's noise scale.
    """
    if candidate.left_out:
        found: dict[str, Any] = {"method": candidate.method, "objective": math.inf, "gain": -math.inf}
        found |= {"gain_error": None, "left_out": candidate.left_out}
        return {**found, "not_finite": True} if candidate.not_finite else found
    gain, error = compared(candidate.reference, candidate.score)
    value = on_all(candidate.score, candidate.reference, overall)
    found = {"method": candidate.method, "objective": value, "gain": gain, "gain_error": error}
    if candidate.temperature is not None:
        found["temperature"] = candidate.temperature
    if candidate.point != MAP:
        found.update(setting(candidate.point, candidate.score, before))
    elif candidate.score.noise is not None:
        found["noise"] = candidate.score.noise
    return found
