"""What E4 found, as numbers by seed, tables, claims and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.common.claims import Claim, verdict_table
from laplace_kf.reports.html import Picture, Table

__all__ = ["cell", "claims", "metrics", "outcome_rows", "picture", "short", "tables"]

Found = Mapping[str, Any]
NEW, OLD = "structural", "Tikhonov"

CLAIMS = [
    Claim("structural damping solves at least as many problems", "solved", NEW, OLD, least=0.0),
    Claim("structural damping solves memorisation more often", "solved memorisation", NEW, OLD, least=1e-9),
]
SPEED = [
    Claim("it needs fewer iterations where both succeed", "iterations", NEW, OLD, most=0.0),
    Claim("it needs fewer sequences (thousands) where both succeed", "thousand sequences", NEW, OLD, most=0.0),
    Claim("it needs less processor time (s) where both succeed", "seconds", NEW, OLD, most=0.0),
]


def cell(one: Found) -> str:
    """Iterations and processor seconds of a run that succeeded, the last error of one that did not."""
    if one["solved"]:
        return f"{one['iterations']} ({_last(one['seconds']):.0f} s)"
    return f"fails ({100 * _last(one['errors']):.0f} % wrong)"


def _last(value: Any) -> float:
    """The last of a list, or the number itself."""
    return float(value[-1] if isinstance(value, list) else value)


def short(one: Found) -> dict[str, Any]:
    """A run without its curves."""
    last = {key: _last(one[key]) for key in ("errors", "losses", "taus", "seconds")}
    kept = {key: one[key] for key in ("seed", "problem", "length", "damping", "solved", "iterations", "sequences",
                                      "rejected")}  # fmt: skip
    return {**kept, **last, "cg_steps": sum(one["cg_steps"])}


def _grouped(found: Sequence[Found], *keys: str) -> dict[tuple[Any, ...], list[Found]]:
    out: dict[tuple[Any, ...], list[Found]] = {}
    for one in found:
        out.setdefault(tuple(one[key] for key in keys), []).append(one)
    return out


def metrics(found: Sequence[Found]) -> list[dict[str, dict[str, float]]]:
    """Numbers by seed and damping: shares solved, and geometric means over the problems that every damping solved.

    The means are left out for a seed on which there is no such problem.
    """
    out = []
    for runs in _grouped(found, "seed").values():
        cells = _grouped(runs, "problem", "length")
        shared = {key for key, ones in cells.items() if all(one["solved"] for one in ones)}
        numbers: dict[str, dict[str, float]] = {}
        for (damping,), own in _grouped(runs, "damping").items():
            row = {"solved": fmean(one["solved"] for one in own)}
            for (problem,), ones in _grouped(own, "problem").items():
                row[f"solved {problem}"] = fmean(one["solved"] for one in ones)
            both = [one for one in own if (one["problem"], one["length"]) in shared]
            if both:
                row["iterations"] = _geometric([one["iterations"] for one in both])
                row["thousand sequences"] = _geometric([one["sequences"] / 1000 for one in both])
                row["seconds"] = _geometric([_last(one["seconds"]) for one in both])
            numbers[damping] = row
        out.append(numbers)
    return out


def _geometric(values: Sequence[float]) -> float:
    return math.exp(fmean(math.log(max(value, 1e-9)) for value in values))


def claims(numbers: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Verdicts; on speed over the seeds with a problem that both solved, on memorisation if it was run."""
    if not any(row["solved"] for run in numbers for row in run.values()):
        return []  # nothing solved by either says nothing
    judged = []
    for claim in (*CLAIMS, *SPEED):
        runs = [run for run in numbers if claim.metric in run[claim.method]]
        if runs:
            judged.append(claim.judge(runs))
    return judged


def outcome_rows(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of outcomes, one row per problem, T and damping, one column per seed."""
    seeds = sorted({one["seed"] for one in found})
    rows = []
    for (problem, length, damping), ones in _grouped(found, "problem", "length", "damping").items():
        by_seed = {one["seed"]: one for one in ones}
        cells = [cell(by_seed[seed]) if seed in by_seed else "" for seed in seeds]
        rows.append([problem, str(length), damping, *cells, f"{sum(one['solved'] for one in ones)} of {len(ones)}"])
    rows.sort(key=lambda row: (row[0], int(row[1])))
    return ["problem", "T", "damping", *(f"seed {seed}" for seed in seeds), "solved"], rows


def tables(found: Sequence[Found], verdicts: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Outcomes, and the verdicts if there are any."""
    head, rows = outcome_rows(found)
    note = "Iterations (processor seconds) until less than 1 % of the test sequences are answered wrongly."
    outcome = Table("Iterations to success", head, rows, note, prose=True)
    return [outcome, *([verdict_table(verdicts)] if verdicts else [])]


def picture(found: Sequence[Found]) -> Picture:
    """Test error against iterations, one panel per problem and length, one line per run."""
    from matplotlib.figure import Figure

    problems, lengths = (list(dict.fromkeys(one[key] for one in found)) for key in ("problem", "length"))
    dampings = list(dict.fromkeys(one["damping"] for one in found))
    size = (1 + 2.6 * len(lengths), 0.6 + 2 * len(problems))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(problems), len(lengths), squeeze=False, sharey=True)
    for one in found:
        axes = grid[problems.index(one["problem"])][lengths.index(one["length"])]
        colour = f"C{dampings.index(one['damping'])}"
        percent = [100 * max(error, 1e-3) for error in one["errors"]]
        axes.plot(range(1, len(percent) + 1), percent, color=colour, linewidth=1)
        axes.plot(len(percent), percent[-1], color=colour, marker="o" if one["solved"] else "x", markersize=5)
    for i, problem in enumerate(problems):
        grid[i][0].set_ylabel(f"{problem}\nwrong test sequences (%)")
        for j, length in enumerate(lengths):
            grid[i][j].set(yscale="log", xscale="log", title=f"T = {length}" if i == 0 else "")
            grid[i][j].axhline(1, color="grey", linewidth=0.5)
    for axes in grid[-1]:
        axes.set_xlabel("iterations")
    for name in dampings:
        grid[0][0].plot([], [], color=f"C{dampings.index(name)}", label=f"{name} damping")
    grid[0][0].legend(fontsize="x-small")
    caption = "Wrong test sequences against iterations, a line per seed; a dot is a success, a cross a run cut off."
    return Picture("errors", figure, caption)
