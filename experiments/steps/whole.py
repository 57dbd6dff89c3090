"""E17: alignment of whole updates with the full Gauss-Newton step (see :mod:`experiments.steps.alignment`)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.statements import Found, Statement, judged
from experiments.steps.alignment import UPDATES, AlignmentConfig, cosines
from laplace_kf.reports.html import Report, Table

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(AlignmentConfig):
    """Settings of E17."""


STATEMENTS = (
    Statement("KFRA is better aligned with the full step than KFAC, exact inverses (difference)", "exact inverse", 0),
    Statement("and with factored inverses", "factored", 0),
    Statement("the exact block-diagonal step is not always the best aligned one (best update minus it)",
              "best - block", 0),
    Statement("factored inverses are the better ones on MNIST (KFRA, mean difference)", "factored - exact", 0),
    Statement("all updates point to the side of the full step (smallest cosine)", "smallest", 0),
)  # fmt: skip


def run(config: Config) -> Report:
    """Cosines with the full step by update and step."""
    tables: list[Table] = []

    def measure(seed: int) -> Found:
        found = cosines(config, seed)
        names = ["block Gauss-Newton", *UPDATES]
        mean = {name: sum(at[name]["full"] for at in found) / len(found) for name in names}
        if not tables:
            rows = [(str((k + 1) * config.every), *(f"{at[name]['full']:.3f}" for name in names))
                    for k, at in enumerate(found)]  # fmt: skip
            tables.append(Table(f"Cosines with the full step, seed {seed}", ("step", *names), rows))
        return {
            **mean,
            "exact inverse": mean["KFRA, exact inverse"] - mean["KFAC, exact inverse"],
            "factored": mean["KFRA, factored"] - mean["KFAC, factored"],
            "best - block": max(max(at[name]["full"] for name in UPDATES) - at["block Gauss-Newton"]["full"]
                                for at in found),
            "factored - exact": mean["KFRA, factored"] - mean["KFRA, exact inverse"],
            "smallest": min(at[name]["full"] for at in found for name in names),
        }  # fmt: skip

    return judged(
        "E17: alignment of whole updates with the full Gauss-Newton step",
        f"{config.steps} steps of KFRA, compared every {config.every} on {config.batch} images, {config.cg_steps} CG "
        "steps.",
        config,
        measure,
        STATEMENTS,
        size=config.size(),
        tables=lambda runs: tables,
    )
