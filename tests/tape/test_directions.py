"""Products of per-example gradients with directions, and sums over them: two ways each, and which one is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_kf.tape import signals
from laplace_kf.tape.blocks import Block
from laplace_kf.tape.signals import LookupSignals, OuterSignals, Signals

TOKENS = torch.tensor([[0, 2, 2, 5], [1, -1, 0, 1], [3, 3, 3, 4]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outer(groups: int, bias: bool, columns: int, gathered: bool) -> OuterSignals:
    shapes = ((groups * 3, 6), (groups * 3,)) if bias else ((groups * 3, 6),)
    names = ("w", "b") if bias else ("w",)
    block = Block("layer", names, shapes, (groups, 3, 6 + bias), object(), True)  # type: ignore[arg-type]
    a = normal(5, 4, groups, 6)
    if gathered:
        return OuterSignals(block, a, normal(1, 7, 4, groups, 3, seed=1), torch.tensor([0, 2, 2, 4, 1, 0, 3]))
    return OuterSignals(block, a, normal(columns, 5, 4, groups, 3, seed=1))


def lookup(columns: int) -> LookupSignals:
    block = Block("table", ("w",), ((6, 3),), (1, 3, 6), object(), True, one_hot=True)  # type: ignore[arg-type]
    return LookupSignals(block, TOKENS, normal(columns, 3, 4, 1, 3, seed=1))


def compared(signal: Signals, count: int) -> None:
    """With the gradients themselves."""
    rows = signal.jacobian()  # (V·N, P_b)
    directions = normal(count, *signal.block.shape, seed=2)
    torch.testing.assert_close(signal.project(directions), rows @ directions.flatten(1).T, rtol=1e-12, atol=1e-12)
    weights, total = normal(len(rows), count, seed=3), normal(count, *signal.block.shape, seed=4)
    expected = total + (weights.T @ rows).reshape(total.shape)
    signal.add_combined(total, weights)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every run of per-example gradients that is asked for."""
    asked: list[int] = []
    chunks = Signals.chunks
    monkeypatch.setattr(Signals, "chunks", lambda self, dtype: asked.append(1) or chunks(self, dtype))
    return asked


@pytest.mark.parametrize("working", [1, 64 * 2**20])
def test_both_ways_and_which_is_taken(gradients: list[int], working: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many directions: by gradients. Many columns and few directions, or one: position by position."""
    monkeypatch.setattr(signals, "WORKING_BYTES", working)
    for groups in (1, 2):
        for bias in (False, True):
            for gathered in (False, True):
                for columns, count, by_gradients in ((1, 9, True), (1, 1, False), (8, 2, gathered), (8, 90, True)):
                    gradients.clear()
                    compared(outer(groups, bias, columns, gathered), count)
                    assert len(gradients) == (2 if by_gradients else 0), (groups, bias, gathered, columns, count)


def test_one_position_needs_no_gradients(gradients: list[int]) -> None:
    signal = outer(1, True, 2, False)
    compared(OuterSignals(signal.block, signal.a[:, :1], signal.g[:, :, :1]), 90)
    assert not gradients


@pytest.mark.parametrize(("columns", "count", "by_gradients"), [(1, 90, True), (8, 90, True), (8, 2, False)])
def test_tokens(gradients: list[int], columns: int, count: int, by_gradients: bool) -> None:
    compared(lookup(columns), count)
    assert bool(gradients) == by_gradients


def test_a_large_vocabulary_is_never_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    small = lookup(1)
    block = Block("table", ("w",), ((50_000, 3),), (1, 3, 50_000), object(), True, one_hot=True)  # type: ignore[arg-type]
    monkeypatch.setattr(Signals, "chunks", None)
    directions = normal(90, 1, 3, 6)
    padded = torch.nn.functional.pad(directions, (0, 50_000 - 6))
    found = LookupSignals(block, small.tokens, small.g).project(padded)
    torch.testing.assert_close(found, small.jacobian() @ directions.flatten(1).T, rtol=1e-12, atol=1e-12)
