"""The optimisers of the autoencoder experiments: one row each, with the grids of the first-order ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import optim
from laplace_kf.optim.base import SecondOrder
from laplace_kf.registry import Registry

__all__ = ["LIKELIHOOD", "OPTIMISERS", "STANDARD", "Method", "Setting", "Trainer"]

LIKELIHOOD = "bernoulli"
FEW = 250
"""Images per update of small problems."""
EXTRA = 3  # values by which a grid may grow

Setting = Mapping[str, Any]
Trainer = Callable[[Tensor, float], float]
"""``(images (N, 784), share of the run that is over) -> loss`` before the update that it makes."""
PARTS = 10**6
"""Parts of a run that a schedule tells apart: how many updates it will have is not known before its end."""


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        make: ``(network, l2, settings, generator) -> Trainer``.
        settings: that are the same for every point of the grid.
        batch: images per update by problem, of the first update if they grow; :data:`FEW` for a problem without one.
        grid: settings of which the best is chosen; one empty setting for methods that need no tuning. Three or more
            values of one setting, in order, go on at an end where the best one is, by ``EXTRA`` values at most.
        growing: whether minibatches grow, to all images at update 500 (methods 6.3).
        whole: whether every setting of the grid gets the whole budget, for learning rates that depend on its share.
    """

    make: Callable[[nn.Module, float, Setting, torch.Generator], Trainer]
    settings: Setting = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=lambda: {"curves": 1000, "mnist": 1000, "faces": 1000})
    grid: Sequence[Mapping[str, float]] = ({},)
    growing: bool = False
    whole: bool = False

    def size(self, problem: str, number: int, n_data: int) -> int:
        """Images of update ``number`` (1, 2, ...), ``n_data`` of them at most."""
        first = min(self.batch.get(problem, FEW), n_data)
        return optim.batch_size(number, n_data, first) if self.growing else first

    def beyond(self, tried: Sequence[Mapping[str, float]], scores: Sequence[float]) -> list[dict[str, float]]:
        """The next value after the end of the grid that has the lowest score; nothing if it lies inside."""
        if self.whole or len(self.grid) < 3 or len(tried) >= len(self.grid) + EXTRA:
            return []
        (key,) = self.grid[0]
        ordered = sorted((point[key], score) for point, score in zip(tried, scores, strict=True))
        best = min(range(len(ordered)), key=lambda i: ordered[i][1])
        if 0 < best < len(ordered) - 1 or not math.isfinite(ordered[best][1]):
            return []
        return [{key: ordered[best][0] ** 2 / ordered[1 if best == 0 else -2][0]}]

    def described(self) -> dict[str, Any]:
        """What decides its runs, as text: a run that was made with something else is not used again."""
        text = re.sub(" at 0x[0-9a-f]+", "", str(dict(self.settings)))  # functions print their address
        grid = {"grid": [dict(point) for point in self.grid], **({"extra": EXTRA} if len(self.grid) > 2 else {})}
        if self.whole:
            grid["extra"] = 0
        out = {"settings": text, "batch": dict(self.batch), **grid}
        return {**out, "growing": True} if self.growing else out


OPTIMISERS: Registry[Method] = Registry("optimiser of the autoencoder experiments")


def _second_order(make: Callable[..., SecondOrder]) -> Callable[..., Trainer]:
    def trainer(model: nn.Module, l2: float, settings: Setting, rng: torch.Generator) -> Trainer:
        optimizer = make(model, LIKELIHOOD, l2=l2, generator=rng, **settings)
        return lambda images, over: float(optimizer.step(images, images))

    return trainer


def _first_order(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., Trainer]:
    """Steps of a torch optimiser.

    ``schedule`` is its momentum by the number of updates made, ``halved`` the share of the run after which its learning
    rate is halved, again and again.
    """

    def trainer(model: nn.Module, l2: float, settings: Setting, rng: torch.Generator) -> Trainer:
        others = {key: value for key, value in settings.items() if key not in ("schedule", "halved")}
        optimizer = make(model.parameters(), weight_decay=l2, **others)
        made = 0

        def update(images: Tensor, over: float) -> float:
            nonlocal made
            if "halved" in settings:
                factor = optim.halving(int(over * PARTS), PARTS, settings["halved"])
                optimizer.param_groups[0]["lr"] = settings["lr"] * factor
            if "schedule" in settings:
                optimizer.param_groups[0]["momentum"] = settings["schedule"](made)
            optimizer.zero_grad()
            outputs = model(images)
            loss = nn.functional.binary_cross_entropy_with_logits(outputs, images, reduction="sum") / len(images)
            loss.backward()
            optimizer.step()
            made += 1
            return float(loss.detach())

        return update

    return trainer


def _rates(*rates: float) -> list[dict[str, float]]:
    return [{"lr": lr} for lr in rates]


START: dict[str, Any] = {"search_start": True}
"""Damping at the start. With the published 150 for both, CURVES stays on the plateau of the mean image: the greedy
search for ζ then compares values that all give the gradient's direction, and moves away from the useful ones."""
PLAIN: dict[str, Any] = {**START, "momentum": False}
TRIDIAGONAL: dict[str, Any] = {"inverse": "block_tridiagonal"}
KFAC, SGD = _second_order(optim.kfac), _first_order(torch.optim.SGD)

OPTIMISERS.register("K-FAC")(Method(KFAC, START))
OPTIMISERS.register("K-FAC, no momentum")(Method(KFAC, PLAIN))
OPTIMISERS.register("K-FAC tridiagonal")(Method(KFAC, {**START, **TRIDIAGONAL}))
OPTIMISERS.register("K-FAC tridiagonal, no momentum")(Method(KFAC, {**PLAIN, **TRIDIAGONAL}))
OPTIMISERS.register("K-FAC, growing batches")(Method(KFAC, START, growing=True))
OPTIMISERS.register("K-FAC, growing batches, no momentum")(Method(KFAC, PLAIN, growing=True))
OPTIMISERS.register("K-FAC, published start")(Method(KFAC))
OPTIMISERS.register("KFRA")(Method(_second_order(optim.kfra), START))
OPTIMISERS.register("KFAC")(Method(_second_order(optim.GaussNewton), {**START, "estimator": "sampled"}))
OPTIMISERS.register("EKFAC")(Method(_second_order(optim.ekfac), START))
OPTIMISERS.register("diagonal")(Method(_second_order(optim.diagonal), {**START, "momentum": True}))

FREE: dict[str, Any] = {"recipe": optim.Recipe(limit=30), "curvature_fraction": 0.2, "tau": 1.0}
LARGE = {"curves": 2500, "mnist": 2500, "faces": 2500}
"""Half or a third of the published batches, and 30 CG steps in place of 250: the budgets here are minutes."""
SHORT: dict[str, Any] = {"recipe": optim.Recipe(limit=8), "curvature_fraction": 0.4, "tau": 1.0}
"""With Kronecker factors fewer steps on more images: the best of nine settings on one minute of CURVES."""
OPTIMISERS.register("Hessian-free")(Method(_second_order(optim.hessian_free), FREE, LARGE))
OPTIMISERS.register("Hessian-free, Kronecker")(
    Method(_second_order(optim.hessian_free), {**SHORT, "preconditioner": "kronecker", "zeta": 0.01, "ema": 0.95},
           LARGE)
)  # fmt: skip
OPTIMISERS.register("natural gradient")(
    Method(_second_order(optim.hessian_free), {"recipe": "short", "preconditioner": "none", "tau": 0.1})
)

OPTIMISERS.register("Adam")(Method(_first_order(torch.optim.Adam), grid=_rates(4e-3, 2e-3, 1e-3)))
OPTIMISERS.register("NAG")(
    Method(SGD, {"momentum": 0.5, "nesterov": True, "schedule": optim.nesterov_momentum},
           {"curves": 250, "mnist": 500, "faces": 500}, _rates(0.03, 0.01, 0.003))
)  # fmt: skip
OPTIMISERS.register("heavy ball")(Method(SGD, {"momentum": 0.9}, grid=_rates(0.03, 0.01, 0.003)))
OPTIMISERS.register("SGD")(Method(SGD, grid=_rates(0.1, 0.03, 0.01)))

PUBLISHED_GRID = [{"lr": lr, "halved": share} for lr in optim.PUBLISHED_RATES for share in optim.PUBLISHED_SHARES]
"""Learning rates and schedules that the published first-order baselines were searched over (methods 8.1)."""


def _searched(name: str) -> None:
    """A first-order method over the published grid, with the whole budget for each of its forty settings."""
    OPTIMISERS.register(f"{name}, published grid")(replace(OPTIMISERS[name], grid=PUBLISHED_GRID, whole=True))


for _name in ("Adam", "NAG", "heavy ball", "SGD"):
    _searched(_name)

STANDARD = [name for name, method in OPTIMISERS.items() if not method.whole]
"""What a run takes that names no methods: forty runs in place of one are for those who ask for them."""
