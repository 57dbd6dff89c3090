"""E26: accuracy on the first task, on the latest, and on average, against the multiplier.

The stream and the training are those of :mod:`experiments.continual.run`; here no multiplier is chosen, all are shown.

Source: the thesis on Gauss-Newton matrices, section 5.4.1, figure 5.8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.common.checks import require
from experiments.common.claims import verdict_table
from experiments.continual import report as continual_report
from experiments.continual import run as continual
from experiments.continual import settings
from experiments.continual.methods import LEARNERS
from experiments.continual.streams import STREAMS
from experiments.multiplier import report
from laplace_kf.reports.html import Report

__all__ = ["Config", "run"]

KRON, DIAG = "Kronecker online", "diagonal online"


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
            kept = {
                f"{name}, {one['strength']:g}": continual_report.numbers(one) for one in tried if not one["diverged"]
            }
            if not kept:
                raise FloatingPointError(f"{name} diverged at every strength tried; use a smaller lr or more decay")
            found.update(kept)
            found[f"{name}, best"] = max(kept.values(), key=lambda one: one["average"])
        runs.append(found)
    labels = [label for label in runs[0] if all(label in found for found in runs)]
    claims = [c.judge(runs) for c in report.claims(KRON, DIAG, config) if c.method in labels and c.other in labels]
    table = report.table(runs, labels, stream.measure)
    summary = (
        f"{len(given.tasks)} tasks, {config.repeats} seed(s), {config.epochs} epochs a task. "
        f"{continual_report.described(given.tasks, given.absent, given.remarks)} Best: by the average on the test data."
    )
    return Report(
        title=f"E26: the multiplier on {stream.title}",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={label: {k: [found[label][k] for found in runs] for k in runs[0][label]} for label in labels},
        tables=[table, *([verdict_table(claims)] if claims else [])],
        pictures=[report.picture(config, runs, labels, stream.measure)],
        details={"verdicts": claims, **continual_report.quoted(summary, [table])},
        device=config.device,
    )
