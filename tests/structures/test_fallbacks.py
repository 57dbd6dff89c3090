"""Where less is kept than the structure promises, ``summary()`` says so with the reason, and one warning does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk


class Product(nn.Module):
    """A matrix that no rule knows: its elementwise square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ (self.weight**2).T))


class Twice(nn.Module):
    """One parameter that is a matrix and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)) + self.one.weight[0])


class Shared(nn.Module):
    """Rows that belong to all examples: positions that one table gives to the whole minibatch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.table(torch.tensor([1]))[0])


FALLBACKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, str]] = {
    "no rule": (Product, {}, "weight", "no rule for"),
    "several ways": (Twice, {}, "one", "no rule for"),
    "shared rows": (Shared, {}, "table", ""),
    "wide input": (lambda: nn.Sequential(nn.Linear(3, 3)), {"max_side": 3}, "0", "input factor of 4 rows"),
    "wide output": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)), {"max_side": 4}, "0",
        "output factor of 6 rows",
    ),
}  # fmt: skip


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=g).double(), torch.randint(0, 3, (6,), generator=g)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("name", FALLBACKS)
def test_every_fallback_is_seen(name: str, structure: str, tmp_path: Path) -> None:
    make, options, block, reason = FALLBACKS[name]
    torch.manual_seed(0)
    model = make().double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = lk.LaplacePosterior(model, "categorical", structure=structure, **options).fit([data()] * 3)
    mine = [w for w in caught if "keeps less than" in str(w.message)]
    assert len(mine) == 1, "one warning, not one a minibatch"
    assert repr(block) in str(mine[0].message) and reason in str(mine[0].message)
    assert mine[0].filename == __file__, "it points at the line that asked for it"
    row = next(row for row in posterior.summary() if row.name == block)
    assert reason in row.note and row.note
    assert row.note in str(posterior.summary())
    posterior.save(tmp_path / "p.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "p.safetensors", model).summary()
    assert next(r for r in again if r.name == block).note == row.note


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full"])
def test_what_is_kept_in_full_is_not_warned_of(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(data())
    assert not any(row.note for row in posterior.summary())


def test_dense_blocks_are_not_poorer() -> None:
    """The reason stays in the table, and nothing is warned of."""
    torch.manual_seed(0)
    model = Product().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = lk.LaplacePosterior(model, "categorical", structure="kron", vector_blocks="full").fit(data())
    assert "no rule for" in next(row for row in posterior.summary() if row.name == "weight").note
