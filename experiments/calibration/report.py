"""What the calibration benchmark makes of its splits: comparisons, verdicts, tables and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from laplace_kf.reports import metrics, plots
from laplace_kf.reports.html import Picture, Table

__all__ = [
    "DROPOUT",
    "ENSEMBLE",
    "LINEARIZED",
    "MAP",
    "MIXTURE",
    "NAMES",
    "OURS",
    "PEERS",
    "PROBIT",
    "SCALED",
    "claims",
    "claims_table",
    "compare",
    "difference_table",
    "metrics_table",
    "paired",
    "picture",
    "summarise",
    "verdict",
]

MAP, SCALED, OURS = "MAP", "MAP, temperature", "laplace_kf"
PEERS = "laplace-torch, marglik", "laplace-torch, gridsearch"
LINEARIZED, PROBIT, MIXTURE = "laplace_kf, linearized", "laplace_kf, probit", "laplace_kf, mixture"
ENSEMBLE, DROPOUT = "deep ensemble", "MC dropout"
NAMES = (MAP, SCALED, OURS, LINEARIZED, PROBIT, MIXTURE, ENSEMBLE, DROPOUT, *PEERS)
"""The methods: the network itself, with one temperature on its logits, this package by default, linearised, by probit
and as a mixture of several networks, these networks as an ensemble, MC dropout with its own network, laplace-torch."""

NEGLIGIBLE = 1e-3
"""Nats below which a difference counts as none, whatever its standard error is."""

Split = Mapping[str, Any]
Found = Mapping[str, Sequence[Split]]


def paired(splits: Sequence[Split], method: str, other: str, metric: str = "nll") -> dict[str, Any] | None:
    """Difference of ``metric`` between two methods over the splits on which both succeeded; None if there is none.

    Returns:
        ``mean`` and its standard error ``se``, single ``values``, and the ``verdict`` (lower is better).
    """
    both = [split["metrics"] for split in splits if method in split["metrics"] and other in split["metrics"]]
    if not both:
        return None
    values = [found[method][metric] - found[other][metric] for found in both]
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean, "se": error, "values": values, "verdict": verdict(mean, error)}


def verdict(mean: float, error: float | None) -> str:
    """What a mean difference and its standard error say about a method; one split says nothing."""
    if error is None:
        return "one split only"
    limit = max(error, NEGLIGIBLE)
    if mean < -limit:
        return "better"
    return "worse" if mean > limit else "not worse"


def compare(found: Found) -> dict[str, dict[str, dict[str, Any] | None]]:
    """By set and method, the difference in test NLL to MAP (None where the method failed on every split)."""
    return {name: {method: paired(splits, method, MAP) for method in NAMES[1:]} for name, splits in found.items()}


def claims(found: Found) -> list[dict[str, Any]]:
    """ "Nowhere worse": the defaults against the others, and every other method against MAP."""
    others = [method for method in NAMES[1:] if method != OURS]
    pairs = [(OURS, other) for other in (MAP, SCALED, *PEERS)] + [(method, MAP) for method in others]
    pairs.append((MIXTURE, ENSEMBLE))
    judged = []
    for method, other in pairs:
        sets: dict[str, list[str]] = {}
        for name, splits in found.items():
            difference = paired(splits, method, other)
            sets.setdefault(difference["verdict"] if difference else "no result", []).append(name)
        complete = bool(found) and not {"one split only", "no result"} & set(sets)
        holds = "refuted" if "worse" in sets else "confirmed" if complete else "undecided"
        judged.append({"claim": f"{method}: on no set worse than {other}", "method": method, "other": other,
                       "sets": sets, "verdict": holds})  # fmt: skip
    return judged


def summarise(found: Found) -> dict[str, Any]:
    """By set and method, mean, deviation and values of every metric over the splits on which the method succeeded."""
    summary: dict[str, Any] = {}
    for name, splits in found.items():
        runs = {method: [s["metrics"][method] for s in splits if method in s["metrics"]] for method in NAMES}
        summary[name] = {method: metrics.mean_std(values) for method, values in runs.items() if values}
    return summary


def _signed(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    error = "" if difference["se"] is None else f" ± {difference['se']:.4f}"
    return f"{difference['mean']:+.4f}{error}"


def difference_rows(
    means: Mapping[str, float], comparisons: Mapping[str, Mapping[str, Mapping[str, Any] | None]]
) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of differences; ``means`` are MAP's NLL by set."""
    shown = [method for method in NAMES[1:] if any(found.get(method) for found in comparisons.values())]
    head = ["set", "MAP: NLL", *shown, f"{OURS} is"]
    rows = [
        [name, f"{means[name]:.3f}", *(_signed(found.get(method)) for method in shown),
         (found[OURS] or {"verdict": "–"})["verdict"]]
        for name, found in comparisons.items()
    ]  # fmt: skip
    return head, rows


def difference_table(found: Found, comparisons: Mapping[str, Mapping[str, dict[str, Any] | None]]) -> Table:
    """One row per set: MAP's test NLL and every method's difference to it."""
    means = {name: statistics.fmean(s["metrics"][MAP]["nll"] for s in splits) for name, splits in found.items()}
    head, rows = difference_rows(means, comparisons)
    note = (
        "Test NLL in nats, in original units; the columns after MAP's are differences to it: negative is better, ± "
        "standard error over splits. Better: below minus one standard error (0.001 at least); worse: above it; not "
        "worse: in between. –: not run, or failed; the settings say which."
    )
    return Table("Test NLL", head, rows, note)


def metrics_table(found: Found) -> Table:
    """Mean RMSE of regression sets, accuracy and calibration error of the others."""
    rows = []
    for name, methods in summarise(found).items():
        for key, scale in (("rmse", 1), ("accuracy", 100), ("ece", 100)):
            if key in methods[MAP]:
                label = key.upper() if scale == 1 else f"{'ECE' if key == 'ece' else key} %"
                cells = [f"{scale * methods[m][key]['mean']:.4g}" if m in methods else "–" for m in NAMES]
                rows.append([f"{name}: {label}", *cells])
    return Table("Other metrics", ["set", *NAMES], rows, "Means over splits.")


def claims_table(judged: Sequence[Mapping[str, Any]]) -> Table:
    """The verdicts over all sets."""
    rows = [[entry["claim"], *(str(len(entry["sets"].get(kind, []))) for kind in ("better", "not worse", "worse")),
             entry["verdict"]] for entry in judged]  # fmt: skip
    return Table("Claims", ["claim", "sets: better", "not worse", "worse", "verdict"], rows, prose=True)


def picture(comparisons: Mapping[str, Mapping[str, dict[str, Any] | None]]) -> Picture:
    """Differences to MAP with their standard errors, one row per set."""
    figure, (axis,) = plots.panels(1, 1, width=8.0, height=1.2 + 0.42 * len(comparisons))
    names = list(comparisons)
    for number, (method, marker) in enumerate(zip(NAMES[1:], "xos^vDP*<", strict=True)):
        points = [(row, comparisons[name][method]) for row, name in enumerate(names)]
        drawn = [(row + 0.08 * (number - 4), d["mean"], d["se"] or 0.0) for row, d in points if d is not None]
        if drawn:
            heights, means, errors = (list(values) for values in zip(*drawn, strict=True))
            shade = plots.colour(method, NAMES)  # a package's methods share it and differ by marker
            axis.errorbar(
                means, heights, xerr=errors, fmt=marker, markersize=5, linewidth=1.3, label=method, color=shade
            )
    axis.axvline(0, color=plots.INK, linewidth=1)
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("test NLL minus MAP's, nats (linear within ±0.01); left is better", fontsize=9, color=plots.SOFT)
    plots.legend_below(figure, columns=2)
    return Picture("differences", figure, "Difference in test NLL to the network itself, with one standard error.")
