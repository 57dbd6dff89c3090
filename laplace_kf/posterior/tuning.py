"""Choosing (N, λ) and the noise scale after training: on validation data, or by the evidence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.operators import CurvatureBlock
from laplace_kf.posterior.objectives import OBJECTIVES, Objective, OODContrast
from laplace_kf.posterior.prior import positive
from laplace_kf.posterior.search import Plane, Search, coarse_to_fine, compared, grid
from laplace_kf.posterior.validation import MAP, Measure, Point, Score, Validation

if TYPE_CHECKING:
    from laplace_kf.posterior.laplace import LaplacePosterior

__all__ = ["OBJECTIVES", "Options", "Settings", "TuningResult", "tune"]

CAUTION = 1.0, 0.5
"""Standard errors by which the default search discounts what a point gains over MAP, and over another point.

Settled, with the floor of the noise scale, on splits 5 to 12 of UCI tables, not on those of the published comparison.
"""
MAP_TOLERANCE = 1e-4
"""How far from MAP's objective, relative to 1 + |objective|, a point may be that is called MAP in effect."""


@dataclass(frozen=True)
class Options:
    """Arguments of :meth:`LaplacePosterior.tune` that are not grids or data; see there."""

    objective: str | Objective = "nll"
    method: str = "mc"
    samples: int = 20
    generator: torch.Generator | None = None
    extend: int = 0
    progress: bool = False
    noise: bool | None = None
    per_block: bool = False
    ood: Iterable[Any] | None = None
    max_examples: int | None = None


@dataclass(frozen=True)
class Settings:
    """What tuning decided: N, λ (one number, or numbers by name) and the noise scale (None: as it was)."""

    n_data: float
    prior_precision: float | dict[str, float]
    noise: float | None = None


@dataclass(frozen=True)
class TuningResult:
    """What a search over (N, λ) found.

    Attributes:
        table: one dict per point with ``n_data``, ``prior_precision`` and ``objective`` (lower is better), and
            ``noise`` where the noise scale was tuned.
        best: the row that the posterior now has the values of: the smallest objective of a grid; in the default search
            the one that beats MAP, and the others, beyond the noise of the validation set.
        at_edge: whether it lies on the edge of the grid, or at the limits of the default search.
        objective: name of the objective.
        map_objective: the objective of the trained weights alone (at their own best noise scale, where that is tuned);
            None for the evidence.
        map_wins: whether no point of the table beats it (in the default search: by more than one standard error). The
            default search then sets a point that is MAP in effect.
        gain: by how much the best point is better than MAP; None for the evidence.
        gain_error: standard error of ``gain`` over the validation examples, from paired differences; None where the
            objective is not a mean of scores by example.
        searched: whether this was the default search, not a grid.
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

    def __repr__(self) -> str:
        edge = ", at the edge of the search" if self.at_edge else ""
        return (
            f"TuningResult({len(self.table)} points; best {_shown(self.best)}: "
            f"{self.objective} {self.best['objective']:.4f}{edge}{', MAP wins' if self.map_wins else ''})"
        )

    def __str__(self) -> str:
        lines = [f"Tuned on {self.objective}, {len(self.table)} points:"]
        lines.append(f"  best  {self.best['objective']:.4f}  at {_shown(self.best)}")
        if self.map_objective is not None:
            lines.append(f"  MAP   {self.map_objective:.4f}")
        if self.gain is not None:
            error = "" if self.gain_error is None else f" ± {self.gain_error:.4f}"
            lines.append(f"  gain  {self.gain:.4f}{error}")
        if self.map_wins:
            lines.append("  No point tried beats the trained weights alone (MAP) beyond the noise.")
        if self.at_edge:
            lines.append("  The best point lies at the edge of the search.")
        return "\n".join(lines)

    def warn(self, stacklevel: int) -> None:
        """Warns of a best point on the edge and of a win of MAP, as from the caller ``stacklevel`` frames up."""
        if self.at_edge:
            warnings.warn(
                f"the best {self.objective} lies on the edge of the grid ({_shown(self.best)}); widen the grid, or "
                "pass extend=k to extend it up to k times",
                stacklevel=stacklevel + 1,
            )
        elif self.map_wins and self.searched:
            warnings.warn(
                f"no posterior tried beats the trained weights alone (MAP, {self.objective} {self.map_objective:.4f}) "
                f"beyond the noise of the validation data; set to {_shown(self.best)}, which is MAP in effect",
                stacklevel=stacklevel + 1,
            )


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


def tune(
    posterior: LaplacePosterior,
    val: Iterable[Any] | tuple[Any, Tensor] | None,
    n_data: Sequence[float] | None,
    prior_precision: Sequence[float] | None,
    options: Options,
) -> tuple[TuningResult, Settings]:
    """The search behind :meth:`LaplacePosterior.tune`, which sets what is returned; the posterior is only read.

    ``val`` is a loader or a pair ``(x (N, ...), y (N, ...))``. Objectives are means over examples: of a validation set
    of several batches, the mean over all its examples.
    """
    gridded = n_data is not None or prior_precision is not None
    counts = _axis("n_data", default_n_data(posterior.counted_data) if n_data is None else n_data)
    priors = _axis("prior_precision", default_prior_precision() if prior_precision is None else prior_precision)
    noise = _tunes_noise(posterior, options.noise, gridded)
    by_evidence = options.objective == "evidence"
    if options.per_block and (gridded or not by_evidence):
        raise IncompatiblePair('per_block=True needs objective="evidence" and no grids')
    if by_evidence and not gridded:
        return _by_evidence(posterior, noise, options.per_block)
    name = options.objective if isinstance(options.objective, str) else _name(options.objective)
    if by_evidence:
        if noise:
            raise IncompatiblePair('noise=True with objective="evidence" needs no grids; leave them out')
        search = Search(_evidence(posterior), name, options.progress)
        best, at_edge = grid(search, counts, priors, options.extend)
        return _result(search, best, at_edge, [(n, p) for n in counts for p in priors])
    if val is None:
        raise ShapeMismatch('tune needs validation data for this objective; only objective="evidence" needs none')
    validation = Validation(
        posterior, val, _objective(options), options.method, options.samples, options.generator,
        options.max_examples, noise, pairs=not gridded,
    )  # fmt: skip
    search = Search(validation, name, options.progress)
    if gridded:
        return _over_grid(search, validation, counts, priors, options.extend)
    return _default(posterior, search)


# ------------------------------------------------------------------------------------------------ arguments


def _axis(what: str, values: Iterable[float] | float) -> list[float]:
    """Grid values in increasing order, each once; one number is a grid of one."""
    found = sorted({positive(what, value) for value in (values if isinstance(values, Iterable) else [values])})
    if not found:
        raise ValueError(f"the grid for {what} is empty; leave it out for the default one")
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


def _tunes_noise(posterior: LaplacePosterior, asked: bool | None, gridded: bool) -> bool:
    """Whether to tune σ; by default where it was left at 1.0 and there are no grids."""
    likelihood = posterior.likelihood
    if asked is None:
        default = type(likelihood)().noise_scale if likelihood.noise_scale is not None else None
        fitted = posterior.fitted_noise.values()
        return not gridded and default is not None and all(value == default for value in fitted)
    if asked:
        likelihood.with_noise_scale(likelihood.noise_scale or 1.0)  # refuses where there is none
    return asked


# ------------------------------------------------------------------------------------------------ evidence


def _evidence(posterior: LaplacePosterior) -> Measure:
    def measure(points: Sequence[Point], progress: bool) -> dict[Point, Score]:
        return {(n, p): Score(-float(posterior.evidence(n, p).total.detach())) for n, p in points}

    return measure


def _by_evidence(posterior: LaplacePosterior, noise: bool, per_block: bool) -> tuple[TuningResult, Settings]:
    """The maximum over λ and the noise at the N that the posterior has: in N the evidence has no inner maximum."""
    model, n = posterior.evidence_model(), posterior.n_data
    blocks = len(model.curvature.entries)
    start = torch.ones(blocks if per_block else 1, dtype=torch.float64)
    path = model.maximise(n, start, posterior.likelihood, noise)
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
    search: Search, validation: Validation, counts: list[float], priors: list[float], extend: int
) -> tuple[TuningResult, Settings]:
    """The grid as it is given; a noise scale that is to be tuned is MAP's best at all of its points."""
    search.look([MAP])
    if validation.noise:
        validation.hold_noise(search.scores[MAP].noise)
    best, at_edge = grid(search, counts, priors, extend)
    return _result(search, best, at_edge, [(n, p) for n in counts for p in priors])


def _default(posterior: LaplacePosterior, search: Search) -> tuple[TuningResult, Settings]:
    """Coarse to fine, then the champion of all points, or MAP where nothing beats it beyond the noise.

    The noise is that of the validation set (:meth:`Search.champion`). Over many small data sets this choice loses to
    MAP on test data less often than the smallest objective does, and gains about as much.
    """
    search.look([MAP])
    sigma, before = search.scores[MAP].noise, posterior.likelihood.noise_scale
    scale = 1.0 if sigma is None or before is None else (before / sigma) ** 2
    best, at_edge = coarse_to_fine(search, _plane(posterior, scale))
    champion = search.champion(*CAUTION)
    map_wins = champion == MAP
    if map_wins:
        best = _map_in_effect(search, best)
    at_edge, best = at_edge and best == champion, best if map_wins else champion
    points = [point for point in search.scores if point != MAP]
    found, settings = _result(search, best, at_edge, points, before if sigma is not None else None)
    return replace(found, map_wins=map_wins, searched=True), settings


def _map_in_effect(search: Search, best: Point) -> Point:
    """A finite point on the ray from ``best`` to MAP whose objective is MAP's up to ``MAP_TOLERANCE``."""
    wanted = search.value(MAP)
    n, p = best
    # not below it either: a gain within the noise is no reason to keep the spread that it came from
    while abs(search.value((n, p)) - wanted) > MAP_TOLERANCE * (1 + abs(wanted)) and n < 1e30:
        n, p = n * 10, p * 10
    return n, p


def _plane(posterior: LaplacePosterior, scale: float) -> Plane:
    factor = posterior.precision_factor
    parts = [matrix.nodes() for _, matrix in posterior.curvature.entries if isinstance(matrix, CurvatureBlock)]
    values, weights = (torch.cat(each) for each in zip(*parts, strict=True))
    return Plane(factor * values, weights, scale)


def _result(
    search: Search,
    best: Point,
    at_edge: bool,
    points: Sequence[Point],
    before: float | None = None,
) -> tuple[TuningResult, Settings]:
    """The result; ``before`` is the noise scale that N is counted at where every point has its own."""

    def row(point: Point) -> dict[str, Any]:
        score = search.scores[point]
        # the curvature goes with 1/σ²: at another σ the same precision has another N
        n = point[0] if before is None or score.noise is None else point[0] * (score.noise / before) ** 2
        found = {"n_data": n, "prior_precision": point[1], "objective": score.value}
        return found if score.noise is None else {**found, "noise": score.noise}

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
