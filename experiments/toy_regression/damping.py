"""E34: factored against exact damping in a Kronecker posterior.

The network and data of E19. The thesis adds the prior to the factors, ``(√N A + √λ I) ⊗ (√N G + √λ I)``
("factored"); with balanced factors the surplus is smaller, and in the eigenbasis there is none ("exact"). How much
do predictions change, as derived and with ``(N, λ)`` tuned?

Source: Botev 2020, 5.1.1 (5.14); Martens 2016, 6.6.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.common import training
from experiments.common.checks import require
from experiments.common.statements import Found, Repeated, Statement, judged
from experiments.toy_regression import problem as toy
from experiments.toy_regression import run as network
from laplace_kf.likelihoods import Gaussian
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports.html import Report, Table

__all__ = ["STATEMENTS", "Config", "run"]

DAMPINGS = ("factored", "balanced", "exact")


@dataclass
class Config(Repeated):
    """Settings of E34.

    Args:
        points: training points, and as many validation points.
        width: of both hidden layers.
        prior_precision: ``λ``.
        restarts: initial weights from which the MAP estimate is sought.
        samples: Monte Carlo samples of a prediction.
        tune_samples: Monte Carlo samples per point of the grid.
        n_data_factors: grid of tuning, as multiples of the real ``N``.
        prior_precisions: grid of tuning for ``λ``.
        grid: points on ``|x| <= 6`` on which predictions are scored.
    """

    points: int = 20
    width: int = 7
    prior_precision: float = 1.0
    restarts: int = 3
    samples: int = 500
    tune_samples: int = 100
    n_data_factors: list[float] = field(default_factory=lambda: [0.1, 1.0, 10.0, 100.0, 1000.0])
    prior_precisions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    grid: int = 61

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points", "width", "restarts", "samples", "tune_samples"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("grid", self.grid, self.grid >= 13, "at least 13")


STATEMENTS = (
    Statement("factored damping is the largest: its log determinant against the exact one (difference)",
              "logdet, factored - exact", 0),
    Statement("balanced factors have a smaller surplus (difference)", "logdet, balanced - factored", most=0),
    Statement("so that factored posteriors are more certain (mean standard deviation over the exact one's, untuned)",
              "sd, factored over exact", 0, 1),
    Statement("tuned, factored and exact damping differ little in NLL (nats a point, factored - exact)",
              "NLL tuned, factored - exact", -0.1, 0.1),
    Statement("untuned they differ more (absolute differences, untuned - tuned)", "untuned - tuned", 0),
)  # fmt: skip


def run(config: Config) -> Report:
    """NLL on new points in the range of the data, by damping, untuned and tuned."""

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        settings = network.Config(width=config.width, prior_precision=config.prior_precision, restarts=config.restarts)
        train, val = toy.draw_points(config.points, rng), toy.draw_points(config.points, rng)
        x = torch.linspace(-toy.LIMIT, toy.LIMIT, config.grid, dtype=torch.float64)[:, None]
        y = x**3 + toy.NOISE * torch.randn(x.shape, generator=rng, dtype=torch.float64)
        inputs, targets = x / toy.INPUT_SCALE, y / toy.TARGET_SCALE
        likelihood = Gaussian(scale=toy.NOISE / toy.TARGET_SCALE)
        model = network.fit_network(settings, likelihood, train, seed)
        numbers: dict[str, float] = {}
        for damping in DAMPINGS:
            posterior = LaplacePosterior(
                model, likelihood, structure="kron", damping=damping, prior_precision=config.prior_precision
            ).fit(train)
            numbers[f"logdet, {damping}"] = float(posterior.gaussian.precision.logdet())
            found = _scored(posterior, config, inputs, targets, seed)
            numbers[f"NLL untuned, {damping}"], numbers[f"sd untuned, {damping}"] = found
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: it is in the result
                best = posterior.tune(
                    val, n_data=[factor * config.points for factor in config.n_data_factors],
                    prior_precision=config.prior_precisions, samples=config.tune_samples,
                    generator=training.generator(seed),
                )  # fmt: skip
            numbers[f"at edge, {damping}"] = float(best.at_edge)
            numbers[f"validation NLL, {damping}"] = float(best.best["objective"])
            numbers[f"NLL tuned, {damping}"], numbers[f"sd tuned, {damping}"] = _scored(
                posterior, config, inputs, targets, seed
            )
        numbers["logdet, factored - exact"] = numbers["logdet, factored"] - numbers["logdet, exact"]
        numbers["logdet, balanced - factored"] = numbers["logdet, balanced"] - numbers["logdet, factored"]
        numbers["sd, factored over exact"] = numbers["sd untuned, factored"] / numbers["sd untuned, exact"]
        gap = {
            state: numbers[f"NLL {state}, factored"] - numbers[f"NLL {state}, exact"] for state in ("untuned", "tuned")
        }
        numbers["NLL tuned, factored - exact"] = gap["tuned"]
        numbers["untuned - tuned"] = abs(gap["untuned"]) - abs(gap["tuned"])
        return numbers

    def tables(runs: Sequence[Found]) -> Sequence[Table]:
        keys = ("NLL untuned", "sd untuned", "NLL tuned", "sd tuned", "validation NLL")
        rows = [(d, *(f"{sum(run[f'{key}, {d}'] for run in runs) / len(runs):.3f}" for key in keys)) for d in DAMPINGS]
        note = "On |x| ≤ 4, means over seeds; NLL in nats a point in the scaled units, standard deviations epistemic."
        return [Table("Predictions", ("damping", *keys), rows, note)]

    return judged(
        "E34: factored against exact damping in the posterior",
        f"A 1-{config.width}-{config.width}-1 network on {config.points} points of y = x³.",
        config,
        measure,
        STATEMENTS,
        size="Derived: the thesis names the form and compares it with no other.",
        tables=tables,
    )


def _scored(
    posterior: LaplacePosterior, config: Config, inputs: Tensor, targets: Tensor, seed: int
) -> tuple[float, float]:
    """NLL per point and mean epistemic standard deviation where the data are."""
    prediction = posterior.predict(inputs, method="mc", samples=config.samples, generator=training.generator(seed))
    inside = (inputs.abs() <= toy.EDGE / toy.INPUT_SCALE)[:, 0]
    nll = -prediction.log_prob(targets)
    spread = prediction.epistemic_variance.sqrt()
    return float(nll[inside].mean()), float(spread.reshape(len(inputs), -1)[inside].mean())
