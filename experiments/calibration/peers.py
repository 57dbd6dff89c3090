"""laplace-torch on the same network, data and splits, for side-by-side benchmarks; it need not be installed."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.calibration.problems import Forecast, Problem
from laplace_kf.demo import private_rng

__all__ = ["laplace_torch"]

AT_A_TIME = 20
"""Inputs per prediction: its Jacobians take time that grows with the square of this."""
LOG_2PI = math.log(2 * math.pi)


def laplace_torch(
    model: nn.Module, problem: Problem, how: str, *, grid: int, seed: int
) -> tuple[Forecast, dict[str, Any]]:
    """Kronecker posterior over all weights and the package's default prediction (linearised; probit for classes).

    Args:
        model: the trained network; a copy is handed over.
        problem: training, validation and test data.
        how: ``"marglik"``: prior precision (and for regression the noise, jointly) by marginal likelihood;
            ``"gridsearch"``: then the prior precision by validation NLL.
        grid: points of the grid search, over the package's default range.
        seed: of whatever it draws.

    Returns:
        Its forecast for the test inputs, and the settings it chose.

    Raises:
        ImportError: if laplace-torch is not installed.
    """
    with private_rng(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from laplace import Laplace

        regression = problem.task.peer == "regression"
        found: Any = Laplace(copy.deepcopy(model), problem.task.peer, subset_of_weights="all", hessian_structure="kron")
        found.fit(_loader(*problem.train, 256))
        if regression:
            _marginal_likelihood(found)
        else:
            found.optimize_prior_precision(method="marglik")
        if how == "gridsearch":
            # Its own metrics would not do: the squared error of a linearised prediction does not depend on the prior,
            # and the running NLL of version 0.3 is carried on from one grid point to the next.
            loss = (lambda *parts: -_normal(found, *parts).mean()) if regression else _cross_entropy
            found.optimize_prior_precision(
                method="gridsearch", val_loader=_loader(*problem.val, AT_A_TIME), loss=loss, grid_size=grid
            )
        settings = {"prior_precision": float(found.prior_precision.detach().mean())}
        inputs, targets = problem.test
        parts = [found(part) for part in inputs.split(AT_A_TIME)]
        if regression:
            settings["scale"] = float(found.sigma_noise.detach())
            mean, variance = (torch.cat(values).detach() for values in zip(*parts, strict=True))
            return Forecast(_normal(found, mean, variance, targets), mean), settings
        probs = torch.cat(parts).detach()
        hit = probs.gather(1, targets[:, None])[:, 0].clamp_min(torch.finfo(probs.dtype).tiny)
        return Forecast(hit.log(), probs), settings


def _loader(x: Tensor, y: Tensor, size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=size)


def _marginal_likelihood(found: Any, steps: int = 100) -> None:
    """Prior precision and noise by gradient ascent, as the package's own regression example does it."""
    log_prior, log_noise = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_noise], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (-found.log_marginal_likelihood(log_prior.exp(), log_noise.exp())).backward()
        optimizer.step()
    found.prior_precision, found.sigma_noise = log_prior.detach().exp(), log_noise.detach().exp()


def _normal(found: Any, mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Log density ``(N,)`` of targets ``(N, 1)``, noise included."""
    total = variance.reshape(mean.shape) + found.sigma_noise.detach().square()
    return -0.5 * ((targets - mean).square() / total + total.log() + LOG_2PI)[:, 0]


def _cross_entropy(probs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.nll_loss(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), targets)
