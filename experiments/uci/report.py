"""Tables and verdicts of the regression tables, with the published figures."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from laplace_kf.reports.html import Table

__all__ = ["DROPOUT", "ENSEMBLES", "conformal_rows", "conformal_table", "judged", "log_likelihood_table", "rows",
           "targets_table"]  # fmt: skip

_SETS = ("bostonHousing", "concrete", "energy", "kin8nm", "naval-propulsion-plant", "power-plant",
         "protein-tertiary-structure", "wine-quality-red", "yacht")  # fmt: skip
DROPOUT = dict(zip(_SETS, (-2.40, -2.93, -1.21, 1.14, 4.45, -2.80, -2.87, -0.93, -1.25), strict=True))
"""Gal's MC dropout, one hidden layer, ten times the epochs (the README of github.com/yaringal/DropoutUncertaintyExps).

Test log likelihood. The README was not at hand; the nine figures were checked against a table that quotes them.
"""
ENSEMBLES = dict(zip(_SETS, (-2.41, -3.06, -1.38, 1.20, 5.63, -2.79, -2.83, -0.94, -1.18), strict=True))
"""Deep ensembles of five: Lakshminarayanan, Pritzel and Blundell 2017, table 1 (the signs turned; checked there)."""
METHODS = ("MAP", "laplace_kf", "linearized, full", "deep ensemble", "mixture")
Found = Mapping[str, Sequence[Mapping[str, Any]]]


def mean(splits: Sequence[Mapping[str, Any]], method: str) -> tuple[float, float]:
    """Mean test log likelihood and its standard error over splits (0 for one split)."""
    return _mean([split["log likelihood"][method] for split in splits])


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (0 for one value, NaN where one is infinite: a density of zero at a test row)."""
    if not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _shown(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error; one value has none."""
    middle, error = _mean(values)
    if not math.isfinite(middle):
        return f"{middle} ({sum(not math.isfinite(value) for value in values)} of {len(values)})"
    return f"{middle:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{middle:.{digits}f}"


def rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: mean test log likelihood by table and method, beside published figures."""
    body = []
    for name, splits in found.items():
        cells = [_shown([split["log likelihood"][method] for split in splits], 3) for method in METHODS]
        heads = ", ".join(f"{kind} {count}" for kind, count in Counter(s["head"] for s in splits).most_common())
        body.append([name, str(len(splits)), *cells, f"{DROPOUT[name]:.2f}", f"{ENSEMBLES[name]:.2f}", heads])
    return ["table", "splits", *METHODS, "MC dropout, published", "deep ensemble, published", "heads chosen"], body


def log_likelihood_table(found: Found) -> Table:
    """Mean test log likelihood, nats, original units; higher is better."""
    note = (
        "Test log likelihood in nats, original units, mean ± standard error over splits; higher is better. Linearized, "
        "full: one network, dense Gauss-Newton matrix. Published: Gal's MC dropout (training ten times as long) "
        "and Lakshminarayanan et al. 2017 (40 epochs), means over all 20 splits (5 of protein); of fewer splits here "
        "they are only roughly comparable."
    )
    return Table("Test log likelihood", *rows(found), note)


def conformal(splits: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over splits; widths only of those on which they are finite."""
    every = [split["conformal"] for split in splits]
    usable = [each for each in every if math.isfinite(each["width"])] or every
    return {
        key: statistics.fmean(each[key] for each in (usable if key.endswith("width") else every)) for key in every[0]
    }


def conformal_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: coverage and relative width of 90 % intervals by table."""
    body = []
    for name, splits in found.items():
        c = conformal(splits)
        covered = [
            _shown([100 * split["conformal"][key] for split in splits], 2) for key in ("coverage", "MAP coverage")
        ]
        widths = [f"{c['width']:.4f}", f"{c['MAP width']:.4f}", f"{c['width'] / c['MAP width']:.3f}"]
        body.append([name, str(len(splits)), *covered, *widths])
    return ["table", "splits", "coverage %", "on MAP: coverage %", "width", "on MAP: width", "ratio"], body


def conformal_table(found: Found) -> Table:
    """Split-conformal 90 % intervals of the posterior and of the network's residuals."""
    note = (
        "Means over splits, with standard errors; widths in standard deviations of the target. The calibrating rows "
        "are in no choice: not in that of head and weight decay, nor in the posterior's tuning."
    )
    return Table("Conformal 90 % intervals", *conformal_rows(found), note)


def judged(found: Found) -> list[dict[str, Any]]:
    """How many tables each comparison holds on."""

    def count(text: str, least: int, won: Mapping[str, bool]) -> dict[str, Any]:
        wins = [name for name, holds in won.items() if holds]
        verdict = "undecided" if len(won) < len(_SETS) else "confirmed" if len(wins) >= least else "refuted"
        lost = [name for name in won if name not in wins]
        return {"claim": text, "sets": wins, "lost": lost, "least": least, "verdict": verdict}

    best = {name: {method: mean(splits, method)[0] for method in METHODS} for name, splits in found.items()}
    intervals = {name: conformal(splits) for name, splits in found.items()}
    return [
        count("mixture of 5 above published MC dropout", 9, {n: b["mixture"] > DROPOUT[n] for n, b in best.items()}),
        count("mixture of 5 above published deep ensembles", 7,
              {n: b["mixture"] > ENSEMBLES[n] for n, b in best.items()}),
        count("mixture of 5 above the deep ensemble of the same networks", 7,
              {n: b["mixture"] > b["deep ensemble"] for n, b in best.items()}),
        count("default, one network, above published MC dropout", 4,
              {n: b["laplace_kf"] > DROPOUT[n] for n, b in best.items()}),
        count("default, one network, not below MAP", 9, {n: b["laplace_kf"] >= b["MAP"] for n, b in best.items()}),
        count("conformal coverage within 90 ± 1.5 %", 9,
              {n: abs(c["coverage"] - 0.9) <= 0.015 for n, c in intervals.items()}),
        count("conformal intervals narrower than on MAP", 6,
              {n: c["width"] < c["MAP width"] for n, c in intervals.items()}),
    ]  # fmt: skip


def targets_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """One row per claim."""
    body = [[v["claim"], str(len(v["sets"])), str(v["least"]), ", ".join(v["lost"]) or "none", v["verdict"]]
            for v in verdicts]  # fmt: skip
    return Table("Claims", ["claim", "tables", "wanted", "lost on", "verdict"], body, "", prose=True)
