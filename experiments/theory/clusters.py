"""E33: conjugate gradients find directions of high curvature first.

A quadratic whose curvatures lie in two clusters; the start is equally far from the minimum in all directions. After
every step of CG the share of the error that is left in each cluster is measured, in the loss and in the distance.

Source: Martens 2016, 4.7, figure 4.4 (one root near a large eigenvalue does little harm elsewhere, one near a small
eigenvalue much).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.optim.cg import Progress, conjugate_gradients
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "left", "run"]


@dataclass
class Config(Repeated):
    """Settings of E33.

    Args:
        size: directions of each cluster.
        ratio: of the high curvature to the low one.
        spread: relative width of a cluster.
        steps: of conjugate gradients.
    """

    size: int = 100
    ratio: float = 100.0
    spread: float = 0.3
    steps: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        require("size", self.size, self.size >= 2, "at least 2")
        require("ratio", self.ratio, self.ratio > 1, "above 1")
        require("spread", self.spread, 0 < self.spread < 1, "between 0 and 1")
        require("steps", self.steps, self.steps >= 4, "at least 4")


STATEMENTS = (
    Statement(
        "the distance in the high cluster falls to a tenth in fewer steps (ratio of steps)", "steps ratio", 0, 0.99
    ),
    Statement("by then most of the distance in the low cluster is left", "low left then", 0.5, 1.1),
    Statement("two distinct curvatures are solved in two steps", "two curvatures", 0, 1e-10),
)


def left(curvature: Tensor, start: Tensor, steps: int) -> Tensor:
    """``x_j − x*`` of CG after ``j = 0 … steps`` steps, ``(steps + 1, D)``, for diagonal curvature ``(D,)``."""
    target = -start  # CG starts at 0, so that the error of its start is `start`
    found = [start]
    for limit in range(1, steps + 1):
        run = conjugate_gradients(lambda p: curvature * p, curvature * target, limit=limit, progress=Progress(0.0))
        found.append(run.x - target)
    return torch.stack(found)


def run(config: Config) -> Report:
    """Errors by cluster and step."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        widths = 1 + config.spread * (2 * torch.rand(2, config.size, generator=rng, dtype=torch.float64) - 1)
        curvature = (widths * torch.tensor([[1.0], [config.ratio]], dtype=torch.float64)).flatten()
        start = torch.randn(2 * config.size, generator=rng, dtype=torch.float64)
        errors = left(curvature, start, config.steps).reshape(-1, 2, config.size)
        shares = errors.square().sum(-1) / errors[0].square().sum(-1)
        low, high = shares.T
        if not curves:
            curves.update(low=(range(len(low)), low.tolist()), high=(range(len(high)), high.tolist()))
        first = [int((part < 0.1).nonzero()[0]) if bool((part < 0.1).any()) else config.steps for part in (low, high)]
        two = left(torch.tensor([1.0, 1, config.ratio, config.ratio], dtype=torch.float64), start[:4], 2)[-1]
        return {
            "steps, low": first[0], "steps, high": first[1], "steps ratio": first[1] / first[0],
            "low left then": float(low[first[1]]), "two curvatures": float(two.norm() / start[:4].norm()),
        }  # fmt: skip

    def pictures() -> Sequence[Picture]:
        text = "Squared distance from the minimum in each cluster, as a share of the start's."
        return [lines("clusters", text, curves, ("step", "share left"), ("linear", "log"))]

    return judged(
        "E33: conjugate gradients find high curvature first",
        f"Two clusters of {config.size} curvatures, {config.ratio:g} to 1.",
        config,
        measure,
        STATEMENTS,
        size="Exact, of our own size: the paper shows a sketch.",
        pictures=pictures,
    )
