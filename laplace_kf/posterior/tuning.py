"""Choosing (N, λ) after training: a grid on validation data with common random numbers, or the evidence.

``Λ(c N, c λ) = c Λ(N, λ)`` for every structure and damping, so all grid points with one ratio ``λ / N`` share their
weight draws up to the factor ``1/√c``: a grid in equal steps needs one set of draws per ratio, not per point.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace_kf.batches import as_batches, check_finite, inputs_of, run, to_device
from laplace_kf.engine import preserved
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.likelihoods import Prediction
from laplace_kf.posterior.prior import positive
from laplace_kf.predictive import draw_seeds, outputs_at, shifted, weight_noise
from laplace_kf.registry import Registry

if TYPE_CHECKING:
    from laplace_kf.posterior.laplace import LaplacePosterior

__all__ = ["OBJECTIVES", "TuningResult", "tune"]

Objective = Callable[[Prediction, Any], "Tensor | float"]
OBJECTIVES: Registry[Objective] = Registry("tuning objective")


@OBJECTIVES.register("nll")
def negative_log_likelihood(prediction: Prediction, targets: Any) -> Tensor:
    """Mean negative log predictive density in nats, 0-dim."""
    return -prediction.log_prob(targets).mean()


@OBJECTIVES.register("brier")
def brier(prediction: Prediction, targets: Any) -> Tensor:
    """Mean squared distance between class probabilities ``(N, C)`` and the one-hot (or binary) targets, 0-dim."""
    probs = prediction.probs
    if targets.dtype == torch.long and targets.shape == probs.shape[:-1]:
        keep = targets >= 0
        wanted = torch.nn.functional.one_hot(targets.clamp_min(0), probs.shape[-1]).to(probs.dtype)
        return (probs - wanted).square().sum(-1)[keep].mean()
    return (probs - targets.to(probs.dtype)).square().sum(-1).mean()


@dataclass(frozen=True)
class TuningResult:
    """What a search over (N, λ) found.

    Attributes:
        table: one dict per grid point with ``n_data``, ``prior_precision`` and ``objective`` (lower is better).
        best: the row with the smallest objective; the posterior now has its values.
        at_edge: whether it lies on the edge of the grid.
        objective: name of the objective.
    """

    table: list[dict[str, float]]
    best: dict[str, float]
    at_edge: bool
    objective: str = field(default="nll")

    def __repr__(self) -> str:
        edge = ", on the edge of the grid" if self.at_edge else ""
        return (
            f"TuningResult({len(self.table)} points; best n_data={self.best['n_data']:.4g}, "
            f"prior_precision={self.best['prior_precision']:.4g}: {self.objective} {self.best['objective']:.4f}{edge})"
        )


def default_n_data(n: float) -> list[float]:
    """``N · 10^{-1 … 4}`` in half decades (methods 9.3)."""
    return [n * 10 ** (k / 2) for k in range(-2, 9)]


def default_prior_precision() -> list[float]:
    """``10^{-4 … 4}`` in half decades (methods 9.3)."""
    return [10 ** (k / 2) for k in range(-8, 9)]


def tune(
    posterior: LaplacePosterior,
    val: Iterable[Any] | tuple[Any, Tensor] | None,
    objective: str | Objective,
    method: str,
    n_data: Sequence[float] | None,
    prior_precision: Sequence[float] | None,
    samples: int,
    generator: torch.Generator | None,
    extend: int,
    progress: bool,
) -> TuningResult:
    """The search behind :meth:`LaplacePosterior.tune`; sets the posterior's (N, λ) only when it has succeeded.

    ``val`` is a loader or a pair ``(x (N, ...), y (N, ...))``.

    Objectives are means over examples: of a validation set of several batches, the mean over all its examples.
    """
    counts = _axis("n_data", default_n_data(posterior.counted_data) if n_data is None else n_data)
    priors = _axis("prior_precision", default_prior_precision() if prior_precision is None else prior_precision)
    name = objective if isinstance(objective, str) else getattr(objective, "__name__", "objective")
    if objective == "evidence":
        measure = _evidence(posterior)
    else:
        if val is None:
            raise ShapeMismatch('tune needs validation data for this objective; only objective="evidence" needs none')
        if isinstance(objective, str) and objective not in OBJECTIVES:
            raise UnknownName(OBJECTIVES.kind, objective, [*OBJECTIVES, "evidence"])
        score = OBJECTIVES[objective] if isinstance(objective, str) else objective
        measure = _validation(posterior, val, score, method, samples, generator)
    table: dict[tuple[float, float], float] = {}
    rounds = 0
    while True:
        missing = [(n, p) for n in counts for p in priors if (n, p) not in table]
        table.update(measure(missing, progress))
        if all(not math.isfinite(value) for value in table.values()):
            raise NonFinite(f"objective {name!r} is not finite at any of the {len(table)} grid points")
        best = min(table, key=lambda key: table[key] if math.isfinite(table[key]) else math.inf)
        edges = [(counts, best[0]), (priors, best[1])]
        beyond = [axis for axis, value in edges if len(axis) > 1 and value in (axis[0], axis[-1])]
        if not beyond or rounds >= extend:
            break
        rounds += 1
        for axis, value in edges:
            if len(axis) > 1 and value == axis[0]:
                axis.insert(0, axis[0] ** 2 / axis[1])
            elif len(axis) > 1 and value == axis[-1]:
                axis.append(axis[-1] ** 2 / axis[-2])
    rows = [{"n_data": n, "prior_precision": p, "objective": table[n, p]} for n in counts for p in priors]
    chosen = {"n_data": best[0], "prior_precision": best[1], "objective": table[best]}
    posterior.n_data, posterior.prior_precision = best
    if beyond:
        warnings.warn(
            f"the best {name} lies on the edge of the grid (n_data={best[0]:.4g} in [{counts[0]:.4g}, "
            f"{counts[-1]:.4g}], prior_precision={best[1]:.4g} in [{priors[0]:.4g}, {priors[-1]:.4g}]); widen the "
            "grid, or pass extend=k to extend it up to k times",
            stacklevel=3,
        )
    return TuningResult(rows, chosen, bool(beyond), name)


Measure = Callable[[Sequence[tuple[float, float]], bool], dict[tuple[float, float], float]]


def _axis(what: str, values: Iterable[float] | float) -> list[float]:
    """Grid values in increasing order, each once; one number is a grid of one."""
    found = sorted({positive(what, value) for value in (values if isinstance(values, Iterable) else [values])})
    if not found:
        raise ValueError(f"the grid for {what} is empty; leave it out for the default one")
    return found


def _evidence(posterior: LaplacePosterior) -> Measure:
    def measure(points: Sequence[tuple[float, float]], progress: bool) -> dict[tuple[float, float], float]:
        return {(n, p): -float(posterior.log_evidence_at(n, p)) for n, p in points}

    return measure


def _validation(
    posterior: LaplacePosterior,
    val: Iterable[Any] | tuple[Any, Tensor],
    score: Objective,
    method: str,
    samples: int,
    generator: torch.Generator | None,
) -> Measure:
    if method not in ("mc", "map"):
        raise IncompatiblePair(f'tune works with method="mc" or "map", got {method!r}')
    model, forward, likelihood = posterior.model, posterior.forward, posterior.likelihood
    seeds = draw_seeds(samples, generator)
    device = next(iter(posterior.mean.values())).device
    batches, sizes = [], []
    with preserved(model):
        for index, batch in enumerate(as_batches(val)):
            check_finite(batch, index, "the validation batch")
            batch = to_device(batch, device)
            with torch.no_grad():
                outputs, targets = run(model, batch, forward)
            likelihood.check(outputs, targets)
            batches.append((batch, targets))
            sizes.append(outputs.shape[0])
    if not sum(sizes):
        raise ShapeMismatch("the validation data are empty: no batch was yielded")

    def mean_score(per_batch: Sequence[Tensor]) -> float:
        total = 0.0
        for outputs, (_, targets), size in zip(per_batch, batches, sizes, strict=True):
            value = float(score(likelihood.predict(outputs), targets)) if torch.isfinite(outputs).all() else math.inf
            total += size * value
        return total / sum(sizes)

    def measure(points: Sequence[tuple[float, float]], progress: bool) -> dict[tuple[float, float], float]:
        found: dict[tuple[float, float], float] = {}
        groups: dict[float, list[tuple[float, float]]] = {}
        for n, p in points:
            groups.setdefault(float(f"{p / n:.9e}"), []).append((n, p))
        with preserved(model), tqdm(total=len(points), desc="tune", disable=not progress) as bar:
            for members in groups.values():
                base = members[0][0]
                precision = posterior.precision_at(*members[0])
                drawn: dict[tuple[float, float], list[list[Tensor]]] = {m: [[] for _ in batches] for m in members}
                for seed in seeds if method == "mc" else [0]:
                    noise = weight_noise(precision, seed) if method == "mc" else {}
                    for n, p in members:
                        weights = shifted(posterior.mean, noise, math.sqrt(base / n))
                        for k, (batch, _) in enumerate(batches):
                            with torch.no_grad():
                                drawn[n, p][k].append(outputs_at(model, forward, weights, inputs_of(batch, forward)))
                for point in members:
                    found[point] = mean_score([torch.stack(parts) for parts in drawn[point]])
                    bar.update()
        return found

    return measure
