"""E32: ranks of Gauss-Newton and Fisher matrices against their bounds.

Small classifiers and regressions with more parameters than the examples can fill: the measured rank of the exact
matrix, of the sampled Fisher and of the empirical Fisher beside ``Σ rank H_L``, ``N·S`` and ``N``.

Source: Botev et al. 2017, appendix D; Botev 2020, 3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Report, Table

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Repeated):
    """Settings of E32.

    Args:
        counts: numbers of examples N.
        outputs: numbers of outputs.
        samples: numbers of drawn targets S of the sampled Fisher.
        hidden: hidden units.
        inputs: of the network.
    """

    counts: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20])
    outputs: list[int] = field(default_factory=lambda: [2, 5])
    samples: list[int] = field(default_factory=lambda: [1, 3])
    hidden: int = 12
    inputs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("counts", "outputs", "samples"):
            require(name, getattr(self, name), getattr(self, name) and min(getattr(self, name)) >= 1, "numbers from 1")
        require("outputs", self.outputs, min(self.outputs) >= 2, "numbers from 2")
        require("counts", self.counts, max(self.counts) <= 200, "at most 200")


STATEMENTS = (
    Statement("no exact matrix has a rank above Σ rank H_L (largest excess)", "exact over bound", most=0),
    Statement("softmax: no rank above N (C − 1) (largest excess)", "softmax over N(C-1)", most=0),
    Statement("the bound is met where parameters suffice (smallest share)", "share of the bound", 0.999),
    Statement("no sampled Fisher has a rank above N S (largest excess)", "sampled over N S", most=0),
    Statement("no empirical Fisher has a rank above N (largest excess)", "empirical over N", most=0),
)


def run(config: Config) -> Report:
    """All ranks; the table shows the first seed's."""
    shown: list[tuple[str, ...]] = []

    def measure(seed: int) -> Found:
        found = {"exact over bound": [], "softmax over N(C-1)": [], "share of the bound": [], "sampled over N S": [],
                 "empirical over N": []}  # type: dict[str, list[float]]  # fmt: skip
        rng = training.generator(seed)
        for outputs in config.outputs:
            with private_rng(seed):
                model = nn.Sequential(
                    nn.Linear(config.inputs, config.hidden), nn.Tanh(), nn.Linear(config.hidden, outputs)
                ).double()
            size = sum(p.numel() for p in model.parameters())
            for count in config.counts:
                x = torch.randn(count, config.inputs, generator=rng, dtype=torch.float64)
                labels = torch.randint(outputs, (count,), generator=rng)
                numbers = torch.randn(count, outputs, generator=rng, dtype=torch.float64)
                for likelihood, y in (("categorical", labels), ("gaussian", numbers)):
                    ranks = lk.diagnostics.ranks(model, likelihood, (x, y))
                    found["exact over bound"].append(ranks.measured - ranks.bound)
                    if likelihood == "categorical":
                        found["softmax over N(C-1)"].append(ranks.measured - min(size, count * (outputs - 1)))
                    if 2 * ranks.bound <= size:
                        found["share of the bound"].append(ranks.measured / ranks.bound)
                    empirical = _rank(model, likelihood, (x, y), "empirical", rng)
                    found["empirical over N"].append(empirical - count)
                    drawn = [_rank(model, likelihood, (x, y), "sampled", rng, samples=s) for s in config.samples]
                    found["sampled over N S"] += [r - count * s for r, s in zip(drawn, config.samples, strict=True)]
                    if seed == config.seed:
                        shown.append((likelihood, str(outputs), str(count), f"{ranks.measured} ({ranks.bound})",
                                      *(str(r) for r in drawn), str(empirical)))  # fmt: skip
        return {name: min(v) if name.startswith("share") else max(v) for name, v in found.items()}

    def tables(runs: Sequence[Found]) -> Sequence[Table]:
        head = ("likelihood", "outputs", "N", "exact (bound)", *(f"S = {s}" for s in config.samples), "empirical")
        return [Table(f"Ranks, seed {config.seed}", head, shown)]

    return judged(
        "E32: rank bounds",
        f"Networks of {config.inputs}-{config.hidden}-C tanh units.",
        config,
        measure,
        STATEMENTS,
        size="Derived: the papers have lemmas and no experiment.",
        tables=tables,
    )


def _rank(
    model: nn.Module,
    likelihood: str,
    data: tuple[torch.Tensor, torch.Tensor],
    estimator: str,
    rng: torch.Generator,
    **options: Any,
) -> int:
    matrix = lk.curvature.estimate(model, likelihood, data, "full", estimator, generator=rng, **options).mean().dense()
    values = torch.linalg.eigvalsh(matrix)
    return int((values > values[-1] * 1e-10).sum())  # squares of singular values: their rounding is 1e-16 of the top
