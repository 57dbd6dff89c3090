"""Gradients to the input through the linearised network, against finite differences in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests.cases import labels, normal, rng
from tests.checks import close

WAYS: dict[str, Any] = {
    "probit": lambda p, x: p.predict(x, method="probit").probs,
    "linearized": lambda p, x: p.predict(x, method="linearized", samples=7, generator=rng(0)).probs,
    "map": lambda p, x: p.predict(x, method="map").probs,
    "blocks": lambda p, x: p.functional_covariance(x),
    "variances": lambda p, x: p.functional_covariance(x, diagonal_only=True),
    "joint": lambda p, x: p.functional_covariance(x, joint=True),
}


def problem(structure: str, parameters: Any = "all", norm: bool = True) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.LayerNorm(4) if norm else nn.Tanh(), nn.Linear(4, 3)).double()
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure, parameters=parameters)
    return posterior.fit((normal(20, 2, seed=1), labels(3, 20))), normal(2, 2, seed=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("structure", ["diag", "kron", "full", "ekfac", "lowrank"])
def test_finite_differences(way: str, structure: str) -> None:
    posterior, x = problem(structure)
    z = x.clone().requires_grad_()
    found = WAYS[way](posterior, z)
    close(found.detach(), WAYS[way](posterior, x), 1e-9)
    assert torch.autograd.gradcheck(lambda v: WAYS[way](posterior, v), z, atol=1e-6)
    assert all(p.grad is None for p in posterior.model.parameters())


@pytest.mark.parametrize("way", ["probit", "blocks", "joint"])
def test_twice_and_in_a_suffix(way: str) -> None:
    for parameters in ("all", "last_layer"):
        posterior, x = problem(
            "kron", parameters, norm=False
        )  # a norm over four features is too curved for differences
        assert torch.autograd.gradgradcheck(lambda v, p=posterior: WAYS[way](p, v).sum(), x.requires_grad_())
