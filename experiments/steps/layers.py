"""E16: alignment of updates with the Gauss-Newton step of every layer (see :mod:`experiments.steps.alignment`)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.statements import Found, Statement, judged
from experiments.steps.alignment import UPDATES, AlignmentConfig, cosines
from laplace_kf.reports.html import Report, Table

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(AlignmentConfig):
    """Settings of E16."""


STATEMENTS = (
    Statement("KFRA is better aligned with the blocks than KFAC, exact inverses (mean difference)", "exact inverse", 0),
    Statement("and with factored inverses", "factored", 0),
    Statement("layers far from the output are aligned less (first over last layer, KFRA with exact inverse)",
              "first over last", 0, 1),
    Statement("layers at the bottleneck are aligned well (cosine, KFRA with exact inverse)", "bottleneck", 0.8),
    Statement("factored inverses are the better ones on MNIST (KFRA, mean difference)", "factored - exact", 0),
)  # fmt: skip


def run(config: Config) -> Report:
    """Mean cosines by update and layer."""
    tables: list[Table] = []

    def measure(seed: int) -> Found:
        found = cosines(config, seed)
        layers = [name for name in found[0]["KFRA, factored"] if name not in ("full", "blocks")]

        def mean(update: str, layer: str) -> float:
            return sum(at[update][layer] for at in found) / len(found)

        by_update = {name: sum(mean(name, layer) for layer in layers) / len(layers) for name in UPDATES}
        if not tables:
            rows = [(layer, *(f"{mean(name, layer):.3f}" for name in UPDATES)) for layer in layers]
            tables.append(Table(f"Cosines by layer, mean over {len(found)} comparisons, seed {seed}",
                                ("layer", *UPDATES), rows))  # fmt: skip
        middle = [mean("KFRA, exact inverse", layer) for layer in layers[len(layers) // 2 - 1 : len(layers) // 2 + 1]]
        return {
            **by_update,
            "exact inverse": by_update["KFRA, exact inverse"] - by_update["KFAC, exact inverse"],
            "factored": by_update["KFRA, factored"] - by_update["KFAC, factored"],
            "first over last": mean("KFRA, exact inverse", layers[0]) / mean("KFRA, exact inverse", layers[-1]),
            "bottleneck": sum(middle) / len(middle),
            "factored - exact": by_update["KFRA, factored"] - by_update["KFRA, exact inverse"],
        }

    return judged(
        "E16: per-layer alignment of updates with the block Gauss-Newton step",
        f"{config.steps} steps of KFRA, compared every {config.every} on {config.batch} images, {config.cg_steps} CG "
        "steps.",
        config,
        measure,
        STATEMENTS,
        size=config.size(),
        tables=lambda runs: tables,
    )
