"""E6: steps on the empirical Fisher do not converge, in one dimension.

``E(θ) = θ²/2``: one observation 0 of ``N(θ, 1)``. Its Fisher is 1 and its empirical Fisher ``F̄ = θ²``, so
``θ ← θ − α F̄^(−ξ) ∇E`` is ``θ ← (1 − α |θ|^(−2ξ)) θ``. Both curvatures come from the package at every step.

Source: Martens 2016, 5.6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

import laplace_kf as lk
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["STATEMENTS", "Config", "path", "run"]


@dataclass
class Config(Repeated):
    """Settings of E6; nothing is random.

    Args:
        steps: of every run.
        rate: α of the constant runs, and of the first step of the decaying ones (``α / k``).
        start: θ₀.
        exponents: the ξ.
    """

    repeats: int = 1
    steps: int = 100
    rate: float = 0.5
    start: float = 1.3
    exponents: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        require("steps", self.steps, self.steps >= 8, "at least 8")
        require("rate", self.rate, 0 < self.rate < 2, "between 0 and 2")
        require("start", self.start, self.start != 0, "other than 0")


STATEMENTS = (
    Statement("steps on the Fisher converge (largest |θ| of the last half)", "Fisher, constant", 0, 1e-9),
    Statement("at the rate |1 − α| (ratio of the measured one)", "rate over predicted", 1 - 1e-6, 1 + 1e-6),
    Statement("ξ = ½ with a constant rate does not converge", "ξ = 0.5, constant", 1e-3),
    Statement("ξ = ¾ with a constant rate does not converge", "ξ = 0.75, constant", 1e-3),
    Statement("ξ = 1 with a constant rate does not converge", "ξ = 1, constant", 1e-3),
    Statement("ξ = 1 does not converge with a decaying rate, either", "ξ = 1, decaying", 1e-3),
)


def path(estimator: str, power: float, rate: float, steps: int, start: float, decaying: bool) -> list[float]:
    """``θ_0 … θ_K`` on the curvature ``estimator`` (``"exact"`` or ``"empirical"``) to the ``power``.

    The walk ends early at 0, or where it overflows.
    """
    model = nn.Linear(1, 1, bias=False).double()
    data = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    found = [start]
    for k in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(found[-1])
        curvature = float(lk.curvature.estimate(model, "gaussian", data, "full", estimator).mean().dense())
        gradient = found[-1]
        found.append(found[-1] - rate / (k if decaying else 1) * gradient / curvature**power if curvature else 0.0)
        if found[-1] == 0 or abs(found[-1]) > 1e12:
            break
    return found


def run(config: Config) -> Report:
    """All runs, the largest ``|θ|`` of the last half of each, and the claims."""
    paths = {"Fisher, constant": path("exact", 1.0, config.rate, config.steps, config.start, False)}
    for power in config.exponents:
        for decaying, name in ((False, "constant"), (True, "decaying")):
            walked = path("empirical", power, config.rate, config.steps, config.start, decaying)
            paths[f"ξ = {power:g}, {name}"] = walked

    def measure(seed: int) -> Found:
        found = {name: max(abs(theta) for theta in walked[len(walked) // 2 :]) for name, walked in paths.items()}
        exact = paths["Fisher, constant"]
        return {**found, "rate over predicted": abs(exact[4] / exact[3]) / abs(1 - config.rate)}

    def pictures() -> Sequence[Picture]:
        curves = {n: (range(len(w)), [max(abs(theta), 1e-16) for theta in w]) for n, w in paths.items()}
        return [lines("paths", "|θ| of every run.", curves, ("step", "|θ|"), ("linear", "log"))]

    def tables(runs: Sequence[Found]) -> Sequence[Table]:
        rows = [(name, *(f"{abs(walked[k]):.2e}" if k < len(walked) else "" for k in (1, 10, 99)),
                 f"{runs[0][name]:.2e}")
                for name, walked in paths.items()]  # fmt: skip
        return [Table("|θ|", ("run", "step 1", "step 10", "step 99", "largest of the last half"), rows)]

    return judged(
        "E6: steps on the empirical Fisher do not converge",
        f"E(θ) = θ²/2 from θ = {config.start:g}, {config.steps} steps.",
        config,
        measure,
        [statement for statement in STATEMENTS if statement.metric in paths or "over" in statement.metric],
        size="Exact; the published size.",
        tables=tables,
        pictures=pictures,
    )
