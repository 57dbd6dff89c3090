"""What the autoencoder experiments make of their runs: tables, claims with numbers, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_kf.reports import plots
from laplace_kf.reports.html import Picture, Table

__all__ = [
    "PUBLISHED",
    "claims",
    "claims_rows",
    "claims_table",
    "grids",
    "metrics",
    "picture",
    "reached",
    "rows",
    "summary",
    "table",
]

Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[str, Run]]

PUBLISHED = {"curves": (0.11, 0.20), "mnist": (1.64, 2.78)}
"""Squared errors, training and test, of Hessian-free optimisation from random weights (Martens 2016, table 4.3)."""
PUBLISHED_NOTE = {
    name: " Published squared errors of Hessian-free optimisation after hours on a GPU: "
    f"{train} (training), {test} (test)."
    for name, (train, test) in PUBLISHED.items()
}

HEAD = ["method", "setting", "batch", "updates", "epochs", "training loss", "squared error: training", "test",
        "loss of the average", "its squared error: training", "test"]  # fmt: skip


def lower(row: Mapping[str, float]) -> float:
    """The smaller training loss of a checkpoint, iterate and average of the iterates (Martens 2016, 6.13)."""
    found = [row["loss"], row.get("averaged_loss", math.inf)]
    return min((value for value in found if math.isfinite(value)), default=math.inf)


def reached(run: Run, level: float, axis: str = "updates") -> float | None:
    """How many updates (``axis`` may be ``processor``, ``wall``, ``cases``) a run took to a training loss.

    Between two checkpoints the loss is taken as linear in the axis. None if the run never got there.
    """
    before: Mapping[str, float] | None = None
    for row in run["checkpoints"]:
        if lower(row) <= level:
            if before is None:
                return float(row[axis])
            share = (lower(before) - level) / (lower(before) - lower(row))
            return float(before[axis] + share * (row[axis] - before[axis]))
        before = row
    return None


def least(run: Run) -> float:
    """The training loss at a run's last checkpoint, on the watched images like the others."""
    return lower(run["checkpoints"][-1])


def at(run: Run, updates: float) -> float:
    """The training loss after so many updates, linear between checkpoints; the last one's beyond the end."""
    before = run["checkpoints"][0]
    for row in run["checkpoints"]:
        if row["updates"] >= updates:
            span = row["updates"] - before["updates"]
            share = (updates - before["updates"]) / span if span else 1.0
            return lower(before) + share * (lower(row) - lower(before))
        before = row
    return lower(before)


@dataclass(frozen=True)
class Claim:
    """A number out of the runs of two methods that must be in a range.

    Args:
        text: the claim.
        method: whose run it is about.
        other: the run that it is compared with.
        number: ``(run, other run) -> number``, None where there is none, which refutes the claim.
        unit: what the number is.
        low: the least that confirms it.
        high: the largest that confirms it.
    """

    text: str
    method: str
    other: str
    number: Callable[[Run, Run], float | None]
    unit: str
    low: float = -math.inf
    high: float = math.inf

    def judge(self, name: str, found: Mapping[str, Run]) -> dict[str, Any]:
        """The verdict on the runs of one problem."""
        value = self.number(found[self.method], found[self.other])
        holds = value is not None and self.low <= value <= self.high
        return {"problem": name, "claim": self.text, "method": self.method, "other": self.other, "value": value,
                "unit": self.unit, "verdict": "confirmed" if holds else "refuted"}  # fmt: skip


def _share(axis: str) -> Callable[[Run, Run], float | None]:
    """Part of the other run's updates (or seconds) after which a run reaches the other's final loss."""

    def number(run: Run, other: Run) -> float | None:
        there = reached(run, least(other), axis)
        return None if there is None else there / other["checkpoints"][-1][axis]

    return number


def _gain(run: Run, other: Run) -> float | None:
    """Updates that the other run needs per update of this one, to the lowest loss that both reach, minus 1."""
    level = max(least(run), least(other))
    here, there = reached(run, level), reached(other, level)
    return None if not here or there is None else there / here - 1


def _ahead(run: Run, other: Run) -> float | None:
    """Difference of the losses after as many updates as both made."""
    updates = min(run["checkpoints"][-1]["updates"], other["checkpoints"][-1]["updates"])
    return at(run, updates) - at(other, updates)


def _final(run: Run, other: Run) -> float | None:
    return least(run) - least(other)


PART = "of its updates"
FREE = ("Hessian-free", "Hessian-free, Kronecker")
CLAIMS = [
    *(Claim(f"{method} reaches {other}'s final training loss in at most 1/10 of its updates", method, other,
            _share("updates"), PART, high=0.1)
      for method in ("K-FAC", "K-FAC tridiagonal") for other in ("Adam", "NAG")),
    *(Claim(f"{method} reaches {other}'s final training loss in less {what} time", method, other, _share(axis),
            f"of its {what} seconds", high=1.0)
      for method, other in (("K-FAC", "Adam"), ("K-FAC", "NAG"), ("KFRA", "Adam"), *((m, "NAG") for m in FREE))
      for axis, what in (("processor", "processor"), ("wall", "wall"))),
    *(Claim(f"momentum is essential: {method} reaches the final loss without it in less than half the updates", method,
            f"{method}, no momentum", _share("updates"), PART, high=0.5)
      for method in ("K-FAC", "K-FAC tridiagonal", "K-FAC, growing batches")),
    Claim("without momentum K-FAC is not much faster than NAG", "K-FAC, no momentum", "NAG", _share("processor"),
          "of its processor seconds", low=0.5),
    Claim("tridiagonal: 25 to 40 % more progress per update", "K-FAC tridiagonal", "K-FAC", _gain,
          "more updates for block-diagonal", 0.25, 0.40),
    Claim("tridiagonal is ahead of block-diagonal after the same time", "K-FAC tridiagonal", "K-FAC", _final,
          "difference of the loss", high=0.0),
    Claim("KFRA is ahead of KFAC after the same updates (both without momentum, on the same batches)", "KFRA", "KFAC",
          _ahead, "difference of the loss", high=0.0),
    Claim("KFRA is ahead of KFAC after the same time", "KFRA", "KFAC", _final, "difference of the loss", high=0.0),
    *(Claim(f"{method}, not searched, is ahead of {other} over the published grid after the same time", method,
            f"{other}, published grid", _final, "difference of the loss", high=0.0)
      for method in ("K-FAC", "KFRA", "KFAC") for other in ("Adam", "NAG", "heavy ball", "SGD")),
    Claim("a Kronecker preconditioner helps Hessian-free", "Hessian-free, Kronecker", "Hessian-free", _final,
          "difference of the loss", high=0.0),
]  # fmt: skip


def claims(runs: Runs) -> list[dict[str, Any]]:
    """The verdicts on the runs that are there, problem by problem."""
    return [claim.judge(name, found) for name, found in runs.items() for claim in CLAIMS
            if claim.method in found and claim.other in found]  # fmt: skip


def _number(verdict: Mapping[str, Any]) -> str:
    """The number behind a verdict, without its unit."""
    if verdict["value"] is None:
        return "never reached"
    percent = verdict["unit"].startswith(("of ", "more"))
    return f"{100 * verdict['value']:.0f} %" if percent else f"{verdict['value']:+.3f}"


def claims_rows(verdicts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table with one row per claim and one column per problem."""
    problems = list(dict.fromkeys(v["problem"] for v in verdicts))
    units = {v["claim"]: v["unit"] for v in verdicts}
    said = {(v["claim"], v["problem"]): f"{v['verdict']}: {_number(v)}" for v in verdicts}
    cells = [[claim, unit, *(said.get((claim, p), "not run") for p in problems)] for claim, unit in units.items()]
    return ["claim", "number", *(problem.upper() for problem in problems)], cells


def claims_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """One row per claim."""
    note = "Losses are training losses on the watched images, the smaller one of iterate and average of the iterates."
    return Table("Claims", *claims_rows(verdicts), note, prose=True)


def metrics(runs: Runs) -> dict[str, Any]:
    """By problem and method, the last numbers on all images, and the checkpoints."""
    return {
        name: {method: {"setting": run["setting"], "batch": run["batch"], "floor": run["floor"],
                        "failure": run["failure"], "images": run["images"], "final": run["final"],
                        "checkpoints": [{key: float(f"{value:.6g}") for key, value in row.items()}
                                        for row in run["checkpoints"]]}
               for method, run in found.items()}
        for name, found in runs.items()
    }  # fmt: skip


def rows(found: Mapping[str, Run]) -> list[list[str]]:
    """The cells of the table of one problem, in the order of :data:`HEAD`."""
    out = []
    for method, run in sorted(found.items(), key=lambda entry: lower(entry[1]["final"])):
        final = run["final"]
        setting = ", ".join(f"{key} {value:g}" for key, value in run["setting"].items()) or "fixed"
        average = ["", "", ""] if "averaged_loss" not in final else [
            f"{final['averaged_loss']:.3f}", f"{final['averaged_squared']:.3f}", f"{final['averaged_test_squared']:.3f}"
        ]  # fmt: skip
        label = f"{method} (failed: {run['failure']})" if run["failure"] else method
        out.append([label, setting, str(run["batch"]), str(final["updates"]),
                    f"{final['cases'] / run['images'][0]:.1f}", f"{final['loss']:.3f}", f"{final['squared']:.3f}",
                    f"{final['test_squared']:.3f}", *average])  # fmt: skip
    return out


GRID_HEAD = ["method", "settings", "best: learning rate", "halved after", "training loss: best", "mean of the best 10",
             "mean of the best 20", "rate 2⁻¹⁰, never halved", "failed"]  # fmt: skip


def grids(pilots: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table of the searches over learning rates and schedules: the best, and what it owes to them.

    Args:
        pilots: by method, one entry for each setting: ``lr``, ``halved``, and ``loss``, None after a failure.
    """
    cells = []
    for method, points in pilots.items():
        if not any("halved" in point for point in points):
            continue
        done = sorted((p for p in points if p["loss"] is not None), key=lambda p: p["loss"])
        losses = [point["loss"] for point in done]
        best = ["", "", ""]
        if done:
            halved = "never" if done[0]["halved"] == 1 else f"{done[0]['halved']:.2%} of the run"
            best = [f"2^{math.log2(done[0]['lr']):.0f}", halved, f"{losses[0]:.3f}"]
        means = (f"{sum(losses[:count]) / count:.3f}" if len(losses) >= count else "" for count in (10, 20))
        usual = [f"{p['loss']:.3f}" for p in done if p["lr"] == 2.0**-10 and p["halved"] == 1]
        cells.append([method, str(len(points)), *best, *means, "".join(usual), str(len(points) - len(done))])
    return GRID_HEAD, cells


def note(name: str, found: Mapping[str, Run]) -> str:
    """What the columns of :func:`rows` are."""
    run = next(iter(found.values()))
    return (
        f"Cross-entropy and squared error, both summed over pixels, averaged over all {run['images'][0]} training or "
        f"{run['images'][1]} test images; no output can have a cross-entropy below {run['floor']:.3f}."
        + PUBLISHED_NOTE.get(name, "")
    )


def table(name: str, found: Mapping[str, Run]) -> Table:
    """One row per method, the lowest training loss first."""
    return Table(
        f"{name}, {found_budget(found):.0f} s of processor time a method", HEAD, rows(found), note(name, found)
    )


def found_budget(found: Mapping[str, Run]) -> float:
    """Seconds that every method had."""
    return float(next(iter(found.values()))["settings"]["budget"])


def summary(runs: Runs) -> str:
    """What was run, in one paragraph."""
    done = "; ".join(f"{name}: {len(found)} methods, {found_budget(found):.0f} s each" for name, found in runs.items())
    return (
        "Deep autoencoders with sigmoid units from one sparse initialisation, trained on the cross-entropy summed over "
        f"pixels. Every method had the same processor time on one thread ({done or 'nothing yet'}), without the time "
        "for evaluations. First-order methods were run with the best setting of a grid."
    )


def picture(name: str, found: Mapping[str, Run]) -> Picture:
    """Training loss above its floor by updates and by processor seconds, squared test error by processor seconds."""
    figure, axes = plots.panels(1, 3, width=4.4, height=4.4)
    styles = _styles(found)
    shown: list[tuple[str, str, Callable[[Mapping[str, float], float], float]]] = [
        ("updates", "training loss above its least value", lambda row, floor: lower(row) - floor),
        ("processor", "training loss above its least value", lambda row, floor: lower(row) - floor),
        ("processor", "squared test error", lambda row, floor: row["test_squared"]),
    ]
    for axis, (key, title, value) in zip(axes, shown, strict=True):
        for method, run in found.items():
            made = [(row[key], value(row, run["floor"])) for row in run["checkpoints"] if row["updates"]]
            drawn = [point for point in made if 0 < point[1] < math.inf]
            if drawn:
                axis.loglog(*zip(*drawn, strict=True), label=method, **styles[method])
        axis.tick_params(which="both", colors=plots.SOFT, labelsize=9)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.set_title(title, fontsize=10, color=plots.INK)
        axis.set_xlabel("updates" if key == "updates" else "processor seconds", fontsize=9, color=plots.SOFT)
    plots.legend_below(figure, columns=5)
    caption = (
        f"{name.upper()}; the least value of the loss is the entropy of the grey levels. Dashed: as the comma says."
    )
    return Picture(name, figure, caption)


PALETTE = ("#0b62a3", "#c23b22", "#1a9c74", "#8a63c9", "#e08e0b", "#4fb3d9", "#c8417a", "#7a8b22", "#6c7a89", "#9a6b4b")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 1, 1, 1)), (0, (2, 4)))


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour for the part before the comma, a dash for the rest."""
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(method.split(",")[0], []).append(method)
    return {
        method: {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.7}
        for number, members in enumerate(families.values())
        for place, method in enumerate(members)
    }
