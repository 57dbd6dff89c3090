"""Gradients to the input through the linearised network, against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.meets(way=WAYS, structure=["diag", "kron", "full", "ekfac", "lowrank"])
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


class Attention(nn.Module):
    """One head over positions ``(N, T, 4)``, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 2, -1)
        out: Tensor = self.o((weights @ self.v(x)).mean(1))
        return out


def _normalised() -> nn.Module:
    norm = nn.BatchNorm1d(5)
    norm.running_mean = torch.linspace(-1.0, 1.0, 5)
    norm.running_var = torch.linspace(0.5, 2.0, 5)
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Tanh(), nn.Linear(5, 2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "attention": (Attention, (3, 4), "all"),
    "batchnorm": (_normalised, (3,), "all"),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), (1, 4, 4), "all"),
    "last": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (3,), "last_layer"),
}


@pytest.mark.parametrize("mixture", [False, True], ids=["one", "mixture"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_of_other_kinds_once_and_twice(network: str, mixture: bool) -> None:
    """Gradients and gradients of gradients along a direction, against central differences in float64."""
    make, shape, parameters = NETWORKS[network]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(0, 2, (10,), generator=g)
    members = []
    for structure in ("kron", "layer")[: 1 + mixture]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1 + len(members))
            model = make().double().eval()
        options: Any = {"structure": structure, "parameters": parameters}
        members.append(lk.LaplacePosterior(model, "categorical", **options).fit((x, y)))
    posterior: Any = lk.Mixture(members) if mixture else members[0]
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda z: posterior.predict(z, method="probit").probs,
        lambda z: (
            posterior.predict(z, method="linearized", samples=4, generator=torch.Generator().manual_seed(2)).entropy
        ),
    ]
    if not mixture:
        functions.append(lambda z: posterior.functional_covariance(z, joint=True))
    at, along, other = (torch.randn(2, *shape, generator=g, dtype=torch.float64) for _ in range(3))
    for function in functions:
        weights = torch.randn(function(at).shape, generator=g, dtype=torch.float64)

        def gradient(z: Tensor, of: Any = function, w: Tensor = weights) -> Tensor:
            z = z.detach().requires_grad_()
            return torch.autograd.grad((of(z) * w).sum(), z)[0]

        leaf, h = at.clone().requires_grad_(), 1e-5
        (first,) = torch.autograd.grad((function(leaf) * weights).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * other).sum(), leaf)
        values = [(function((at + s * h * along).requires_grad_()) * weights).sum().detach() for s in (1, -1)]
        gradients = [(gradient(at + s * h * along) * other).sum() for s in (1, -1)]
        assert float((first * along).sum()) == pytest.approx(float(values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-7)
        assert float((second * along).sum()) == pytest.approx(
            float(gradients[0] - gradients[1]) / (2 * h), rel=1e-5, abs=1e-7
        )
