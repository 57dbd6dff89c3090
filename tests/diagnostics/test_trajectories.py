"""Steps in other coordinates, and stochastic steps on quadratics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.diagnostics.twins import Twin
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, NotPositiveDefinite, ShapeMismatch, UnsupportedLayer

diagnostics = lk.diagnostics


def problem(bias: bool = True) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias)).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    return model, x, torch.randn(40, 3, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestInvariance:
    # with biases the tri-diagonal inverse is singular without damping: one constant 1 predicts the next (methods 5.5)
    @pytest.mark.parametrize(
        ("inverse", "bias", "steps"),
        [("block_diagonal", True, 4), ("block_diagonal", False, 4), ("block_tridiagonal", False, 1)],
    )
    def test_undamped_steps_see_no_coordinates(self, inverse: str, bias: bool, steps: int):
        model, x, y = problem(bias)
        before = [p.detach().clone() for p in model.parameters()]
        found = diagnostics.invariance(model, "gaussian", (x, y), steps, generator=seeded(), inverse=inverse)
        assert found.deviation < 1e-8
        assert found.deviation == float(found.by_step.max())
        assert len(found.by_step) == steps + 1
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_damping_sees_them(self):
        model, x, y = problem()
        found = diagnostics.invariance(model, "gaussian", (x, y), 2, 0.1, seeded())
        assert found.deviation > 1e-3
        assert float(found.by_step[0]) < 1e-12  # the twin is the same function at the start

    def test_logistic_units(self):
        model, x, y = problem()
        assert diagnostics.invariance(model, "gaussian", (x, y), 3, coordinates="logistic").deviation < 1e-8

    def test_the_logistic_twin_is_a_network_of_logistic_units(self):
        model, x, _ = problem()
        made = diagnostics.twins.COORDINATES["logistic"]
        pairs = [made(4, 3, True, x, seeded()), made(3, 4, True, x, seeded())]
        # only what surrounds the activation matters for this: inputs and outputs as they are
        outer, inner = [pairs[0][0], torch.eye(3).double()], [torch.eye(4).double(), pairs[1][1]]
        twin = Twin([model[0], model[2]], [lambda a: a, torch.tanh, lambda a: a], outer, inner)
        first, second = (w.detach() for w in twin.weights)
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        hidden = torch.sigmoid(torch.cat([x, ones], 1) @ first.T)
        assert torch.allclose(torch.cat([hidden, ones], 1) @ second.T, model(x), atol=1e-12)

    def test_what_cannot_be_transformed_is_refused(self):
        _, x, y = problem()
        with pytest.raises(UnsupportedLayer, match="'0'"):
            diagnostics.invariance(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)).double(), "gaussian", (x, y), 1)
        with pytest.warns(RuntimeWarning, match="jitter"):
            diagnostics.invariance(problem()[0], "gaussian", (x[:2], y[:2]), 1)
        with pytest.raises(ShapeMismatch, match="steps"):
            diagnostics.invariance(problem()[0], "gaussian", (x, y), -1)
        with pytest.raises(LaplaceKFError):
            diagnostics.invariance(problem()[0], "gaussian", (x, y), 1, coordinates="rando")


def quadratic(size: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    a, b = torch.randn(2, size, size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    return a @ a.T + eye, b @ b.T + 0.1 * eye


class TestConvergence:
    def test_newton_steps_are_exactly_one_over_k(self):
        h, s = quadratic()
        found = diagnostics.convergence(h, h, s, steps=30, repetitions=4, generator=seeded())
        k = torch.arange(1, 31, dtype=torch.float64)
        assert torch.allclose(found.predicted, torch.linalg.solve(h, s).trace() / (2 * k), rtol=1e-10)
        assert torch.allclose(found.exact, found.predicted, rtol=1e-10)

    def test_simulation_expectation_and_leading_term(self):
        h, s = quadratic()
        b = float(torch.linalg.eigvalsh(h)[0]) * torch.eye(3, dtype=torch.float64)
        start = torch.ones(3, dtype=torch.float64)
        found = diagnostics.convergence(h, b, s, steps=400, repetitions=2000, start=start, generator=seeded())
        for k in (50, 200, 399):
            assert abs(float(found.excess[k] - found.exact[k])) < 5 * float(found.error[k])
        assert float(found.exact[-1] / found.predicted[-1]) == pytest.approx(1, abs=0.03)
        assert float(found.exact[0]) != pytest.approx(float(found.predicted[0]), rel=0.1)

    def test_a_scalar_with_a_constant_rate(self):
        h, b, s, alpha = (torch.tensor([[v]], dtype=torch.float64) for v in (2.0, 3.0, 0.7, 0.05))
        found = diagnostics.convergence(h, b, s, steps=500, repetitions=2, rate=0.05, generator=seeded())
        a = alpha * h / b
        stationary = h / 2 * (alpha / b) ** 2 * s / (2 * a - a**2)
        assert float(found.exact[-1]) == pytest.approx(float(stationary), rel=1e-10)
        assert float(found.predicted[-1]) == pytest.approx(0.05 / 4 * 0.7 / 3, rel=1e-12)
        assert float(found.exact[-1]) == pytest.approx(float(found.predicted[-1]), rel=0.03)

    def test_averages_stay_below_their_bound(self):
        h, s = quadratic()
        start = torch.ones(3, dtype=torch.float64)
        rate = 0.4 / float(torch.linalg.eigvalsh(h)[-1])
        eye = torch.eye(3, dtype=torch.float64)
        found = diagnostics.convergence(
            h, eye, s, steps=200, repetitions=300, start=start, rate=rate, generator=seeded()
        )
        assert bool((found.averaged <= found.averaged_bound * 1.05).all())
        assert float(found.averaged[-1]) < float(found.excess[-1])

    @pytest.mark.parametrize(
        ("rate", "factor", "said"), [("1/k", 2.0, "1/k"), (3.0, 1.0, "diverges"), ("1/t", 1.0, "rate")]
    )
    def test_refusals(self, rate: float | str, factor: float, said: str):
        h, s = quadratic()
        with pytest.raises(IncompatiblePair, match=said):
            diagnostics.convergence(h, factor * h, s, rate=rate)
        with pytest.raises(ShapeMismatch):
            diagnostics.convergence(h, h[:2], s)
        with pytest.raises(NotPositiveDefinite):
            diagnostics.convergence(-h, h, s)
