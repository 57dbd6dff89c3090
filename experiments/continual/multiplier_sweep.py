"""E26: accuracy on the first task, on the latest, and on average, against the multiplier.

The stream and the training are those of :mod:`experiments.continual.run`; here no multiplier is chosen, all are shown.

Source: the thesis on Gauss-Newton matrices, section 5.4.1, figure 5.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.common.checks import require
from experiments.common.claims import Claim, verdict_table
from experiments.continual import report, settings
from experiments.continual import run as continual
from experiments.continual.methods import LEARNERS
from experiments.continual.streams import STREAMS
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["Config", "run"]

KRON, DIAG = "Kronecker online", "diagonal online"
SHOWN = {"first": "first task", "latest": "latest task", "average": "average"}


@dataclass
class Config(settings.Config):
    """Settings of E26: those of E25; the methods are those that have a multiplier, and all multipliers are shown."""

    methods: list[str] = field(default_factory=lambda: [KRON, DIAG])
    multipliers: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0, 30.0, 100.0])


def run(config: Config, folder: Path) -> Report:
    """Every method at every strength and seed; finished sequences in ``folder`` are used again.

    Raises:
        BadSetting: for a method without a strength.
    """
    continual.check_names(config)
    for name in config.methods:
        require(
            "methods",
            config.methods,
            LEARNERS[name].grid,
            f"names of methods with a strength to sweep ({name!r} has no strength)",
        )
    folder.mkdir(parents=True, exist_ok=True)
    stream = STREAMS[config.stream]
    runs: list[dict[str, dict[str, float]]] = []
    for seed in range(config.seed, config.seed + config.repeats):
        given = stream.tasks(config, seed)
        found = {}
        for name in config.methods:
            tried = continual.searched(config, name, given.tasks, seed, folder)
            kept = {f"{name}, {one['strength']:g}": report.numbers(one) for one in tried if not one["diverged"]}
            if not kept:
                raise FloatingPointError(f"{name} diverged at every strength tried; use a smaller lr or more decay")
            found.update(kept)
            found[f"{name}, best"] = max(kept.values(), key=lambda one: one["average"])
        runs.append(found)
    labels = [label for label in runs[0] if all(label in found for found in runs)]
    claims = [c.judge(runs) for c in _claims(config) if c.method in labels and c.other in labels]
    rows = []
    for label in labels:
        cells = [f"{stream.measure.scale * _mean(runs, label, key):.2f}" for key in SHOWN]
        rows.append([*label.rsplit(", ", 1), *cells])
    table = Table(f"Test {stream.measure.name} after the last task", ["method", "strength", *SHOWN.values()], rows)
    summary = (
        f"{len(given.tasks)} tasks, {config.repeats} seed(s), {config.epochs} epochs a task. "
        f"{report.described(given.tasks, given.absent, given.remarks)} Best: by the average on the test data."
    )
    return Report(
        title=f"E26: the multiplier on {stream.title}",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={label: {k: [found[label][k] for found in runs] for k in runs[0][label]} for label in labels},
        tables=[table, *([verdict_table(claims)] if claims else [])],
        pictures=[_picture(config, runs, labels)],
        details={"verdicts": claims, **report.quoted(summary, [table])},
        device=config.device,
    )


def _claims(config: Config) -> list[Claim]:
    low, high = (f"{KRON}, {pick(config.multipliers):g}" for pick in (min, max))
    best, other = f"{KRON}, best", f"{DIAG}, best"
    return [
        Claim("the smallest multiplier forgets: first task below latest", "first", low, low, most=0.0,
              other_metric="latest"),
        Claim("the largest reverses the order", "first", high, high, least=0.0, other_metric="latest"),
        Claim("a multiplier in between or the smallest is best on average", "average", best, high, least=0.0),
        *(Claim(f"Kronecker above diagonal, {text}", key, best, other, least=0.0) for key, text in SHOWN.items()),
    ]  # fmt: skip


def _mean(runs: Sequence[Mapping[str, Mapping[str, float]]], label: str, key: str) -> float:
    return sum(found[label][key] for found in runs) / len(runs)


def _picture(config: Config, runs: Sequence[Mapping[str, Mapping[str, float]]], labels: Sequence[str]) -> Picture:
    from matplotlib.figure import Figure

    measure = STREAMS[config.stream].measure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in zip(config.methods, ("tab:blue", "tab:orange", "tab:green", "tab:red") * 3, strict=False):
        grid = LEARNERS[name].strengths(config)
        for (key, text), style in zip(SHOWN.items(), ("--", ":", "-"), strict=True):
            values = [
                measure.scale * _mean(runs, f"{name}, {s:g}", key) if f"{name}, {s:g}" in labels else math.nan
                for s in grid
            ]
            axes.plot(grid, values, style, color=colour, marker="o", markersize=3, label=f"{name}: {text}")
    axes.set(xlabel="multiplier λ_c", ylabel=f"test {measure.name} after the last task", xscale="log")
    axes.legend(fontsize="small")
    return Picture("sweep", figure, "Accuracy on the first and the latest task, and the average, by multiplier.")
