"""E18: Fisher against Gauss-Newton where they differ: a mixture of two classifiers of odd and even digits.

The likelihood ``π Bern(s₂) + (1 − π) Bern(s₃)`` of three outputs is of no natural exponential family. KFAC draws
from the Fisher; KFLR and KFRA take the Gauss-Newton matrix, whose output curvature is made positive semi-definite by
clipping; Adam has a grid of rates.

Source: Botev 2020, 4.5.3, figure 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.likelihoods import BernoulliMixture
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Repeated):
    """Settings of E18.

    Args:
        count: training images; published: 60,000.
        side: of the images, scaled down from 28.
        widths: of the hidden layers; published: 1000, 500, 250, 30.
        batch: images of an update; published: 1000.
        updates: of the second-order methods; published: 5000.
        adam_updates: of Adam; published: 40,000.
        rates: grid of Adam.
        l2: coefficient of the regulariser.
        treatments: further treatments of the output curvature of KFLR.
    """

    count: int = 2000
    side: int = 14
    widths: list[int] = field(default_factory=lambda: [60, 30, 10])
    batch: int = 500
    updates: int = 60
    adam_updates: int = 480
    rates: list[float] = field(default_factory=lambda: [3e-2, 1e-2, 3e-3, 1e-3])
    l2: float = 1e-5
    treatments: list[str] = field(default_factory=lambda: ["em", "fisher"])

    def __post_init__(self) -> None:
        super().__post_init__()
        require("count", self.count, 1 <= self.batch <= self.count <= 60_000, "from batch to 60000")
        for name in ("updates", "adam_updates"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("widths", "rates"):
            require(name, getattr(self, name), getattr(self, name) and min(getattr(self, name)) > 0, "above 0")


SECOND = ("KFAC", "KFLR", "KFRA")
STATEMENTS = (
    Statement("second-order methods are faster per update: objective after as many, Adam over the worst of them",
              "Adam over worst, same updates", 1),
    Statement("KFAC and KFLR are almost the same (ratio of the objectives' distances on a log scale, in nats)",
              "|log KFAC - log KFLR|", 0, 0.5),
    Statement("Adam ends lower, with its many updates (worst of the others over Adam)", "worst over Adam, end", 1),
    Statement("all end with a low cross-entropy (largest, in nats)", "largest, end", 0, 0.05, "about 1e-8"),
)  # fmt: skip


def run(config: Config) -> Report:
    """Training objectives by update."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def measure(seed: int) -> Found:
        x, y = data.images("mnist", "train")
        pixels = x[: config.count].reshape(-1, 1, 28, 28)
        x = nn.functional.interpolate(pixels, size=config.side, mode="area").flatten(1)
        odd = (y[: config.count] % 2).to(x)
        likelihood = BernoulliMixture()

        def network() -> nn.Sequential:
            widths = [config.side**2, *config.widths, 3]
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
            model = nn.Sequential(*layers[:-1])
            lk.optim.glorot_init_(model, generator=training.generator(seed))
            return model

        @torch.no_grad()
        def loss(model: nn.Module) -> float:
            return -float(likelihood.log_prob(model(x), odd).sum()) / len(x)

        def trained(make: Callable[[nn.Module], Callable[[Tensor, Tensor], object]], updates: int) -> list[float]:
            model = network()
            update = make(model)
            batches = training.Batches(x, odd, config.batch, training.generator(seed))
            found = [loss(model)]
            while len(found) <= updates:
                for part in batches:
                    if len(part[0]) == config.batch and len(found) <= updates:
                        update(*part)
                        found.append(loss(model))
            return found

        def second(**settings: Any) -> Callable[[nn.Module], Callable[[Tensor, Tensor], object]]:
            rule = settings.pop("likelihood", likelihood)

            def make(model: nn.Module) -> Callable[[Tensor, Tensor], object]:
                return lk.optim.GaussNewton(
                    model,
                    rule,
                    l2=config.l2,
                    search_start=True,
                    generator=training.generator(seed),
                    **settings,
                ).step

            return make

        def adam(rate: float) -> Callable[[nn.Module], Callable[[Tensor, Tensor], object]]:
            def make(model: nn.Module) -> Callable[[Tensor, Tensor], object]:
                optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=config.l2)

                def update(inputs: Tensor, targets: Tensor) -> None:
                    optimizer.zero_grad()
                    (-likelihood.log_prob(model(inputs), targets).sum() / len(inputs)).backward()
                    optimizer.step()

                return update

            return make

        runs = {
            "KFAC": trained(second(estimator="sampled"), config.updates),
            "KFLR": trained(second(estimator="exact"), config.updates),
            "KFRA": trained(second(estimator="recursive"), config.updates),
            **{f"KFLR, {name}": trained(second(estimator="exact", likelihood=BernoulliMixture(name)), config.updates)
               for name in config.treatments},
        }  # fmt: skip
        grid = {rate: trained(adam(rate), config.adam_updates) for rate in config.rates}
        best = min(grid, key=lambda rate: grid[rate][-1])
        runs["Adam"] = grid[best]
        for name, found in runs.items():
            curves.setdefault(name, (range(len(found)), [max(value, 1e-12) for value in found]))
        end = {name: max(found[-1], 1e-30) for name, found in runs.items()}
        worst = max(end[name] for name in SECOND)
        quick = min(found[min(config.updates, len(found) - 1)] for found in grid.values())
        return {
            **{f"objective, {name}": value for name, value in end.items()}, "rate of Adam": best,
            "Adam over worst, same updates": quick / worst,
            "|log KFAC - log KFLR|": abs(math.log(end["KFAC"] / end["KFLR"])),
            "worst over Adam, end": worst / end["Adam"], "largest, end": max(worst, end["Adam"]),
        }  # fmt: skip

    def pictures() -> Sequence[Picture]:
        text = f"Training objective, Adam at its best rate, seed {config.seed}."
        return [lines("objective", text, curves, ("update", "nats"), ("log", "log"))]

    shape = "-".join(str(width) for width in [config.side**2, *config.widths, 3])
    return judged(
        "E18: a mixture of classifiers, Gauss-Newton against Fisher",
        f"{shape} tanh units, odd against even on {config.count} MNIST images.",
        config,
        measure,
        STATEMENTS,
        size=f"Not the published size (784-1000-500-250-30-3, 60000 images, 5000 and 40000 updates): "
        f"{config.updates} updates of {config.batch} images, Adam {config.adam_updates}.",
        pictures=pictures,
    )
