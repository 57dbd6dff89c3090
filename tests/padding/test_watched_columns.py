"""Which positions count is mostly shown by the columns themselves: no pass of its own asks for it then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.tape import Observation, observation
from tests.checks import close


class Mixing(nn.Module):
    """``(N, T, 3)`` to ``(N, 2)`` by attention, whose weights the data make."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value, self.query, self.out = nn.Linear(3, 4), nn.Linear(3, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((torch.softmax(self.query(x) @ x.mT, -1) @ self.value(x)).mean(1))


def fit(estimator: str, net: nn.Module | None = None) -> Tensor:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    y = torch.tensor([0, 1, 0, 1, 1])
    generator = torch.Generator().manual_seed(2)
    model = (net or Mixing()).double()
    return (
        lk.curvature.estimate(model, "categorical", [(x, y)], estimator=estimator, generator=generator).mean().dense()
    )


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_columns_show_it(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laplace_kf.tape.observation._reaches_all", lambda g: False)
    asked = fit(estimator)
    monkeypatch.undo()
    monkeypatch.setattr(Observation, "_reach", lambda *args: pytest.fail("a pass of its own"))
    close(fit(estimator), asked, 1e-12)


def test_where_they_do_not_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions whose weight underflows to 0 are left out of the input factor."""
    model = nn.ModuleDict({"embed": nn.Linear(3, 4), "out": nn.Linear(4, 2)}).double()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            share = torch.softmax(x[..., :1] * 1e6, 1)  # 1 at one position, 0 at the others
            return self.layers["out"]((share * torch.tanh(self.layers["embed"](x))).sum(1))

    calls = []
    plain = Observation._reach
    monkeypatch.setattr(Observation, "_reach", lambda self, counted: calls.append(1) or plain(self, counted))
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    found = lk.curvature.estimate(Masked(), "categorical", [(x, torch.tensor([0, 1, 0, 1, 1]))])
    best = x[torch.arange(5), x[..., 0].argmax(1)]
    rows = torch.cat([best, torch.ones(5, 1).double()], 1)
    assert calls
    close(found.sums["layers.embed"][0][0], rows.T @ rows, 1e-12)


def test_every_output_is_looked_at_where_some_show_nothing() -> None:
    g = torch.zeros(2, 3, 4, 1, 40)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        assert not observation._reaches_all(g)
        n, t = place
        g[(n + t) % 2, n, t, 0, 1 + (7 * n + t) % 9] = -1e-30  # every tenth is looked at first
    assert observation._reaches_all(g)


class Gated(nn.Module):
    """Few of many units are on, other ones at each position, and attention makes their weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value, self.out = nn.Linear(3, 40), nn.Linear(40, 2)
        self.query = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.value(x) - 0.5)
        return self.out((torch.softmax(self.query(x) @ x.mT, -1) @ h).mean(1))


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_units_that_are_off_hide_no_position(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[bool] = []
    look = observation._reaches_all

    def watched(g: Tensor) -> bool:
        some = g[..., :: max(1, g.shape[-1] // observation.PROBES)]
        first.append(bool((some != 0).flatten(3).any(3).any(0).all()))
        return look(g)

    monkeypatch.setattr(observation, "_reaches_all", watched)
    monkeypatch.setattr(Observation, "_reach", lambda *args: pytest.fail("a pass of its own"))
    found = fit(estimator, Gated())
    assert not all(first)
    monkeypatch.undo()
    monkeypatch.setattr("laplace_kf.tape.observation._reaches_all", lambda g: False)
    close(found, fit(estimator, Gated()), 1e-12)


def test_no_column_is_watched_where_the_answer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pass that was wired like an earlier one; but where targets are ignored, it is another question."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    x = torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(1)).double()
    y = torch.arange(9) % 3
    looks: list[int] = []
    look = observation._reaches_all
    monkeypatch.setattr(observation, "_reaches_all", lambda g: (looks.append(g.shape[1]), look(g))[1])
    asked = []
    plain = Observation._reach
    monkeypatch.setattr(Observation, "_reach", lambda self, counted: asked.append(1) or plain(self, counted))

    def sums(y: Tensor) -> list[Tensor]:
        batches = [(x[k : k + 3], y[k : k + 3]) for k in range(0, 9, 3)]
        found = lk.curvature.estimate(model, "categorical", batches, estimator="sampled",
                                      generator=torch.Generator().manual_seed(2))  # fmt: skip
        return [part for parts in found.sums.values() for part in parts]

    found = sums(y)
    once = len(looks)
    assert once and len(asked) == 1
    monkeypatch.setattr(Observation, "remembered", lambda *args: False)
    looks.clear()
    again = sums(y)
    assert len(looks) > once and len(asked) == 2  # each minibatch is watched, and asks the cache
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(observation, "_reaches_all", lambda g: (looks.append(g.shape[1]), look(g))[1])
    looks.clear()
    ignored = y.clone()
    ignored[[0, 4, 8]] = -100
    sums(ignored)
    assert len(looks) > once
