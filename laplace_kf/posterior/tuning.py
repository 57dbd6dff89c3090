"""Choosing (N, λ) and the noise scale after training: on validation data, or by the evidence."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from laplace_kf import resuming
from laplace_kf.callers import users_line
from laplace_kf.errors import IncompatiblePair, InvalidArgument, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.notebooks import html_table
from laplace_kf.posterior.candidates import CANDIDATES, Candidate, Contest, described, setting
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import PREDICTED
from laplace_kf.posterior.kept_scores import KeptScores
from laplace_kf.posterior.objectives import OBJECTIVES, Objective, OODContrast, WithinTolerance
from laplace_kf.posterior.prior import PriorPrecision, plain, positive
from laplace_kf.posterior.search import Search, compared, grid, on_all, widest
from laplace_kf.posterior.validation import MAP, Measure, Point, Score, Validation
from laplace_kf.registry import AUTO

__all__ = ["OBJECTIVES", "Options", "Settings", "TuningResult", "searched", "tune"]

log = logging.getLogger(__name__)
CHOICES = ("auto", *CANDIDATES)
DRAWS, OTHER_DRAWS = 20, (PREDICTED, 40, 10)
"""Weight draws of a point by default, and those that are used in their place where the budget is large, or small."""
MAP_TOLERANCE = 1e-4
"""How far from MAP's objective, relative to 1 + |objective|, a point may be that is called MAP in effect."""

SHOWN = 10
"""Points of a grid that a notebook shows."""


@dataclass(frozen=True)
class Options:
    """Arguments of :meth:`LaplacePosterior.tune` that are not grids or data; see there."""

    objective: str | Objective = "nll"
    method: str = "auto"
    samples: int | None = None
    generator: torch.Generator | None = None
    extend: int = 0
    progress: bool = False
    noise: bool | None = None
    per_block: bool = False
    ood: Iterable[Any] | None = None
    max_examples: int | None = None
    budget: float | None = 10.0
    kept: KeptScores | None = None


@dataclass(frozen=True)
class Settings:
    """N, λ and the way to predict: before tuning, and as it decided (what is None then stays as it was)."""

    n_data: float
    prior_precision: PriorPrecision
    noise: float | None = None
    method: str | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class TuningResult:
    """What a search over (N, λ) found.

    Attributes:
        table: one dict per point with ``n_data``, ``prior_precision`` and ``objective`` (lower is better), and
            ``noise`` where the noise scale was tuned.
        best: the row that the posterior now has the values of: the smallest objective of a grid; in the default search
            the one that beats MAP, and the others, beyond the noise of the validation set (a modest spread, which was
            not searched for: that beats MAP at all).
        at_edge: whether it lies on the edge of the grid, or at the limits of the default search.
        objective: name of the objective.
        map_objective: the objective of the trained weights alone (at their own best noise scale, where that is tuned);
            None for the evidence.
        map_wins: whether no point of the table beats it (in the default search: by more than one standard error, the
            modest spread at all). The default search then sets a point that is MAP in effect.
        gain: by how much the best point is better than MAP; None for the evidence.
        gain_error: standard error of ``gain`` over the validation examples, from paired differences; None where the
            objective is not a mean of scores by example.
        searched: whether this was the default search, not a grid.
        method: how ``predict`` predicts from now on, the winner of the candidates; None where that was not asked.
        candidates: one dict per predictive that was compared, with ``method``, ``objective``, ``gain`` over MAP,
            ``gain_error``, and ``temperature``, ``n_data``, ``prior_precision``, ``noise`` where it has them; one that
            the budget was too small for has ``left_out``, the reason, and an infinite objective. Objectives are those
            of all validation examples: of a candidate that saw some of them, MAP's on all less the gain on those.
        cost: training epochs of the validation examples that the search took, by count; None for the evidence.
    """

    table: list[dict[str, Any]]
    best: dict[str, Any]
    at_edge: bool
    objective: str = field(default="nll")
    map_objective: float | None = None
    map_wins: bool = False
    gain: float | None = None
    gain_error: float | None = None
    searched: bool = field(default=False, repr=False)
    method: str | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    cost: float | None = None

    def __repr__(self) -> str:
        edge = ", at the edge of the search" if self.at_edge else ""
        method = "" if self.method is None else f"method {self.method!r}, "
        return (
            f"TuningResult({len(self.table)} points; {method}best {_shown(self.best)}: "
            f"{self.objective} {self.best['objective']:.4f}{edge}{', MAP wins' if self.map_wins else ''})"
        )

    def __str__(self) -> str:
        lines = [f"Tuned on {self.objective}, {len(self.table)} points:"]
        lines.append(f"  best  {self.best['objective']:.4f}  at {_shown(self.best)}")
        if not self.candidates and self.map_objective is not None:
            lines.append(f"  MAP   {self.map_objective:.4f}")
        if not self.candidates and self.gain is not None:
            error = "" if self.gain_error is None else f" ± {self.gain_error:.4f}"
            lines.append(f"  gain  {self.gain:.4f}{error}")
        if self.candidates:
            lines.append(f"  {'candidate':12} {self.objective:>9}  gain over MAP")
            lines += [f"{'>' if each['method'] == self.method else ' ':>2}{_line(each)}" for each in self.candidates]
        if self.map_wins:
            lines.append("  No point tried beats the trained weights alone (MAP) beyond the noise.")
        if self.at_edge:
            lines.append("  The best point lies at the edge of the search.")
        if self.cost is not None:
            lines.append(f"  cost  {self.cost:.2g} training epochs of the validation examples")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The candidates (of a grid, its points, best first), the winner marked, as a table."""
        lines = str(self).splitlines()
        if self.candidates:
            columns = ("", "candidate", self.objective, "gain over MAP", "setting")
            cells = [_cells(each, each["method"] == self.method) for each in self.candidates]
            notes = [line.strip() for line in lines[1:2] + lines[3 + len(cells) :]]
            return html_table(lines[0], columns, cells, notes)
        points = sorted(self.table, key=lambda row: row["objective"])[:SHOWN]
        rows = [(f"{row['objective']:.4f}", _shown(row)) for row in points]
        return html_table(lines[0], (self.objective, "at"), rows, [line.strip() for line in lines[1:]])

    def warn(self) -> None:
        """Logs what was found; warns of candidates that are nowhere finite, a best point on the edge, a win of MAP."""
        log.info("%r", self)
        if ruined := [each for each in self.candidates if each.get("not_finite")]:
            warnings.warn(
                f"{', '.join(each['method'] for each in ruined)}: {ruined[0]['left_out']}; predictions are by "
                f"method={self.method!r}. Logits of such a size are a sign of weights that have run away",
                stacklevel=users_line(),
            )
        if self.at_edge:
            warnings.warn(
                f"the best {self.objective} lies on the edge of the grid ({_shown(self.best)}); widen the grid, or "
                "pass extend=k to extend it up to k times",
                stacklevel=users_line(),
            )
        elif self.map_wins and self.searched and not ruined:
            warnings.warn(
                f"no posterior tried beats the trained weights alone (MAP, {self.objective} {self.map_objective:.4f}) "
                f"beyond the noise of the validation data; set to {_shown(self.best)}, which is MAP in effect",
                stacklevel=users_line(),
            )


def _cells(each: Mapping[str, Any], won: bool = False) -> tuple[str, str, str, str, str]:
    """One candidate: a mark, its name, its objective, what it gains, its setting or why it was left out."""
    mark = ">" if won else ""
    if "left_out" in each:
        return mark, each["method"], "-", "", f"left out: {each['left_out']}"
    error = "" if each["gain_error"] is None else f" ± {each['gain_error']:.4f}"
    more = [f"T = {each['temperature']:.3g}"] if "temperature" in each else []
    more += [_shown(each)] if "n_data" in each else []
    return mark, each["method"], f"{each['objective']:.4f}", f"{each['gain']:.4f}{error}", "  ".join(more)


def _line(each: Mapping[str, Any]) -> str:
    """One candidate in the table."""
    _, name, objective, *rest = _cells(each)
    return f"{name:12} {objective:>9}  {'  '.join(part for part in rest if part)}"


def _shown(row: Mapping[str, Any]) -> str:
    prior = row["prior_precision"]
    shown = f"{prior:.4g}" if not isinstance(prior, Mapping) else f"{{{len(prior)} values}}"
    noise = f", noise={row['noise']:.4g}" if "noise" in row else ""
    return f"n_data={row['n_data']:.4g}, prior_precision={shown}{noise}"


def default_n_data(n: float) -> list[float]:
    """``N · 10^{-1 … 4}`` in half decades (methods 9.3)."""
    return [n * 10 ** (k / 2) for k in range(-2, 9)]


def default_prior_precision() -> list[float]:
    """``10^{-4 … 4}`` in half decades (methods 9.3)."""
    return [10 ** (k / 2) for k in range(-8, 9)]


def searched(
    fitted: Fitted,
    n: float,
    prior: PriorPrecision,
    n_data: Sequence[float] | None,
    prior_precision: Sequence[float] | None,
    options: Options,
) -> dict[str, Any]:
    """What a search is made for, by which its checkpoint is told from others."""
    sums = {f"{name}/{k}": part for name, parts in fitted.statistics.sums.items() for k, part in enumerate(parts)}
    named = ("objective", "method", "samples", "extend", "noise", "per_block", "max_examples", "budget")
    return {
        "posterior": resuming.digest({"mean": fitted.mean, **sums}),
        "likelihood": resuming.described(fitted.likelihood),
        "n_data and prior_precision": [n, resuming.described(plain(prior))],
        "grids": [resuming.described(n_data), resuming.described(prior_precision)],
        **{name: resuming.described(getattr(options, name)) for name in named},
    }


def tune(
    fitted: Fitted,
    now: Settings,
    val: Iterable[Any] | tuple[Any, Tensor] | None,
    n_data: Sequence[float] | None,
    prior_precision: Sequence[float] | None,
    options: Options,
    validate: Callable[..., Validation] = Validation,
) -> tuple[TuningResult, Settings]:
    """The search behind :meth:`LaplacePosterior.tune`, which sets what is returned; ``now`` is what the posterior has.

    ``val`` is a loader or a pair ``(x (N, ...), y (N, ...))``. Objectives are means over examples: of a validation set
    of several batches, the mean over all its examples. ``validate`` reads them.
    """
    gridded = n_data is not None or prior_precision is not None
    if rule := isinstance(options.objective, WithinTolerance):
        n_data, gridded = [now.n_data] if n_data is None else n_data, True
    counts = _axis("n_data", default_n_data(fitted.count) if n_data is None else n_data)
    if rule and len(counts) > 1:
        raise IncompatiblePair(
            f"WithinTolerance looks for the smallest prior precision at one N, got {len(counts)} values of n_data; "
            "leave n_data out"
        )
    priors = _axis("prior_precision", default_prior_precision() if prior_precision is None else prior_precision)
    noise = _tunes_noise(fitted, options.noise, gridded)
    by_evidence = options.objective == "evidence"
    if options.per_block and (gridded or not by_evidence):
        raise IncompatiblePair('per_block=True needs objective="evidence" and no grids')
    if by_evidence and not gridded:
        return _by_evidence(fitted, now.n_data, noise, options.per_block)
    name = options.objective if isinstance(options.objective, str) else _name(options.objective)
    if by_evidence:
        if noise:
            raise IncompatiblePair('noise=True with objective="evidence" needs no grids; leave them out')
        search = Search(_evidence(fitted), name, options.progress)
        best, at_edge = grid(search, counts, priors, options.extend)
        return _result(search, best, at_edge, [(n, p) for n in counts for p in priors])
    if val is None:
        raise ShapeMismatch('tune needs validation data for this objective; only objective="evidence" needs none')
    if options.method not in CHOICES:
        raise UnknownName("method of tune", options.method, CHOICES)
    validation = validate(
        fitted, val, _objective(options), options.samples or DRAWS, options.generator, options.max_examples, noise,
        pairs=not gridded, mixed=not gridded, **({} if options.kept is None else {"kept": options.kept}),
    )  # fmt: skip
    if gridded:
        return _over_grid(now, validation, name, counts, priors, options)
    return _contest(now, validation, name, options)


# ------------------------------------------------------------------------------------------------ arguments


def _axis(what: str, values: Iterable[float] | float) -> list[float]:
    """Grid values in increasing order, each once; one number is a grid of one."""
    found = sorted({positive(what, value) for value in (values if isinstance(values, Iterable) else [values])})
    if not found:
        raise InvalidArgument(f"the grid for {what} is empty; leave it out for the default one")
    return found


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


def _objective(options: Options) -> Objective:
    objective = options.objective
    if options.ood is not None and objective != "ood":
        raise IncompatiblePair('ood= is for objective="ood"; leave it out, or pass objective=OODContrast(inputs)')
    if not isinstance(objective, str):
        return objective
    if objective == "ood":
        if options.ood is None:
            raise IncompatiblePair('objective="ood" needs out-of-distribution inputs: pass ood=loader')
        return OODContrast(options.ood)
    if objective not in OBJECTIVES:
        raise UnknownName(OBJECTIVES.kind, objective, [*OBJECTIVES, "ood", "evidence"])
    return OBJECTIVES[objective]


def _tunes_noise(fitted: Fitted, asked: bool | None, gridded: bool) -> bool:
    """Whether to tune σ; by default where it was left at 1.0 and there are no grids."""
    likelihood = fitted.likelihood
    if asked is None:
        default = type(likelihood)().noise_scale if likelihood.noise_scale is not None else None
        return not gridded and default is not None and all(value == default for value in fitted.noise.values())
    if asked:
        likelihood.with_noise_scale(likelihood.noise_scale or 1.0)  # refuses where there is none
    return asked


# ------------------------------------------------------------------------------------------------ evidence


def _evidence(fitted: Fitted) -> Measure:
    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        return {(n, p): Score(-float(fitted.evidence(n, p).total.detach())) for n, p in points}

    return measure


def _by_evidence(fitted: Fitted, n: float, noise: bool, per_block: bool) -> tuple[TuningResult, Settings]:
    """The maximum over λ and the noise at the N that the posterior has: in N the evidence has no inner maximum."""
    model = fitted.evidence_model()
    start = torch.ones(max(model.groups) + 1 if per_block else 1, dtype=torch.float64)
    path = model.maximise(n, start, fitted.likelihood, noise)
    rows = []
    for prior, sigma, value in path:
        row: dict[str, Any] = {"n_data": n, "prior_precision": float(prior[0]), "objective": -value}
        if per_block:
            row["prior_precision"] = model.patterns(prior)
        rows.append(row if sigma is None else {**row, "noise": sigma})
    at_edge = bool((path[-1][0].log().abs() > 29.0).any())
    best = rows[-1]
    return TuningResult(rows, best, at_edge, "evidence"), _settings(best)


# ------------------------------------------------------------------------------------------------ validation


def _over_grid(
    now: Settings,
    validation: Validation,
    name: str,
    counts: list[float],
    priors: list[float],
    options: Options,
) -> tuple[TuningResult, Settings]:
    """The grid as it is given; a noise scale that is to be tuned is MAP's best at all of its points."""
    method = now.method if options.method == AUTO else options.method
    assert method is not None
    scorer = validation.scorer("map" if method == "temperature" else method)
    search = Search(scorer, name, options.progress)
    search.look([MAP])
    if validation.noise:
        scorer.hold_noise(search.scores[MAP].noise)
    if isinstance(rule := options.objective, WithinTolerance):
        best, at_edge = widest(search, counts[0], priors, rule.tolerance, options.extend)
    else:
        best, at_edge = grid(search, counts, priors, options.extend)
    found, settings = _result(search, best, at_edge, [(n, p) for n in counts for p in priors])
    chosen = None if options.method == AUTO else method
    return replace(found, method=chosen), replace(settings, method=chosen)


def _contest(now: Settings, validation: Validation, name: str, options: Options) -> tuple[TuningResult, Settings]:
    """All candidates, or the one that was asked for, beside MAP and the temperature; the winner is set.

    What a gain has to exceed is the noise of the validation set (:func:`laplace_kf.posterior.search.champion`). Over
    many small data sets this choice loses to MAP on test data less often than the smallest objective does, and gains
    about as much.
    """
    if options.budget is not None:
        positive("budget", options.budget)
    contest = Contest(
        validation, name, options.budget, options.progress, OTHER_DRAWS if options.samples is None else ()
    )
    offered, asked, likelihood = contest.offered(), options.method, validation.fitted.likelihood
    if asked == "probit" and asked in likelihood.links():  # for others the same as "linearized"
        offered = [*offered, asked]
    if asked != AUTO and asked not in offered:
        raise IncompatiblePair(
            f"{likelihood!r} has no {asked} prediction; its methods are {', '.join(map(repr, offered))}; pass one of "
            "these, or 'auto'"
        )
    contest.run(offered if asked == AUTO else [each for each in ("map", "temperature", asked) if each in offered])
    before = likelihood.noise_scale if validation.noise else None
    found, overall = contest.found, contest.found["map"].score
    if not any(math.isfinite(candidate.score.value) for candidate in found.values()):
        raise NonFinite(
            f"objective {name!r} is not finite at the trained weights, nor at any posterior that was tried; check the "
            "validation data, the weights and the objective"
        )
    if asked != AUTO and (reason := found[asked].left_out):
        if found[asked].not_finite:
            raise NonFinite(f'{reason}; tune(method="auto") falls back on the trained weights and a temperature')
        raise IncompatiblePair(
            f"method={asked!r} cannot be tuned within budget={options.budget:g}: {reason}. Raise budget=, or leave "
            "method= out"
        )
    winner = contest.winner() if asked == AUTO else found[asked]
    of = {method: candidate for method, candidate in found.items() if candidate.search is not None}
    # a winner without a posterior leaves (N, λ) to the best of those that have one, for all else that needs them
    source = winner if winner.search is not None else _best_of(of)
    map_wins = not any(candidate.wins for candidate in of.values())
    table: list[dict[str, Any]] = []
    best: dict[str, Any]
    if source is None:  # no posterior was measured
        best = {"n_data": now.n_data, "prior_precision": plain(now.prior_precision)}
        best["objective"] = winner.score.value
        if winner.score.noise is not None:
            best["noise"] = winner.score.noise
        table.append(best)
    else:
        # the noise scale is one for all methods: where MAP wins, its own, not that of a spread that took its place
        at_map = winner.search is None and winner.score.noise is not None
        point = source.point if source.wins and not at_map else _map_in_effect(source.search, source.point)
        for method, candidate in of.items():
            assert candidate.search is not None
            for place, score in candidate.search.scores.items():
                if place != MAP:
                    row = {**setting(place, score, before), "objective": on_all(score, candidate.reference, overall)}
                    table.append(row)
                    if method == source.method and place == point:
                        best = row
    candidates = [described(found[method], overall, before) for method in CANDIDATES if method in found]
    gain, error = compared(winner.reference, winner.score)
    if winner is source and not winner.wins:
        gain, error = overall.value - best["objective"], None
    result = TuningResult(
        table, best, source is not None and source.at_edge and source.wins, name,
        map_objective=overall.value, map_wins=map_wins, gain=gain, gain_error=error, searched=True,
        method=winner.method, candidates=candidates, cost=contest.budget.cost,
    )  # fmt: skip
    temperature = found["temperature"].temperature if "temperature" in found else None
    return result, replace(_settings(best), method=winner.method, temperature=temperature)


def _best_of(candidates: Mapping[str, Candidate]) -> Candidate | None:
    """The candidate with a posterior whose gain over MAP is largest."""
    ranked = sorted(candidates.values(), key=lambda each: compared(each.reference, each.score)[0])
    return ranked[-1] if ranked else None


def _map_in_effect(search: Search | None, best: Point) -> Point:
    """A finite point on the ray from ``best`` to MAP whose objective is MAP's up to ``MAP_TOLERANCE``."""
    assert search is not None
    search.afford = None  # the same ratio: of linearised networks free, of draws a few points
    wanted = search.value(MAP)
    n, p = best
    tolerance = MAP_TOLERANCE * (1 + abs(wanted))
    # not below it either: a gain within the noise is no reason to keep the spread that it came from
    while (gap := abs(search.value((n, p)) - wanted)) > tolerance and n < 1e30:
        step = max(10.0, 2 * gap / tolerance) if math.isfinite(gap) else 10.0  # what a small spread does goes with 1/N
        n, p = n * step, p * step
    return n, p


def _result(
    search: Search,
    best: Point,
    at_edge: bool,
    points: Sequence[Point],
) -> tuple[TuningResult, Settings]:
    """What a grid gives; N counts data at the noise scale that all of its points have."""

    def row(point: Point) -> dict[str, Any]:
        score = search.scores[point]
        return {**setting(point, score, None), "objective": score.value}

    chosen, reference = row(best), search.scores.get(MAP)
    if reference is None:
        return TuningResult([row(point) for point in points], chosen, at_edge, search.name), _settings(chosen)
    gain, error = compared(reference, search.scores[best])
    found = TuningResult(
        [row(point) for point in points], chosen, at_edge, search.name,
        map_objective=reference.value, map_wins=not gain > 0, gain=gain, gain_error=error,
    )  # fmt: skip
    return found, _settings(chosen)


def _settings(row: Mapping[str, Any]) -> Settings:
    return Settings(row["n_data"], row["prior_precision"], row.get("noise"))
