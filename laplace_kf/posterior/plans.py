"""``laplace_kf.plan``: a plan without making the posterior first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from laplace_kf.estimators import Estimator
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.posterior.planning import Plan
from laplace_kf.structures import Structure
from laplace_kf.subnetwork import Selection

__all__ = ["plan"]


def plan(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Iterable[Any] | tuple[Any, Tensor],
    structure: str | Structure = "kron",
    estimator: str | Estimator = "exact",
    parameters: Selection = "all",
    *,
    budget: float | None = 10.0,
    method: str = "auto",
    samples: int = 100,
    minibatches: float | None = None,
    processes: int = 1,
    bandwidth: float = 1e9,
    clock: Callable[[], float] = time.perf_counter,
    **settings: Any,
) -> Plan:
    """What a posterior of these settings will take to fit, tune and predict on these data, before it is made.

    Args:
        model, likelihood, structure, estimator, parameters: as of :class:`laplace_kf.LaplacePosterior`.
        loader: a loader or a pair ``(x (N, ...), y (N, ...))``.
        budget, method, samples, minibatches, processes, bandwidth, clock: as of :meth:`LaplacePosterior.plan`.
        **settings: every other argument of :class:`laplace_kf.LaplacePosterior`.

    Returns:
        As :meth:`LaplacePosterior.plan`.

    Raises:
        UnknownName, UnknownOption: as of :class:`laplace_kf.LaplacePosterior`; further ones as of its ``plan``.
    """
    posterior = LaplacePosterior(model, likelihood, structure, estimator, parameters, **settings)
    return posterior.plan(
        loader, budget=budget, method=method, samples=samples, minibatches=minibatches, processes=processes,
        bandwidth=bandwidth, clock=clock,
    )  # fmt: skip
