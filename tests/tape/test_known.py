"""The states of a block: when it is checked against autograd, and what becomes of it when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.tape import Tracer, tracer
from laplace_kf.tape.known import State


class Tower(nn.Sequential):
    """A class of its own: torch's own sequences are not checked (tests/tape/test_sequences.py)."""


def batch(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return x, torch.zeros(count, dtype=torch.long)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the blocks of every comparison with autograd."""
    seen: list[list[str]] = []
    inner = tracer.disagreeing

    def watched(observation, blocks, *rest):
        seen.append([block.name for block in blocks])
        return inner(observation, blocks, *rest)

    monkeypatch.setattr(tracer, "disagreeing", watched)
    return seen


def states(traced: Tracer) -> set[State]:
    unchecked = traced.known.unchecked()
    return {unchecked.get(name, State.PASSED) for name in traced.blocks}


def test_a_block_is_checked_until_it_has_passed_on_several_examples(checks: list[list[str]]) -> None:
    traced = Tracer(Tower(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), None)
    traced.observe(batch(1))
    assert states(traced) == {State.TRIED}
    traced.observe(batch(5))
    assert states(traced) == {State.PASSED}
    traced.observe(batch(4))
    assert checks == [["0", "2"]] * 2


def test_a_block_is_checked_again_when_its_parameters_are_used_more_often(checks: list[list[str]]) -> None:
    model = nn.Linear(3, 2)
    traced = Tracer(model, lambda model, batch: (sum(model(batch[0]) for _ in range(len(batch[0]))), batch[1]))
    traced.observe(batch(2))
    traced.observe(batch(2))
    assert len(checks) == 1
    traced.observe(batch(3))
    traced.observe(batch(3))
    assert len(checks) == 2
    assert states(traced) == {State.PASSED}


class Twice(torch.autograd.Function):
    """``h + b``, behind the tape's back."""

    @staticmethod
    def forward(ctx, h: Tensor, b: Tensor) -> Tensor:
        return h + b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum(0)


class Behind(nn.Module):
    """Its first bias acts once more where no rule sees it, always or in minibatches of more than two examples."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always, self.first, self.head = always, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = Twice.apply(h, self.first.bias) if self.always or len(x) > 2 else h
        return self.head(h)


def test_a_fresh_block_that_fails_goes_through_single_examples() -> None:
    traced = Tracer(Behind(always=True), None)
    traced.observe(batch(4))
    assert traced.example_wise == {"first"}
    assert set(traced.blocks) == {"first", "head"}
    assert traced.known.hidden == {"first.weight", "first.bias"}
    assert not traced.known.refuted  # no rule is to blame: the parameter is used outside the calls


def test_what_was_planned_anew_may_not_fail_later() -> None:
    """A minibatch went into its sums."""
    traced = Tracer(Behind(always=True), None)
    traced.observe(batch(4))
    assert traced.known.unchecked() == {"first": State.TRIED}


def test_a_block_that_fails_after_a_minibatch_is_refused() -> None:
    traced = Tracer(Behind(always=False), None)
    traced.observe(batch(2))
    with pytest.raises(UnsupportedLayer, match=r"first\.bias, first\.weight are used one way in one minibatch"):
        traced.observe(batch(4))
