"""Which example a row belongs to: named by two or three backward passes, asked digit by digit where that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import laplace_kf as lk
from laplace_kf.tape import owners as module
from laplace_kf.tape.owners import measured
from tests.cases import normal


def call(hidden: Tensor) -> Any:
    """A call whose output ``(B, d)`` has a row for every entry of the first axis."""
    return SimpleNamespace(edge=get_gradient_edge(hidden), shape=hidden.shape, leading=1, source=None)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of columns that were sent back."""
    sent: list[int] = []
    plain = module.backward

    def spy(outputs: Tensor, edges: Any, sizes: Any, columns: Tensor) -> Any:
        sent.append(len(columns))
        return plain(outputs, edges, sizes, columns)

    monkeypatch.setattr(module, "backward", spy)
    return sent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "columns"), [(2, 2), (32, 2), (33, 3), (300, 3)])
def test_rows_in_any_order_are_named(count: int, columns: int, dtype: torch.dtype, passes: list[int]) -> None:
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))
    hidden = normal(2 * count, 3, seed=1).to(dtype).requires_grad_().tanh()
    outputs = hidden[order].reshape(count, 6) @ normal(6, 2, seed=2).to(dtype)
    (found,) = measured([call(hidden)], outputs)
    assert torch.equal(found.example[order], torch.arange(count).repeat_interleave(2))
    assert bool(found.known.all()) and not found.several
    assert passes == [columns]


def test_rows_that_lead_nowhere_are_unknown() -> None:
    hidden = normal(5, 3, seed=1).requires_grad_().sin()
    unused = hidden * 2
    found, none = measured([call(hidden), call(unused)], hidden[[3, 1]].exp())
    assert found.known.tolist() == [False, True, False, True, False]
    assert found.example.tolist() == [0, 1, 0, 0, 0]
    assert not bool(none.known.any()) and not none.several


@pytest.mark.parametrize(
    ("count", "members"),
    [(6, [0, 1, 2, 3, 4, 5]), (6, [2, 5]), (40, [7, 39]), (65, [0, 2, 64]), (1025, [0, 1024])],
)
def test_rows_of_several_examples_are_found(count: int, members: list[int], passes: list[int]) -> None:
    """Of the same gradients, also where their powers of two add up to that of another example (0, 2, 64: 33)."""
    hidden = normal(count + 1, 1, seed=1).float().requires_grad_() * 1.0
    rows = torch.arange(count)
    rows[members] = count  # the last row is theirs
    (found,) = measured([call(hidden)], hidden[rows])
    assert found.several
    assert len(passes) > 1


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_numbers_at_the_end_of_their_range_are_asked_digit_by_digit(size: float, passes: list[int]) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    hidden = normal(40, 3, seed=1).float().requires_grad_().tanh()
    outputs = hidden[order] @ (normal(3, 2, seed=2).float() * size)
    (found,) = measured([call(hidden)], outputs)
    assert torch.equal(found.example[order], torch.arange(40))
    assert bool(found.known.all()) and not found.several
    assert sum(passes) > 3


def test_a_fit_finds_the_rows_of_many_examples_in_three_columns(passes: list[int]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x.transpose(0, 1)))  # positions first
            out: Tensor = self.second(hidden).transpose(0, 1)
            return out

    torch.manual_seed(0)
    x, y = normal(100, 5, 3, seed=1).float(), torch.arange(500).reshape(100, 5) % 2
    lk.curvature.estimate(Last(), "categorical", (x, y), "kron")
    assert passes == [3]
