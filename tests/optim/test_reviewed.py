"""Methods with one learning rate for each weight, against plain loops over numbers."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.optim import SGDQN, AdaptiveRates, MatrixMomentum, StochasticMetaDescent

H = np.array([[4.0, 1.0, 0.3], [1.0, 2.0, -0.5], [0.3, -0.5, 0.7]])
START = np.array([1.0, -2.0, 0.5])


def optimised(make, steps=6, **arguments):
    """Weights after each step on ½ θᵀHθ, in two parameters of which one is a matrix."""
    first, second = nn.Parameter(torch.tensor(START[:2]).view(1, 2)), nn.Parameter(torch.tensor(START[2:]))
    hessian = torch.tensor(H)
    optimizer = make([first, second])

    def closure():
        optimizer.zero_grad()
        theta = torch.cat([first.flatten(), second])
        loss = theta @ hessian @ theta / 2
        loss.backward()
        return loss

    path = []
    for _ in range(steps):
        optimizer.step(closure, **arguments)
        path.append(torch.cat([first.detach().flatten(), second.detach()]).numpy().copy())
    return np.array(path)


def product(v):
    return torch.tensor(H) @ v


class TestAdaptiveRates:
    @pytest.mark.parametrize("momentum", [0.0, 0.8])
    def test_signs(self, momentum):
        theta, moved, rates, before = START.copy(), np.zeros(3), np.full(3, 0.3), None
        for found in optimised(partial(AdaptiveRates, lr=0.3, up=1.5, momentum=momentum), 8):
            g = H @ theta
            if before is not None:
                rates = np.where(g * before >= 0, rates * 1.5, rates / 1.5)
            moved = momentum * moved - rates * g
            theta, before = theta + moved, g
            np.testing.assert_allclose(found, theta, rtol=1e-12)

    def test_rates_of_both_signs_were_met(self):
        g = [H @ theta for theta in optimised(partial(AdaptiveRates, lr=0.3, up=1.5), 8)]
        signs = np.sign(np.array(g[1:]) * np.array(g[:-1]))
        assert {1.0, -1.0} <= set(signs.flatten())

    def test_products(self):
        theta, rates, before, square = START.copy(), np.full(3, 0.4), None, None
        for found in optimised(partial(AdaptiveRates, lr=0.4, rule="product", alpha=0.7, decay=0.6), 8):
            g = H @ theta
            if before is None:
                square = g**2
            else:
                square = 0.6 * square + 0.4 * g**2
                rates = rates * np.maximum(0.5, 1 + 0.7 * g * before / square)
            theta, before = theta - rates * g, g
            np.testing.assert_allclose(found, theta, rtol=1e-10)

    @pytest.mark.parametrize(
        "given", [{"lr": 0.0}, {"up": 1.0}, {"down": 1.0}, {"decay": 1.0}, {"momentum": -0.1}, {"alpha": "0.1"}]
    )
    def test_ranges(self, given):
        with pytest.raises(IncompatiblePair, match=next(iter(given))):
            AdaptiveRates([nn.Parameter(torch.ones(1))], **given)

    def test_a_zero_gradient_keeps_a_weight(self):
        weight = nn.Parameter(torch.ones(2))
        optimizer = AdaptiveRates([weight], rule="product")
        for _ in range(3):
            weight.grad = torch.tensor([0.0, 1.0])
            optimizer.step()
        assert weight[0] == 1 and weight[1] < 1 and torch.isfinite(weight).all()

    def test_unknown_rules(self):
        with pytest.raises(UnknownName, match="product"):
            AdaptiveRates([nn.Parameter(torch.ones(1))], rule="products")


class TestMatrixMomentum:
    def test_steps(self):
        theta, step = START.copy(), np.zeros(3)
        for found in optimised(partial(MatrixMomentum, lr=0.2, alpha=0.5), product=product):
            theta, step = theta + step, step - 0.2 * (0.5 * H @ theta + H @ step)
            np.testing.assert_allclose(found, theta, rtol=1e-12, atol=1e-14)

    def test_with_alpha_one_it_is_momentum_without_friction(self):
        """Martens 2016, 3.4.2: on a quadratic, δ' = δ − η ∇h(θ + δ)."""
        theta, step = START.copy(), np.zeros(3)
        for found in optimised(partial(MatrixMomentum, lr=0.1), product=product):
            theta = theta + step
            step = step - 0.1 * H @ theta
            np.testing.assert_allclose(found, theta, rtol=1e-12, atol=1e-14)

    def test_a_product_is_needed_and_checked(self):
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        optimizer = MatrixMomentum([weight])
        with pytest.raises(IncompatiblePair, match="ggn_vector_product"):
            optimizer.step()
        with pytest.raises(ShapeMismatch, match=r"\(2,\)"):
            optimizer.step(product=lambda v: v[:1])
        assert torch.equal(weight, torch.ones(2)) and not optimizer.state

    def test_gauss_newton_products_of_a_network(self):
        torch.manual_seed(1)  # some labels of eight random inputs are harder than others
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(8, 3), torch.randint(2, (8,))
        optimizer = MatrixMomentum(model.parameters(), lr=0.5)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step(product=partial(lk.curvature.ggn_vector_product, model, "categorical", (x, y)))
            losses.append(float(loss))
        assert losses[-1] < 0.5 * losses[0]


class TestStochasticMetaDescent:
    @pytest.mark.parametrize("forgetting", [0.0, 0.9, 1.0])
    def test_steps(self, forgetting):
        theta, rates, trace = START.copy(), np.full(3, 0.1), np.zeros(3)
        made = partial(StochasticMetaDescent, lr=0.1, meta=0.3, forgetting=forgetting)
        for found in optimised(made, product=product if forgetting else None):
            g = H @ theta
            rates = rates * np.maximum(0.5, np.exp(-0.3 * trace * g))
            trace = forgetting * trace - rates * (g + forgetting * H @ trace)
            theta = theta - rates * g
            np.testing.assert_allclose(found, theta, rtol=1e-11, atol=1e-14)

    def test_a_product_is_needed(self):
        with pytest.raises(IncompatiblePair, match="product"):
            StochasticMetaDescent([nn.Parameter(torch.ones(1))]).step()


class TestSGDQN:
    @pytest.mark.parametrize("rule", ["average", "sum"])
    def test_steps(self, rule):
        theta, rates = START.copy(), np.full(3, 0.1)
        for k, found in enumerate(optimised(partial(SGDQN, lr=0.1, rule=rule, bounds=(0.02, 3.0)))):
            step = -rates * (H @ theta)
            curvature = np.clip(H @ step / step, 1 / 3.0, 1 / 0.02)
            if rule == "average":
                rates = rates + (1 / curvature - rates) / (k + 2)
            else:
                rates = 1 / (1 / rates + curvature)
            theta = theta + step
            np.testing.assert_allclose(found, theta, rtol=1e-11)

    @pytest.mark.parametrize("rule", ["average", "sum"])
    def test_what_a_step_teaches_has_bounds(self, rule):
        state = {"rates": torch.full((4,), 0.1, dtype=torch.float64)}
        step, change = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1, 1, 0], [1e9, -1, 0.5, 7]))
        SGDQN._learn({"bounds": (0.02, 3.0), "rule": rule}, state, step, change)
        ratios = torch.tensor([0.02, 3.0, 2.0], dtype=torch.float64)
        wanted = (0.1 + ratios) / 2 if rule == "average" else 1 / (10 + 1 / ratios)
        torch.testing.assert_close(state["rates"][:3], wanted)
        assert float(state["rates"][3]) == 0.1

    def test_secants_of_the_next_minibatch(self):
        weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        optimizer = SGDQN([weight], lr=0.1, rule="sum", bounds=(0.01, 100.0))

        def loss_of(scale):
            def closure():
                optimizer.zero_grad()
                loss = (scale * weight.square()).sum() / 2
                loss.backward()
                return loss

            return closure

        found = optimizer.step(loss_of(torch.tensor([1.0, 2.0])), following=loss_of(torch.tensor([5.0, 7.0])))
        assert float(found.detach()) == 1.5
        expected = torch.tensor([1 / (10 + 5.0), 1 / (10 + 7.0)], dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[weight]["rates"], expected)

    def test_a_weight_that_did_not_move_keeps_its_rate(self):
        weight = nn.Parameter(torch.tensor([0.0, 1.0]))
        optimizer = SGDQN([weight], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = weight.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        rates = optimizer.state[weight]["rates"]
        assert rates[0] == pytest.approx(0.1) and rates[1] > 0.1

    def test_refusals(self):
        weight = nn.Parameter(torch.ones(1))
        with pytest.raises(IncompatiblePair, match="closure"):
            SGDQN([weight]).step()
        with pytest.raises(IncompatiblePair, match="bounds"):
            SGDQN([weight], bounds=(1.0, 0.5))
        with pytest.raises(UnknownName, match="average"):
            SGDQN([weight], rule="mean")


def test_all_are_saved_and_restored_bit_for_bit():
    for make in (AdaptiveRates, partial(SGDQN, rule="sum"), StochasticMetaDescent, MatrixMomentum):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))

        def steps(optimizer, weight, count):
            def closure():
                optimizer.zero_grad()
                loss = (weight.square() * torch.tensor([1.0, 3.0])).sum()
                loss.backward()
                return loss

            more = {} if isinstance(optimizer, (AdaptiveRates, SGDQN)) else {"product": lambda v: 2 * v}
            for _ in range(count):
                optimizer.step(closure, **more)

        first = make([weight])
        steps(first, weight, 3)
        copy = nn.Parameter(weight.detach().clone())
        second = make([copy])
        second.load_state_dict(first.state_dict())
        steps(first, weight, 3)
        steps(second, copy, 3)
        assert torch.equal(weight, copy)


def test_the_trace_is_the_derivative_by_the_log_rates():
    """On a quadratic with fixed rates, v is dθ/d log p of the whole history: H is exact there."""

    def path(rates):
        theta = START.copy()
        for _ in range(5):
            theta = theta - rates * (H @ theta)
        return theta

    first, second = nn.Parameter(torch.tensor(START[:2]).view(1, 2)), nn.Parameter(torch.tensor(START[2:]))
    optimizer = StochasticMetaDescent([first, second], lr=0.1, meta=0.0, forgetting=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        theta = torch.cat([first.flatten(), second])
        (theta @ torch.tensor(H) @ theta / 2).backward()
        optimizer.step(product=product)
    found = torch.cat([optimizer.state[p]["trace"].flatten() for p in (first, second)]).numpy()
    all_rates = np.full(3, 0.1)
    change = (path(all_rates * np.exp(1e-6)) - path(all_rates * np.exp(-1e-6))) / 2e-6
    np.testing.assert_allclose(found, change, rtol=1e-6)
