"""Squares of gradients that are sums over positions: the short way against whole gradients of every example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import laplace_kf as lk
from laplace_kf.tape import signals
from laplace_kf.tape.blocks import Block
from laplace_kf.tape.signals import OuterSignals, Signals


def made(groups: int, bias: bool, width: int, gathered: bool, dtype: torch.dtype) -> OuterSignals:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    names = ("w", "b") if bias else ("w",)
    shapes = ((groups * 3, width), (groups * 3,)) if bias else ((groups * 3, width),)
    block = Block("layer", names, shapes, (groups, 3, width + bias), object(), True)  # type: ignore[arg-type]
    a = normal(5, 4, groups, width)
    if gathered:
        return OuterSignals(block, a, normal(1, 7, 4, groups, 3), torch.tensor([0, 2, 2, 4, 1, 0, 3]))
    return OuterSignals(block, a, normal(2, 5, groups, 3, 4).movedim(-1, 2))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("cached", [1, 40, 2**19])
def test_squares_over_positions(
    groups: int, bias: bool, gathered: bool, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal = made(groups, bias, 6, gathered, torch.float64)
    expected = torch.ones(signal.block.shape, dtype=torch.float64)
    Signals.add_squares(signal, expected)
    monkeypatch.setattr(signals, "CACHED", cached)
    monkeypatch.setattr(Signals, "chunks", None)  # nothing asks for whole gradients
    found = torch.ones(signal.block.shape, dtype=torch.float64)
    signal.add_squares(found)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_bias_on_its_own_and_half_precision() -> None:
    signal = made(1, True, 0, False, torch.float64)
    expected, found = (torch.zeros(signal.block.shape, dtype=torch.float64) for _ in range(2))
    Signals.add_squares(signal, expected)
    signal.add_squares(found)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    half = made(1, True, 6, False, torch.bfloat16)
    expected, found = (torch.zeros(half.block.shape) for _ in range(2))
    Signals.add_squares(half, expected)
    half.add_squares(found)
    torch.testing.assert_close(found, expected)


def test_convolutions_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 3)
    ).double()
    data = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.arange(6) % 3
    short = lk.LaplacePosterior(model, "categorical", "diag").fit(data).precision.diag()
    calls: list[int] = []

    def whole(self: OuterSignals, total: Tensor) -> None:
        calls.append(1)
        Signals.add_squares(self, total)

    monkeypatch.setattr(OuterSignals, "_add_squares_over_positions", whole)
    general = lk.LaplacePosterior(model, "categorical", "diag").fit(data).precision.diag()
    assert calls
    torch.testing.assert_close(short, general, rtol=1e-12, atol=1e-12)
