"""E11: progress of K-FAC per update against the size of the minibatch.

An autoencoder trained with minibatches of several sizes by K-FAC with and without momentum, and by Nesterov's
gradient. The measure is how many updates it takes to the loss that the smallest minibatch reaches in the end: if
``m`` times that number falls with ``m``, progress per update grows faster than ``m``.

Source: Martens 2016, 6.13, figure 6.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Statement, judged
from experiments.steps.problem import LIKELIHOOD, AutoencoderConfig, load, objective
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["STATEMENTS", "Config", "exponent", "run"]


@dataclass
class Config(AutoencoderConfig):
    """Settings of E11.

    Args:
        sizes: of the minibatches, growing.
        updates: of every run.
        lr: step size of Nesterov's gradient.
    """

    count: int = 2000
    sizes: list[int] = field(default_factory=lambda: [125, 500, 2000])
    updates: int = 60
    lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require("sizes", self.sizes, len(self.sizes) > 1 and self.sizes == sorted(self.sizes), "growing numbers")
        require("sizes", self.sizes, self.sizes[0] >= 1 and self.sizes[-1] <= self.count, f"from 1 to {self.count}")
        require("updates", self.updates, self.updates >= 4, "at least 4")
        require("lr", self.lr, self.lr > 0, "above 0")


METHODS = ("K-FAC", "K-FAC, no momentum", "NAG")
STATEMENTS = (
    Statement("progress of K-FAC per update grows faster than the minibatch (exponent)", "exponent, K-FAC", 1),
    Statement("without momentum as fast or slightly slower (exponent)", "exponent, K-FAC, no momentum", 0.5, 1.1),
    Statement("that of Nesterov's gradient much less (exponent)", "exponent, NAG", most=0.5),
    Statement("larger minibatches do more for K-FAC than for Nesterov's gradient (difference of exponents)",
              "K-FAC - NAG", 1e-9),
)  # fmt: skip


def exponent(sizes: Sequence[int], updates: Sequence[float]) -> float:
    """``p`` of ``updates ~ 1 / size^p``, by least squares on a log scale; finite counts only."""
    x, y = [math.log(size) for size in sizes], [-math.log(count) for count in updates]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def _updater(config: Config, name: str, model: nn.Module, rng: torch.Generator) -> Callable[[Tensor], object]:
    if name != "NAG":
        optimizer = lk.optim.kfac(
            model, LIKELIHOOD, l2=config.l2, search_start=True, momentum=name == "K-FAC", generator=rng
        )
        return lambda x: optimizer.step(x, x)
    first_order = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.l2)

    def update(x: Tensor) -> None:
        first_order.zero_grad()
        (nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)).backward()
        first_order.step()

    return update


def run(config: Config) -> Report:
    """Losses by update for every method and size, and exponents."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    tables: list[Table] = []

    def measure(seed: int) -> Found:
        numbers: dict[str, float] = {}
        rows = []
        for name in METHODS:
            losses: list[list[float]] = []
            for size in config.sizes:
                model, images = load(config, seed)
                rng = training.generator(seed)
                update = _updater(config, name, model, rng)
                found = [objective(model, images, config.l2)]
                while len(found) <= config.updates:
                    for part in images[torch.randperm(len(images), generator=rng)].split(size):
                        if len(part) == size and len(found) <= config.updates:
                            update(part)
                            found.append(objective(model, images, config.l2))
                losses.append(found)
                curves.setdefault(f"{name}, m = {size}", (range(len(found)), found))
            # the level that every size reaches: the worst of the lowest losses
            level = max(min(found) for found in losses)
            counts = [next(k for k, loss in enumerate(found) if loss <= level) for found in losses]
            numbers[f"exponent, {name}"] = exponent(config.sizes, [max(count, 1) for count in counts])
            for size, count, found in zip(config.sizes, counts, losses, strict=True):
                numbers[f"updates, {name}, m = {size}"], numbers[f"loss, {name}, m = {size}"] = count, min(found)
                rows.append((name, str(size), f"{min(found):.2f}", f"{level:.2f}", str(count), str(size * count)))
        numbers["K-FAC - NAG"] = numbers["exponent, K-FAC"] - numbers["exponent, NAG"]
        if not tables:
            head = ("method", "m", "lowest loss", "level", "updates to the level", "images to the level")
            tables.append(Table(f"Updates to a level that all sizes reach, seed {seed}", head, rows))
        return numbers

    def pictures() -> Sequence[Picture]:
        text = f"Training objective, seed {config.seed}."
        return [lines("losses", text, curves, ("update", "objective"), ("linear", "log"))]

    return judged(
        "E11: K-FAC progress against batch size",
        f"{config.updates} updates with minibatches of {', '.join(map(str, config.sizes))}.",
        config,
        measure,
        STATEMENTS,
        size=config.size(),
        tables=lambda runs: tables,
        pictures=pictures,
    )
