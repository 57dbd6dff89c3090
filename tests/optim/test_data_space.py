"""Steps whose inverses are applied to the factors of the gradient: that they are, and that they are the same steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.optim import data_space
from tests import oracles
from tests.optim import reference as ref

SETTINGS: dict[str, Any] = {"ema": 0.9, "refresh": 5, "damping": "factored", "momentum": True, "zeta": 0.3}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The blocks that every shortened solve was made for."""
    found: list[list[str]] = []
    original = data_space.low_rank_solve

    def spy(matrix: Any, gradient: Tensor, outer: Any, pulls: Any = None) -> Tensor:
        found.append(sorted(outer))
        return original(matrix, gradient, outer, pulls)

    monkeypatch.setattr(data_space, "low_rank_solve", spy)
    return found


class Reshaped(nn.Module):
    """No chain: two branches, so that the pass goes over the tape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        out: Tensor = self.last(h + torch.tanh(self.second(h)))
        return out


def network(kind: str) -> nn.Module:
    if kind == "chain":
        return ref.net([4, 20, 20, 3])
    torch.manual_seed(0)
    return Reshaped().double()


def trained(kind: str, steps: int, **settings: Any) -> Tensor:
    model = network(kind)
    opt = lk.optim.kflr(model, "categorical", **{**SETTINGS, **settings})
    for seed in range(steps):
        opt.step(*ref.batch(5, 4, 3, seed))
    return oracles.flat_parameters(model)


@pytest.mark.parametrize("kind", ["chain", "branches"])
def test_without_weight_decay_the_steps_are_the_same(kind: str, used: list[list[str]]) -> None:
    one, other = (trained(kind, 8, l2=0.0, low_rank=low_rank) for low_rank in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert len(used) == 8 and all(len(names) == 1 for names in used)  # the middle layer


@pytest.mark.parametrize("kind", ["chain", "branches"])
def test_with_weight_decay_they_are_at_a_tolerance_of_nothing(
    kind: str, used: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_space, "LAG", 0.0)  # the pull is made anew whenever the weights have moved
    one, other = (trained(kind, 9, l2=0.05, low_rank=low_rank) for low_rank in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert used  # steps 3, and 5 to 9


def directions(l2: float) -> tuple[Any, Any, Tensor, Any]:
    """An optimiser in the middle of a refresh, its kept matrix, and a minibatch's gradient with its factors."""
    model = network("chain")
    opt = lk.optim.kflr(model, "categorical", l2=l2, low_rank=True, **SETTINGS)
    for seed in range(6):
        opt.step(*ref.batch(5, 4, 3, seed))
    opt._direct = True
    opt._take_in(*ref.batch(5, 4, 3, 9))
    gradient = opt.flat({name: p.grad for name, p in opt.named.items()})
    return opt, opt.running.kept(opt.zeta), gradient, dict(opt._outer)


@pytest.mark.parametrize("l2", [1e-3, 0.05])
def test_the_direction_misses_no_more_than_stated(l2: float) -> None:
    opt, matrix, gradient, outer = directions(l2)
    start, rng = opt.flat(opt.named), torch.Generator().manual_seed(1)
    for shift in (1e-6, 1e-3, 1e-1, 10.0):
        for p in opt.model.parameters():  # by hand, which no counter of torch's shows
            p.data.add_(shift * torch.randn(p.shape, generator=rng, dtype=torch.float64))
        whole = gradient + l2 * (opt.flat(opt.named) - start)
        found, exact = opt.data_space.solve(matrix, whole, outer, opt.named, opt.zeta + l2), matrix.solve(whole)
        assert float((found - exact).norm()) <= 1.01 * data_space.LAG * float(exact.norm())


def test_another_matrix_has_pulls_of_its_own() -> None:
    opt, matrix, gradient, outer = directions(0.05)
    k = opt.zeta + 0.05
    torch.testing.assert_close(
        opt.data_space.solve(matrix, gradient, outer, opt.named, k), matrix.solve(gradient), rtol=0.01, atol=1e-5
    )
    other = opt.running.fresh(opt.zeta * 5)
    found = opt.data_space.solve(other, gradient, outer, opt.named, k)
    torch.testing.assert_close(found, other.solve(gradient), rtol=1e-9, atol=1e-12)


def test_a_loaded_state_goes_on_with_the_same_pull(used: list[list[str]]) -> None:
    model = network("chain")
    opt = lk.optim.kflr(model, "categorical", l2=1e-3, low_rank=True, **SETTINGS)
    for seed in range(7):
        opt.step(*ref.batch(5, 4, 3, seed))
    state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    assert state["second_order"]["pulled_at"]
    opt.step(*ref.batch(5, 4, 3, 7))
    again = network("chain")
    again.load_state_dict(weights)
    other = lk.optim.kflr(again, "categorical", l2=1e-3, low_rank=True, **SETTINGS)
    other.load_state_dict(state)
    used.clear()
    other.step(*ref.batch(5, 4, 3, 7))
    assert used
    torch.testing.assert_close(oracles.flat_parameters(again), oracles.flat_parameters(model), rtol=1e-12, atol=1e-14)
    del state["second_order"]["pulled_at"]  # as older versions wrote them
    other.load_state_dict(state)
    other.step(*ref.batch(5, 4, 3, 7))


def test_k_fac_takes_it_where_it_pays(used: list[list[str]]) -> None:
    for settings in ({}, {"inverse": "block_tridiagonal"}, {"damping": "exact"}, {"low_rank": False}):
        opt = lk.optim.kfac(network("chain"), "categorical", **settings)
        for seed in range(6):
            opt.step(*ref.batch(5, 4, 3, seed))
        assert opt.low_rank == bool(used) == (not settings), settings
        used.clear()


def test_half_precision_and_ignored_targets(used: list[list[str]]) -> None:
    steps = []
    for low_rank in (False, True):
        model = network("chain").bfloat16()
        opt = lk.optim.kflr(model, "categorical", l2=0.0, low_rank=low_rank, **SETTINGS)
        x, y = ref.batch(5, 4, 3, 0)
        opt.step(x.bfloat16(), y.index_fill(0, torch.tensor([1, 3]), -100))
        steps.append(oracles.flat_parameters(model).float())
    torch.testing.assert_close(*steps, rtol=0.02, atol=0.02)
    assert len(used) == 1


def test_gradients_that_may_have_been_changed_are_solved_as_they_are(used: list[list[str]]) -> None:
    model = network("chain")
    opt = lk.optim.kflr(model, "categorical", l2=0.0, low_rank=True, **SETTINGS)
    opt.backward(*ref.batch(5, 4, 3, 0))
    opt.step()
    assert not used
