"""E10: what re-scaling and momentum do for K-FAC steps, against their damping.

An autoencoder after some steps of block-tridiagonal K-FAC; one more step is proposed with every γ, by both inverses:
as it is, re-scaled by the exact quadratic model, and re-scaled together with the last update (momentum).

Source: Martens 2016, 6.6.4, figure 6.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Statement, judged
from experiments.steps.problem import (
    LIKELIHOOD,
    AutoencoderConfig,
    coefficients,
    inverse,
    load,
    objective,
    slope,
    vector,
    weights_at,
)
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]

INVERSES = {"block-diagonal": "block_diagonal", "block-tridiagonal": "block_tridiagonal"}


@dataclass
class Config(AutoencoderConfig):
    """Settings of E10.

    Args:
        steps: of K-FAC before; published: 500.
        points: number of γ.
        least, largest: γ, equally far apart on a log scale.
    """

    steps: int = 60
    points: int = 15
    least: float = 1e-3
    largest: float = 1e2

    def __post_init__(self) -> None:
        super().__post_init__()
        require("steps", self.steps, self.steps >= 2, "at least 2")
        require("points", self.points, self.points >= 3, "at least 3")
        require("least", self.least, 0 < self.least < self.largest, "above 0 and below largest")


STATEMENTS = (
    Statement("raw steps only help with much damping: smallest helpful γ, raw over re-scaled (block-diagonal)",
              "helpful γ, block-diagonal", 3),
    Statement("and by the block-tridiagonal inverse", "helpful γ, block-tridiagonal", 3),
    Statement("re-scaled steps bring more: best improvement, re-scaled over raw (block-diagonal)",
              "best, block-diagonal", 1.2),
    Statement("and by the block-tridiagonal inverse", "best, block-tridiagonal", 1.2),
    Statement("their best γ is the smaller one: raw over re-scaled (block-diagonal)", "best γ, block-diagonal", 1.5),
    Statement("momentum adds to it: best improvement, with over without", "momentum, block-diagonal", 1),
)  # fmt: skip


def run(config: Config) -> Report:
    """Improvement of the objective by γ and kind of step."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    gammas = torch.logspace(0, 1, config.points, base=config.largest / config.least, dtype=torch.float64) * config.least

    def measure(seed: int) -> Found:
        model, images = load(config, seed)
        optimizer = lk.optim.kfac(
            model, LIKELIHOOD, l2=config.l2, search_start=True, inverse="block_tridiagonal",
            generator=training.generator(seed),
        )  # fmt: skip
        for _ in range(config.steps):
            before = vector(model)
            optimizer.step(images, images)
        at, last = vector(model), vector(model) - before
        gradient, start = slope(model, images, config.l2), objective(model, images, config.l2)
        damping = float(optimizer.diagnostics["tau"]) + config.l2
        statistics = optimizer.statistics
        assert statistics is not None

        def improvement(step: torch.Tensor) -> float:
            weights_at(model, at + step)
            found = start - objective(model, images, config.l2)
            weights_at(model, at)
            return found

        numbers: dict[str, float] = {"objective": start}
        for title, kind in INVERSES.items():
            raw, rescaled, moved = [], [], []
            for gamma in gammas.tolist():
                step = -inverse(statistics, gamma**2, "balanced", kind).solve(gradient)
                raw.append(improvement(step))
                (alpha,) = coefficients(model, images, gradient, [step], damping)
                rescaled.append(improvement(float(alpha) * step))
                alpha, mu = coefficients(model, images, gradient, [step, last], damping)
                moved.append(improvement(float(alpha) * step + float(mu) * last))
            for name, values in (("raw", raw), ("re-scaled", rescaled), ("re-scaled, momentum", moved)):
                curves.setdefault(f"{title}, {name}", (gammas.tolist(), values))
                numbers[f"{title}, {name}: best"] = max(values)
                numbers[f"{title}, {name}: best γ"] = float(gammas[values.index(max(values))])
                helpful = [gamma for gamma, value in zip(gammas.tolist(), values, strict=True) if value > 0]
                numbers[f"{title}, {name}: helpful γ"] = min(helpful, default=float("inf"))
            for what in ("helpful γ", "best γ"):
                numbers[f"{what}, {title}"] = numbers[f"{title}, raw: {what}"] / numbers[f"{title}, re-scaled: {what}"]
            numbers[f"best, {title}"] = max(rescaled) / max(raw)
            numbers[f"momentum, {title}"] = max(moved) / max(rescaled)
        return numbers

    def pictures() -> Sequence[Picture]:
        shown = {name: (x, [max(value, 0.0) for value in y]) for name, (x, y) in curves.items()}
        text = f"Improvement of the objective by one step (worse is drawn as 0), seed {config.seed}."
        return [lines("improvement", text, shown, ("γ", "improvement"), ("log", "linear"))]

    return judged(
        "E10: re-scaling and momentum of K-FAC against damping",
        f"An autoencoder after {config.steps} steps of block-tridiagonal K-FAC (published: 500), {config.points} γ.",
        config,
        measure,
        STATEMENTS,
        size=config.size(),
        pictures=pictures,
    )
