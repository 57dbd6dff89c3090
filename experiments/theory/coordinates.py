"""E30: undamped Kronecker-factored steps see no coordinates.

A network and its twin in other coordinates (random ones, and those in which tanh units are logistic units) take the
same steps; the outputs stay together up to rounding, unless there is damping.

Source: Martens 2016, 6.10 and B.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Repeated):
    """Settings of E30.

    Args:
        steps: of the optimiser.
        count: examples, in one minibatch.
        inputs, hidden, outputs: widths; smaller than ``count``; with more outputs than hidden units no factor is
            nearly singular.
        damping: ζ of the damped run.
    """

    steps: int = 10
    count: int = 200
    inputs: int = 6
    hidden: int = 4
    outputs: int = 6
    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        widest = max(self.inputs, self.hidden, self.outputs) + 1
        require("count", self.count, self.count > 2 * widest, f"above {2 * widest}: twice the widest layer")
        require("steps", self.steps, self.steps >= 1, "at least 1")
        require("damping", self.damping, self.damping > 0, "above 0")


STATEMENTS = (
    Statement("random coordinates, block-diagonal: outputs stay together", "random, block_diagonal", 0, 1e-8),
    Statement("random coordinates, block-tridiagonal", "random, block_tridiagonal", 0, 1e-8),
    Statement("logistic in the place of tanh units, block-diagonal", "logistic, block_diagonal", 0, 1e-8),
    Statement("with damping they part", "damped", 1e-6),
    Statement("the undamped steps are steps (the loss falls, last over first)", "loss", 0, 0.9),
)


def run(config: Config) -> Report:
    """Largest differences of outputs over all steps."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        with private_rng(seed):
            model = nn.Sequential(
                nn.Linear(config.inputs, config.hidden), nn.Tanh(), nn.Linear(config.hidden, config.hidden), nn.Tanh(),
                nn.Linear(config.hidden, config.outputs),
            ).double()  # fmt: skip
        x = torch.randn(config.count, config.inputs, generator=rng, dtype=torch.float64)
        mixing = torch.randn(config.inputs, config.outputs, generator=rng, dtype=torch.float64)
        y = (x @ mixing).sin() + 0.1 * torch.randn(config.count, config.outputs, generator=rng, dtype=torch.float64)
        found: dict[str, float] = {}
        for name, coordinates, inverse, damping in (
            ("random, block_diagonal", "random", "block_diagonal", 0.0),
            ("random, block_tridiagonal", "random", "block_tridiagonal", 0.0),
            ("logistic, block_diagonal", "logistic", "block_diagonal", 0.0),
            ("damped", "random", "block_diagonal", config.damping),
        ):
            twin = lk.diagnostics.invariance(
                model, "gaussian", [(x, y)], config.steps, damping, rng, coordinates=coordinates, inverse=inverse
            )
            found[name] = twin.deviation
            if name == "random, block_diagonal":
                found["loss"] = float(twin.losses[-1] / twin.losses[0])
            curves.setdefault(name, (range(config.steps + 1), (twin.by_step + 1e-17).tolist()))
        return found

    def pictures() -> Sequence[Picture]:
        text = "Largest difference of outputs between the network and its twin."
        return [lines("twins", text, curves, ("step", "difference"), ("linear", "log"))]

    return judged(
        "E30: undamped Kronecker-factored steps see no coordinates",
        f"{config.inputs}-{config.hidden}-{config.hidden}-{config.outputs} tanh units, float64, {config.steps} steps.",
        config,
        measure,
        STATEMENTS,
        size="Derived: the paper has a theorem and no experiment.",
        pictures=pictures,
    )
