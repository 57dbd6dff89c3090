"""E3: the objective against the quadratic model along a run of conjugate gradients.

An autoencoder after some Hessian-free steps: on the way of one more CG run, the quadratic model falls all the time,
the objective does not, and it is lowest before the run ends by its own rule.

Source: Martens 2016, 4.6.7, figure 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Statement, judged
from experiments.steps.problem import LIKELIHOOD, AutoencoderConfig, load, objective, slope, vector, weights_at
from laplace_kf.optim.cg import Progress, conjugate_gradients
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(AutoencoderConfig):
    """Settings of E3.

    Args:
        steps: Hessian-free steps before.
        limit: of the CG run; published: 250.
        inner: of the CG runs of the steps before.
        share: of the damping τ of the steps that the run is made with: the figure is of a typical step, and damping
            decides how far a run may go.
    """

    images: str = "curves"
    steps: int = 15
    limit: int = 150
    inner: int = 30
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("steps", self.steps, self.steps >= 1, "at least 1")
        require("limit", self.limit, self.limit >= 12, "at least 12")
        require("inner", self.inner, self.inner >= 2, "at least 2")
        require("share", self.share, self.share > 0, "above 0")


STATEMENTS = (
    Statement("the quadratic model falls at every step (largest rise, relative)", "model rise", most=1e-6),
    Statement("the objective does not: it rises on the way (largest rise after its lowest, relative to the fall)",
              "objective rise", 1e-3),
    Statement("the objective is lowest before the run ends (share of the steps)", "lowest at", most=0.99),
)  # fmt: skip


def run(config: Config) -> Report:
    """Both values at kept steps of the run."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def measure(seed: int) -> Found:
        model, images = load(config, seed)
        optimizer = lk.optim.hessian_free(
            model, LIKELIHOOD, l2=config.l2, tau=1.0, recipe=lk.optim.Recipe(limit=config.inner),
            generator=training.generator(seed),
        )  # fmt: skip
        for _ in range(config.steps):
            optimizer.step(images, images)
        at, gradient = vector(model), slope(model, images, config.l2)
        damping = config.share * float(optimizer.diagnostics["tau"]) + config.l2
        start = objective(model, images, config.l2)

        def product(v: Tensor) -> Tensor:
            return lk.curvature.ggn_vector_product(model, LIKELIHOOD, (images, images), v) + damping * v

        found = conjugate_gradients(product, -gradient, limit=config.limit, progress=Progress(), spacing=1.15)
        steps, values = [0], [0.0]
        for step, x in found.kept:
            weights_at(model, at + x)
            steps.append(step)
            values.append(objective(model, images, config.l2) - start)
        weights_at(model, at)
        curves.setdefault("objective", (steps, values))
        curves.setdefault("quadratic model", (range(len(found.values)), found.values))
        lowest = values.index(min(values))
        fall = -min(found.values)
        rises = torch.tensor(found.values, dtype=torch.float64).diff()
        return {
            "steps": steps[-1], "tau": damping, "start": start, "objective at the end": values[-1],
            "objective, lowest": values[lowest], "model at the end": found.values[-1],
            "model rise": float(rises.max()) / fall,
            "objective rise": (max(values[lowest:]) - values[lowest]) / max(-values[lowest], 1e-30),
            "lowest at": steps[lowest] / steps[-1],
        }  # fmt: skip

    def pictures() -> Sequence[Picture]:
        text = f"Objective and quadratic model minus their values at the start, seed {config.seed}."
        return [lines("run", text, curves, ("CG step", "change"))]

    return judged(
        "E3: objective against quadratic model along conjugate gradients",
        f"One CG run of at most {config.limit} steps after {config.steps} Hessian-free steps.",
        config,
        measure,
        STATEMENTS,
        size=config.size(),
        pictures=pictures,
    )
