"""The optimisers of the autoencoder experiments: one row each, with the grids of the first-order ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import optim
from laplace_kf.optim.base import SecondOrder
from laplace_kf.registry import Registry

__all__ = ["LIKELIHOOD", "METHODS", "Method", "Setting", "Trainer"]

LIKELIHOOD = "bernoulli"

Setting = Mapping[str, float]
Trainer = Callable[[Tensor, float], float]
"""``(images (N, 784), share of the budget that is used up) -> loss`` before the update that it makes."""


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        make: ``(network, l2, setting, generator) -> Trainer``.
        batch: images per update by problem.
        grid: settings of which the best is chosen; one empty setting for methods that need no tuning.
    """

    make: Callable[[nn.Module, float, Setting, torch.Generator], Trainer]
    batch: Mapping[str, int]
    grid: Sequence[Setting] = ({},)


METHODS: Registry[Method] = Registry("optimiser of the autoencoder experiments")

SAME = {"curves": 1000, "mnist": 1000}


def _second_order(make: Callable[..., SecondOrder], **settings: Any) -> Callable[..., Trainer]:
    def trainer(model: nn.Module, l2: float, setting: Setting, rng: torch.Generator) -> Trainer:
        optimizer = make(model, LIKELIHOOD, l2=l2, generator=rng, **{**settings, **setting})
        return lambda images, used: float(optimizer.step(images, images))

    return trainer


def _first_order(make: Callable[..., torch.optim.Optimizer], momentum: bool = False) -> Callable[..., Trainer]:
    """Steps of a torch optimiser whose rate halves every ``period`` of the budget (S3 4.5.1)."""

    def trainer(model: nn.Module, l2: float, setting: Setting, rng: torch.Generator) -> Trainer:
        optimizer = make(model.parameters(), lr=setting["lr"], weight_decay=l2)
        made = 0

        def update(images: Tensor, used: float) -> float:
            nonlocal made
            for group in optimizer.param_groups:
                group["lr"] = setting["lr"] * 0.5 ** int(used / setting.get("period", 1.0))
                if momentum:
                    group["momentum"] = optim.nesterov_momentum(made)
            optimizer.zero_grad()
            outputs = model(images)
            loss = nn.functional.binary_cross_entropy_with_logits(outputs, images, reduction="sum") / len(images)
            loss.backward()
            optimizer.step()
            made += 1
            return float(loss.detach())

        return update

    return trainer


def _rates(*rates: float, periods: Sequence[float] = (1.0,)) -> list[Setting]:
    return [{"lr": lr, "period": period} for lr in rates for period in periods]


def _nag(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.5, nesterov=True, **settings)


def _heavy_ball(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, **settings)


TRIDIAGONAL = {"inverse": "block_tridiagonal"}

METHODS.register("K-FAC")(Method(_second_order(optim.kfac), SAME))
METHODS.register("K-FAC, no momentum")(Method(_second_order(optim.kfac, momentum=False), SAME))
METHODS.register("K-FAC tridiagonal")(Method(_second_order(optim.kfac, **TRIDIAGONAL), SAME))
METHODS.register("K-FAC tridiagonal, no momentum")(
    Method(_second_order(optim.kfac, momentum=False, **TRIDIAGONAL), SAME)
)
METHODS.register("KFRA")(Method(_second_order(optim.kfra), SAME))
METHODS.register("KFAC")(Method(_second_order(optim.GaussNewton, estimator="sampled"), SAME))
METHODS.register("EKFAC")(Method(_second_order(optim.ekfac), SAME))
METHODS.register("diagonal")(Method(_second_order(optim.diagonal, momentum=True), SAME))
METHODS.register("Hessian-free")(
    Method(_second_order(optim.hessian_free, recipe=optim.Recipe(limit=60), curvature_fraction=0.2),
           {"curves": 5000, "mnist": 7500})
)  # fmt: skip
METHODS.register("Hessian-free, Kronecker")(
    Method(_second_order(optim.hessian_free, recipe=optim.Recipe(limit=60), curvature_fraction=0.2,
                         preconditioner="kronecker"),
           {"curves": 5000, "mnist": 7500})
)  # fmt: skip
METHODS.register("natural gradient")(
    Method(_second_order(optim.hessian_free, recipe="short", preconditioner="none"), SAME)
)
METHODS.register("Adam")(Method(_first_order(torch.optim.Adam), SAME, _rates(4e-3, 2e-3, 1e-3, periods=(1.0, 0.25))))
METHODS.register("NAG")(
    Method(_first_order(_nag, momentum=True), {"curves": 250, "mnist": 500}, _rates(0.03, 0.01, 0.003, 0.001))
)
METHODS.register("heavy ball")(Method(_first_order(_heavy_ball), SAME, _rates(0.03, 0.01, 0.003)))
METHODS.register("SGD")(Method(_first_order(torch.optim.SGD), SAME, _rates(0.1, 0.03, 0.01)))
