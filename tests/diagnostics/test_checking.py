"""The finite-difference check: it passes what is right and names what is wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import LaplaceKFError
from laplace_kf.layers import base
from laplace_kf.likelihoods import Categorical, FromDistribution, Gaussian, Poisson
from tests import cases

check = lk.diagnostics.check


def net(act: type[nn.Module] = nn.Tanh, outs: int = 3) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 4), act(), nn.Linear(4, outs)).double()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])


class TestRight:
    @pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
    def test_plain_network(self, act: type[nn.Module]):
        found = check(net(act), "categorical", rows())
        assert found.ok, found
        assert set(found.errors) == {"Jv", "JTw", "H_L", "score", "Gv", "Hv"}
        assert max(found.errors.values()) < 1e-5
        assert not found.off

    def test_a_float32_network_is_checked_in_float64_and_stays(self):
        model = net().float()
        before = [p.clone() for p in model.parameters()]
        x, y = rows()
        found = check(model, "categorical", (x.float(), y))
        assert found.ok
        assert max(found.errors.values()) < 1e-5
        assert all(
            torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, model.parameters(), strict=True)
        )
        assert model.training
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        "likelihood",
        [Gaussian(scale=0.5), Poisson(), "heteroscedastic_gaussian", "bernoulli_mixture", "bernoulli"],
        ids=str,
    )
    def test_likelihoods(self, likelihood: Any):
        rule = lk.likelihoods.base.get_likelihood(likelihood)
        outs = rule.examples()[0][1]
        x, _ = rows()
        model = net(outs=outs)
        targets = rule.sample(model(x).detach(), torch.Generator().manual_seed(0))
        found = check(model, likelihood, (x, targets))
        assert found.ok, found

    @pytest.mark.parametrize(
        "name", ["conv2d-groups", "layernorm", "batchnorm1d", "gru", "tied-embedding-decoder", "attention"]
    )
    def test_layers(self, name: str):
        chosen = next(case for case in cases.CASES if case.name == name)
        problem = chosen.make()
        found = check(problem.model, problem.likelihood.build(lk), (problem.x, problem.y))
        assert found.ok, f"{chosen.name}\n{found}"

    def test_forward(self):
        x, y = rows()
        batch = {"data": x, "which": y}
        found = check(net(), "categorical", batch, lambda model, b: (model(b["data"]) * 2, b["which"]))
        assert found.ok, found


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.9


class Bent(nn.Module):
    """A small part of the parameters has a wrong derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(2, 30)
        self.small = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
        self.out = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.big(x)) + 1e-3 * WrongBackward.apply(self.small))


class WrongScore(Categorical):
    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        return super()._position_score(z, y) * 1.01


class WrongRoot(Gaussian):
    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return super()._position_root(z, y) * 1.01


class WrongHessian(Categorical):
    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        return super()._position_hessian(z, y) * 0.99


class WrongProduct(Categorical):
    def _position_curved(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return super()._position_curved(z, v, y) * 1.01


class TestWrong:
    def test_backward_of_a_small_parameter(self):
        torch.manual_seed(0)
        found = check(Bent().double(), "categorical", rows())
        assert not found.ok
        assert {"Jv", "JTw"} <= set(found.off)
        assert not {"score", "H_L"} & set(found.off)
        assert [name for name, error in found.parameters.items() if error > found.tolerance] == ["small"]
        assert "'small'" in str(found)

    @pytest.mark.parametrize(
        ("rule", "off"),
        [
            (WrongScore(), {"score"}),
            (WrongRoot(), {"H_L"}),
            (WrongHessian(), {"H_L"}),
            (WrongProduct(), {"H_L", "Gv"}),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_likelihood(self, rule: Any, off: set[str]):
        x, y = rows()
        targets = x.sum(1, keepdim=True).expand(5, 3).contiguous() if isinstance(rule, Gaussian) else y
        found = check(net(), rule, (x, targets))
        assert set(found.off) == off, found

    def test_layer_rule(self, monkeypatch: pytest.MonkeyPatch):
        rule = base.RULES[F.linear]
        inputs = type(rule).inputs
        monkeypatch.setattr(type(rule), "inputs", lambda self, *args: inputs(self, *args) * 1.02)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 2)), nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
        ).double()
        found = check(model, "categorical", rows())
        assert found.off == ("JTw",), found
        assert set(found.rules) >= {"1.weight", "4.weight"}
        assert "linear" in str(found)

    def test_a_wrong_derivative_does_not_raise_but_a_wrong_call_does(self):
        x, y = rows()
        with pytest.raises(LaplaceKFError):
            check(net(), "categorical", (x, y[:3]))
        with pytest.raises(LaplaceKFError, match="tolerance"):
            check(net(), "categorical", (x, y), tolerance=0.0)

    def test_nan_is_off(self):
        found = check(net(), "categorical", rows())
        assert not dataclasses.replace(found, off=("Jv",), errors={**found.errors, "Jv": math.nan}).ok


def test_a_distribution_with_the_wrong_parameter_is_right_all_the_same():
    # not natural: its curvature is not its Hessian, and the check does not mistake one for the other
    rule = FromDistribution(lambda z: torch.distributions.Gamma(z[..., :1].exp(), z[..., 1:].exp()))
    x, _ = rows()
    found = check(net(outs=2), rule, (x, x[:, :1].abs() + 0.1))
    assert found.ok, found
