"""Networks drawn by hypothesis, any steps in any order, against dense references: 50 in each run, 1,000 a night.

More of them: ``LAPLACE_KF_NETWORKS=5000 python -m pytest -m nightly tests/architectures/test_random_networks.py``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.architectures.random_networks import LIKELIHOODS, WORLDS, Plan, dense, plans
from tests.checks import close

NIGHT = int(os.environ.get("LAPLACE_KF_NETWORKS", "1000"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def state(model: nn.Module) -> dict[str, Any]:
    """What a call could leave behind in a model or in the random numbers."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    found["grads"] = [p.grad for p in model.parameters()]
    found["flags"] = [p.requires_grad for p in model.parameters()]
    found["modes"] = [module.training for module in model.modules()]
    found["hooks"] = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found["random"] = torch.get_rng_state()
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def owes(plan: Plan) -> None:
    """Curvatures of four structures, the empirical Fisher, the posterior's precision and its covariance of outputs."""
    model, x, y = plan.made()
    before = state(model)
    nll = LIKELIHOODS[plan.likelihood].nll
    likelihood = LIKELIHOODS[plan.likelihood].build(lk)
    jacobian, ggn = dense(plan, model, x, y)
    n = len(y)
    halves = [(x[: n - 1], y[: n - 1]), (x[n - 1 :], y[n - 1 :])] if n > 1 else [(x, y)]

    def estimate(structure: str, estimator: str = "exact", data: Any = halves) -> Tensor:
        return lk.curvature.estimate(model, likelihood, data, structure=structure, estimator=estimator).mean().dense()

    close(estimate("full"), ggn)
    close(estimate("diag"), torch.diag(ggn.diagonal()))
    close(estimate("full", "empirical"), oracles.empirical_fisher(model, x, y, nll))
    kron = estimate("kron")
    close(kron, kron.mT)
    assert torch.linalg.eigvalsh(kron).min() > -1e-9 * float(kron.diagonal().max() + 1)

    posterior = lk.LaplacePosterior(model, likelihood, structure="full", prior_precision=0.7).fit((x, y))
    covariance = torch.linalg.inv(n * ggn + 0.7 * torch.eye(len(ggn), dtype=ggn.dtype))
    expected = jacobian @ covariance @ jacobian.mT
    found = posterior.functional_covariance(x)
    close(found.reshape(expected.shape), expected)
    assert same(before, state(model)), "the model or the random numbers were changed"


@example(Plan("tokens", ("attention", "norm"), "tied", "categorical", 2, 3, 0))
@example(Plan("sequences", ("used twice", "gru"), "each", "gaussian", 2, 2, 1))
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
@given(plan=plans())
def test_random_networks_are_exact(plan: Plan) -> None:
    owes(plan)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@settings(max_examples=NIGHT, deadline=None, database=None, suppress_health_check=SLOW, print_blob=True)
@given(plan=plans())
def test_many_random_networks_are_exact(plan: Plan) -> None:
    owes(plan)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_plans_are_networks_that_differ(world: str) -> None:
    """Every step runs by itself and is seen in the outputs, so that none of them is an empty word."""
    for name in WORLDS[world]:
        model, x, _ = Plan(world, (name,), "pooled", "gaussian", 2, 3, 0).made()
        shift = 0.0 if world == "tokens" else 0.25
        assert model(x + shift if shift else x.flip(0)).shape == (3, 2)
        assert not torch.equal(model(x + shift if shift else x.flip(1).roll(1, 0)), model(x))
