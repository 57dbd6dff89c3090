"""Statements of the papers that one number decides, judged over repeated runs, and the report that they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.common.checks import require
from laplace_kf.reports import metrics
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["Repeated", "Statement", "judged"]

Found = Mapping[str, float]
"""What one seed found: numbers by name."""


@dataclass
class Repeated:
    """Settings that every experiment with statements has.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i``.
        repeats: number of seeds.
        threads: processor threads.
    """

    seed: int = 0
    repeats: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        require("repeats", self.repeats, self.repeats >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")


@dataclass(frozen=True)
class Statement:
    """A claim about one number: its mean over seeds lies between ``least`` and ``most``.

    Args:
        text: the claim.
        metric: name of the number.
        least, most: the range in which it is confirmed.
        published: the published number, as text; empty if the paper gives none.
        needs: name of a number that has to be positive in every run for the comparison to be a fair one.
        otherwise: why there is no comparison where it is not.
    """

    text: str
    metric: str
    least: float = float("-inf")
    most: float = float("inf")
    published: str = ""
    needs: str = ""
    otherwise: str = ""

    def judge(self, runs: Sequence[Found]) -> dict[str, Any]:
        """The verdict on the mean over runs, and in how many of them alone the claim holds."""
        values = [run[self.metric] for run in runs]
        mean = sum(values) / len(values)
        fair = not self.needs or all(run[self.needs] > 0 for run in runs)
        holds = self.least <= mean <= self.most  # a NaN is in no range
        verdict = ("confirmed" if holds else "refuted") if fair else "not comparable"
        return {
            "claim": self.text,
            "metric": self.metric,
            "value": metrics.mean_std([{"value": value} for value in values])["value"],
            "range": [self.least, self.most],
            "published": self.published,
            "verdict": verdict,
            "seeds": f"{sum(self.least <= value <= self.most for value in values)} of {len(values)}",
            "why": "" if fair else self.otherwise,
        }


def judged(
    title: str,
    summary: str,
    config: Repeated,
    measure: Callable[[int], Found],
    statements: Sequence[Statement],
    *,
    size: str,
    tables: Callable[[Sequence[Found]], Sequence[Table]] = lambda runs: [],
    pictures: Callable[[], Sequence[Picture]] = list,
    details: Mapping[str, Any] | None = None,
) -> Report:
    """Measures every seed, judges the statements, and reports.

    Args:
        title, summary: of the report.
        config: settings.
        measure: ``seed -> numbers``.
        statements: what is judged.
        size: how this run's size compares with the published one, a sentence.
        tables, pictures: made after the runs.
        details: further entries of ``result.json``.
    """
    seeds = [config.seed + i for i in range(config.repeats)]
    runs, seconds = [], {}
    for seed in seeds:
        start = time.perf_counter()
        runs.append(dict(measure(seed)))
        seconds[str(seed)] = time.perf_counter() - start
    verdicts = [statement.judge(runs) for statement in statements]
    counts = {word: sum(v["verdict"] == word for v in verdicts) for word in ("confirmed", "refuted", "not comparable")}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return Report(
        title=title,
        summary=f"{summary} {size} {len(verdicts)} claims: {told}; {len(seeds)} seed(s).",
        seed=config.seed,
        config=asdict(config),
        metrics={"found": metrics.mean_std(runs)},
        tables=[_claims(verdicts), *tables(runs)],
        pictures=list(pictures()),
        details={"seeds": seeds, "verdicts": verdicts, "size": size, "seconds": seconds, "stand_ins": [],
                 **(details or {})},
    )  # fmt: skip


def _claims(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [v["claim"], f"{v['value']['mean']:.4g} ± {v['value']['std']:.2g}", v["published"] or "-",
         v["verdict"] + (f": {v['why']}" if v["why"] else ""), v["seeds"]]
        for v in verdicts
    ]  # fmt: skip
    note = "Verdicts are on the mean over seeds; the last column says in how many seeds alone the claim holds."
    return Table("Claims", ["claim", "here", "published", "verdict", "seeds"], rows, note, prose=True)
