"""Columns that go back through the network: together where it is small, and none for targets that are ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import laplace_kf as lk
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.likelihoods.roots import Root
from laplace_kf.tape import Tracer
from laplace_kf.tape import backward as module
from laplace_kf.tape.backward import backward
from tests.cases import normal
from tests.checks import close


class Own(torch.autograd.Function):
    """A function that cannot be vectorised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float(grad.abs().sum() > -1)


def sent_back(own: bool, columns: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    x = normal(5, 4, seed=1).requires_grad_()
    hidden = torch.tanh(x @ normal(4, 6, seed=2))
    other = x * 2  # leads nowhere
    outputs = (Own.apply(hidden) if own else hidden.sin()) @ normal(6, 3, seed=3)  # type: ignore[no-untyped-call]
    edges = [get_gradient_edge(t) for t in (hidden, other)]
    seeds = normal(columns, 5, 3, seed=4)
    found = backward(outputs, edges, [30, 20], seeds)
    expected = [torch.autograd.grad(outputs, hidden, seed, retain_graph=True)[0] for seed in seeds]
    return found, [torch.stack(expected), None]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("columns", [1, 7])
def test_gradients_of_columns(own: bool, columns: int) -> None:
    found, expected = sent_back(own, columns)
    assert found[0] is not None and expected[0] is not None
    close(found[0], expected[0])
    assert found[1] is None


@pytest.mark.parametrize(("limit", "columns", "together"), [(2**17, 7, 1), (2**17, 1, 0), (10, 7, 0)])
def test_small_networks_take_columns_together(
    limit: int, columns: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    plain = module._together

    def spy(*args: Any) -> Any:
        found = plain(*args)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(module, "_together", spy)
    monkeypatch.setattr(module, "SMALL", limit)
    sent_back(False, columns)
    assert sum(calls) == together


def test_what_cannot_be_vectorised_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = module._together
    found: list[Any] = []
    monkeypatch.setattr(module, "_together", lambda *args: found.append(plain(*args)) or found[-1])
    sent_back(True, 7)
    assert found == [None]


def test_columns_of_ignored_targets_are_not_sent_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(3, 10, 4, seed=1), torch.full((3, 10), -100)
    y[0, [1, 7]], y[1, 9], y[2, [0, 4, 8]] = torch.tensor([0, 1]), 2, torch.tensor([1, 1, 0])  # at most 3 of 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    sent: list[int] = []
    plain = Root.columns

    def spy(self: Root, *args: Any) -> Tensor:
        found = plain(self, *args)
        sent.append(len(found))
        return found

    monkeypatch.setattr(Root, "columns", spy)
    found = lk.curvature.estimate(model, "categorical", [(x, y)], structure="full").mean().dense()
    assert sum(sent) == 2 * 3  # C - 1 columns for every place
    close(found, reference(model, x, y))


def reference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = list(model.parameters())
    total = torch.zeros(43, 43, dtype=torch.float64)
    for n, t in (y != -100).nonzero().tolist():
        z = model(x[n, t])
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(c, weights, retain_graph=True)]) for c in z]
        jacobian, p = torch.stack(rows), z.detach().softmax(0)
        total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(x)


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["projection", "sampled"])
def test_as_many_columns_as_were_asked_for_however_many_at_a_time(name: str, at_once: int) -> None:
    model = nn.Linear(3, 4).double()
    x, y = normal(5, 3, seed=1), torch.arange(5) % 4
    estimator = ESTIMATORS[name](samples=5)  # type: ignore[call-arg]
    likelihood = lk.likelihoods.get_likelihood("categorical")
    parts = list(estimator.columns(Tracer(model, None).observe((x, y)), likelihood, torch.Generator(), at_once))  # type: ignore[attr-defined]
    assert sum(map(len, parts)) == 5 and max(map(len, parts)) <= at_once


def test_entries_whose_squares_would_be_denormal_are_dropped() -> None:
    columns = torch.tensor([[1.0, 1e-10], [-1e-20, 0.0]])
    assert torch.equal(module.significant(columns), torch.tensor([[1.0, 1e-10], [0.0, 0.0]]))
    assert torch.equal(module.significant(1e-20 * columns), 1e-20 * torch.tensor([[1.0, 1e-10], [0.0, 0.0]]))
    assert torch.equal(module.significant(columns.double()), columns.double())  # float64 squares them without trouble
