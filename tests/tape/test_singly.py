"""Columns of large layers go back, and into the factors, one by one: no minibatch's worth of them is ever held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.structures.kron import Kronecker
from laplace_kf.tape import backward


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        out: torch.Tensor = self.last((h + torch.tanh(self.second(h))).mean(1))
        return out


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_one_column_at_a_time(structure: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = Branches().double(), (torch.randn(5, 3, 4, dtype=torch.float64), torch.arange(5) % 4)
    options = {"samples": 3} if estimator == "sampled" else {}
    columns: list[int] = []
    original = Kronecker.add_columns

    def counting(self: Kronecker, sums, signals, blocks) -> None:  # type: ignore[no-untyped-def]
        columns.extend(signal.count[0] for name, signal in signals.items() if name == "first")
        original(self, sums, signals, blocks)

    def fitted() -> torch.Tensor:
        posterior = lk.LaplacePosterior(model, "categorical", structure, estimator, **options)
        return posterior.fit(data, generator=torch.Generator().manual_seed(1)).precision.dense()

    monkeypatch.setattr(Kronecker, "add_columns", counting)
    together = fitted()
    if structure == "kron":
        assert columns == [3]
    columns.clear()
    monkeypatch.setattr(backward, "SMALL", 1)
    singly = fitted()
    if structure == "kron":
        assert columns == [1, 1, 1]
    torch.testing.assert_close(singly, together, rtol=1e-12, atol=1e-12)
