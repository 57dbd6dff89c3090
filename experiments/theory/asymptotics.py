"""E29: the asymptotic error of stochastic second-order steps.

Steps ``θ ← θ − α_k B⁻¹ g`` with noisy gradients of a quadratic, of one and of ten dimensions: the excess under ``α_k
= 1/(k+1)`` against its ``1/k`` term for ``B = H`` and for ``B = λ_min I``, the excess of a constant rate, and the
average of the iterates against its bound.

Source: Martens 2016, 5.7, theorems 6 and 8; misprints: methods 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Repeated):
    """Settings of E29.

    Args:
        dimensions: of the larger problem.
        condition: of its Hessian.
        steps: of every run.
        repetitions: independent runs that are averaged.
        rate: constant α, times ``1 / λ_max``.
        offset: entries of the start of the runs with a constant rate.
    """

    dimensions: int = 10
    condition: float = 10.0
    steps: int = 1000
    repetitions: int = 4_000
    rate: float = 0.1
    offset: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("dimensions", self.dimensions, self.dimensions >= 2, "at least 2")
        require("condition", self.condition, self.condition > 1, "above 1")
        for name in ("steps", "repetitions"):
            require(name, getattr(self, name), getattr(self, name) >= 10, "at least 10")
        require("rate", self.rate, 0 < self.rate < 0.5, "between 0 and 1/2")


STATEMENTS = (
    Statement("B = H, one dimension: k times the excess is ½ tr(H⁻¹Σ) (ratio)", "B = H, 1-D", 0.95, 1.05, "1"),
    Statement("B = H, ten dimensions (ratio)", "B = H", 0.95, 1.05, "1"),
    Statement("B = λ_min I: k times the excess is the term of theorem 6 (ratio)", "B = λ_min I", 0.95, 1.05, "1"),
    Statement("second order has the smaller error (λ_min I over H)", "λ_min I over H", 1.0),
    Statement("a constant rate ends at α/4 tr(B⁻¹Σ), to first order (ratio)", "constant rate", 0.9, 1.1, "1"),
    Statement("the averaged iterates stay below the bound of theorem 8 (largest ratio)", "averaged over bound", 0, 1),
)  # fmt: skip


def run(config: Config) -> Report:
    """All ratios, and curves of ``k`` times the excess over the predicted term."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        size = config.dimensions
        basis = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64)).Q
        scales = torch.logspace(0, 1, size, base=config.condition, dtype=torch.float64)
        hessian = basis @ torch.diag(scales) @ basis.T
        noise = torch.randn(size, size, generator=rng, dtype=torch.float64)
        noise = noise @ noise.T / size
        eye = torch.eye(size, dtype=torch.float64)
        found: dict[str, float] = {}
        excess: dict[str, float] = {}
        one = torch.tensor([[2.0]], dtype=torch.float64)
        for name, h, b, s in (
            ("B = H, 1-D", one, one, one), ("B = H", hessian, hessian, noise), ("B = λ_min I", hessian, eye, noise)
        ):  # fmt: skip
            got = lk.diagnostics.convergence(h, b, s, steps=config.steps, repetitions=config.repetitions, generator=rng)
            ratio = got.excess / got.predicted
            tail = max(config.steps // 2, 1)
            found[name], excess[name] = float(ratio[tail:].mean()), float(got.excess[tail:].mean())
            curves.setdefault(name, (range(1, config.steps + 1), ratio.tolist()))
        found["λ_min I over H"] = excess["B = λ_min I"] / excess["B = H"]
        alpha, start = config.rate / config.condition, config.offset * torch.ones(size, dtype=torch.float64)
        got = lk.diagnostics.convergence(
            hessian, eye, noise, steps=10 * config.steps, repetitions=max(config.repetitions // 20, 10), start=start,
            rate=alpha, generator=rng,
        )  # fmt: skip
        found["constant rate"] = float((got.excess / got.predicted)[-5 * config.steps :].mean())
        found["averaged over bound"] = float((got.averaged / got.averaged_bound).max())
        return found

    def pictures() -> Sequence[Picture]:
        return [lines("ratio", "Excess over its 1/k term.", curves, ("k", "ratio"), ("log", "linear"))]

    return judged(
        "E29: asymptotic error of stochastic second-order steps",
        f"{config.repetitions} simulated runs of {config.steps} steps.",
        config,
        measure,
        STATEMENTS,
        size="Derived: the paper has theorems and no experiment.",
        pictures=pictures,
    )
