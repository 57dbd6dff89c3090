"""Claims of the papers as comparisons of two methods, and the verdict of repeated runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_kf.reports import metrics
from laplace_kf.reports.html import Table

__all__ = ["Claim", "verdict_table"]


@dataclass(frozen=True)
class Claim:
    """A claim about two methods: ``metric`` of ``method`` minus that of ``other``, per seed, must be in a range.

    ``other_metric`` is the metric of ``other``, if it is not the same one.
    """

    text: str
    metric: str
    method: str
    other: str
    least: float = float("-inf")
    most: float = float("inf")
    other_metric: str = ""

    def judge(self, runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
        """The verdict on the mean difference over seeds, with the numbers behind it."""
        value = [run[self.method][self.metric] for run in runs]
        reference = [run[self.other][self.other_metric or self.metric] for run in runs]
        summary = metrics.mean_std([
            {"value": v, "reference": r, "difference": v - r} for v, r in zip(value, reference, strict=True)
        ])  # fmt: skip
        difference = float(summary["difference"]["mean"])  # type: ignore[arg-type]
        holds = self.least <= difference <= self.most
        return {"claim": self.text, "metric": self.metric, "method": self.method, "other": self.other, **summary,
                "verdict": "confirmed" if holds else "refuted"}  # fmt: skip


def verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """What :meth:`Claim.judge` found, one row per claim."""
    rows = [
        [v["claim"], f"{v['value']['mean']:.4f}", f"{v['reference']['mean']:.4f}",
         f"{v['difference']['mean']:+.4f} ± {v['difference']['std']:.4f}", v["verdict"]]
        for v in verdicts
    ]  # fmt: skip
    note = "Verdicts are on the difference averaged over seeds; its spread is over seeds, paired."
    return Table("Claims", ["claim", "method", "compared with", "difference", "verdict"], rows, note, prose=True)
