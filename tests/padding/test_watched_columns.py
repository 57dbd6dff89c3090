"""Which positions count is mostly shown by the columns themselves: no pass of its own asks for it then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.tape import Observation
from tests.checks import close


class Mixing(nn.Module):
    """``(N, T, 3)`` to ``(N, 2)`` by attention, whose weights the data make."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value, self.query, self.out = nn.Linear(3, 4), nn.Linear(3, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((torch.softmax(self.query(x) @ x.mT, -1) @ self.value(x)).mean(1))


def fit(estimator: str) -> Tensor:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)).double()
    y = torch.tensor([0, 1, 0, 1, 1])
    generator = torch.Generator().manual_seed(2)
    model = Mixing().double()
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
