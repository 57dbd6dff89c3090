"""Which positions are reached is remembered only where another minibatch cannot have another answer.

Every network here is given minibatches that differ in what they connect; together they must give the sums that each of
them gives by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import laplace_kf as lk
from laplace_kf.tape import observation as passes
from laplace_kf.tape.reach import reached
from tests.padding.networks import CLASSES, rng, seeded

STEPS = 5


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No column shows which positions count (tests/padding/test_watched_columns.py), so that it has to be asked."""
    monkeypatch.setattr("laplace_kf.tape.observation._reaches_all", lambda g: False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it was asked which positions are reached."""
    calls: list[int] = []
    original = passes.reached

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(passes, "reached", counted)
    return calls


def together_as_alone(model: nn.Module, batches: list[Any]) -> Any:
    """The sums of all minibatches, checked against those of one fit each."""
    found = lk.curvature.estimate(model, "categorical", batches, "kron")
    alone = [lk.curvature.estimate(model, "categorical", [batch], "kron") for batch in batches]
    for name, parts in found.sums.items():
        for k, part in enumerate(parts):
            expected = sum(one.sums[name][k] for one in alone)
            assert float((part - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    return found


def data(seed: int = 0, count: int = 4, width: int = 2) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(count, STEPS, width, generator=rng(seed)).double(),
        torch.randint(0, CLASSES, (count,), generator=rng(seed)),
    )


class Net(nn.Module):
    """A layer on steps, and a head; ``connect(self, steps, extra)`` says how the head gets them."""

    def __init__(self, connect: Callable[[Net, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 3), nn.Linear(3, CLASSES)
        self.connect = connect
        self.gate = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.ones(STEPS, 1))

    def forward(self, x: Tensor, extra: Any) -> Tensor:
        return self.head(self.connect(self, self.body(x), extra).mean(1)) + 0 * self.gate


def written(net: Net, h: Tensor, extra: int) -> Tensor:
    """A mask in a buffer that is written anew."""
    net.mask[:] = (torch.arange(STEPS) < extra)[:, None].to(net.mask)
    return h * net.mask


def unseen(net: Net, h: Tensor, extra: int) -> Tensor:
    """A buffer that is written past its version counter."""
    net.mask.data.copy_((torch.arange(STEPS) < extra)[:, None])
    return h * net.mask


def numbered(net: Net, h: Tensor, extra: int) -> Tensor:
    """The length as a number that leaves a tensor."""
    return h[:, : int(torch.tensor(extra))]


def picked(net: Net, h: Tensor, extra: int) -> Tensor:
    """Plain Python picks among equal tensors."""
    parts = [h[:, :2], h[:, 2:4]]
    return parts[extra % 2]


def picked_step(net: Net, h: Tensor, extra: int) -> Tensor:
    return h.unbind(1)[extra - 1][:, None]


def gated(net: Net, h: Tensor, extra: int) -> Tensor:
    """The mask comes in through a product with a parameter."""
    gate = net.gate.double() * (torch.arange(STEPS) < extra)[:, None].to(h)
    return h * gate


def scaled(net: Net, h: Tensor, extra: int) -> Tensor:
    """A switch of one element."""
    return torch.cat([h[:, :2] * torch.tensor(float(extra > 2)), h[:, 2:]], 1)


def scaled_by_number(net: Net, h: Tensor, extra: int) -> Tensor:
    return torch.cat([h[:, :2] * float(extra > 2), h[:, 2:]], 1)


def indexed(net: Net, h: Tensor, extra: int) -> Tensor:
    return h[:, torch.arange(extra)]


def listed(net: Net, h: Tensor, extra: int) -> Tensor:
    """Plain numbers that the batch brought."""
    return h[:, [0, *([extra % STEPS] * 2), 1]]


def assigned(net: Net, h: Tensor, extra: int) -> Tensor:
    h = h + 0
    h[:, extra:] = 0.0
    return h


def filled(net: Net, h: Tensor, extra: int) -> Tensor:
    return h.masked_fill((torch.arange(STEPS) >= extra)[:, None], 0.0)


def branched(net: Net, h: Tensor, extra: int) -> Tensor:
    """Looks at the data to choose."""
    return h[:, :2] if bool(torch.tensor(extra) > 2) else h


def cut(net: Net, h: Tensor, extra: int) -> Tensor:
    return torch.cat([h[:, :extra], h[:, extra:].detach()], 1)


def weighted(net: Net, h: Tensor, extra: int) -> Tensor:
    return ((torch.arange(STEPS) < extra).to(h) @ h)[:, None]


def attended(net: Net, h: Tensor, extra: int) -> Tensor:
    mask = (torch.arange(STEPS) < extra)[None]
    return nn.functional.scaled_dot_product_attention(h[:, :1], h, h, attn_mask=mask)


class Keeping(torch.autograd.Function):
    """Hands on the first steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: int) -> Tensor:
        ctx.keep = keep
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * (torch.arange(grad.shape[1]) < ctx.keep).to(grad)[:, None], None


def own(net: Net, h: Tensor, extra: int) -> Tensor:
    return Keeping.apply(h, extra)


def viewed(net: Net, h: Tensor, extra: int) -> Tensor:
    """Writes into a view of some steps, and reads the whole."""
    h = h + 0
    h[:, :2].mul_(float(extra > 2))
    return h


CONNECTIONS = [
    written, unseen, numbered, picked, picked_step, gated, scaled, scaled_by_number, indexed, listed, assigned,
    filled, branched, cut, weighted, attended, own, viewed,
]  # fmt: skip


@pytest.mark.parametrize("connect", CONNECTIONS)
def test_minibatches_that_connect_otherwise_are_not_mistaken(connect: Callable[..., Tensor]) -> None:
    model = seeded(lambda: Net(connect)).double()
    x, y = data()
    found = together_as_alone(model, [((x, extra), y) for extra in (5, 2, 3, 2)])
    assert float(found.sums["body"][2]) < 4 * x.shape[0] * STEPS, "some steps are cut off in this case"


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(CONNECTIONS), st.integers(1, 5)), min_size=2, max_size=4), st.integers(0, 99))
def test_random_orders_of_ways_to_connect(ways: list[tuple[Callable[..., Tensor], int]], seed: int) -> None:
    """A network that does something else in every minibatch."""
    model = seeded(lambda: Net(lambda net, h, extra: ways[extra][0](net, h, ways[extra][1])), seed).double()
    together_as_alone(model, [((data(k)[0], k), data(k)[1]) for k in range(len(ways))])


class Cells(nn.Module):
    """A cell that runs over the steps; the head reads the step that a plain number of the batch names."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(5, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor, length: int) -> Tensor:
        state, states = x.new_zeros(len(x), 3), []
        for t in range(STEPS):
            state = torch.tanh(self.cell(torch.cat([x[:, t], state], 1)))
            states.append(state)
        return self.head(states[length - 1])


def test_the_step_that_is_read_counts(asked: list[int]) -> None:
    model, (x, y) = seeded(Cells).double(), data()
    lengths = (5, 2, 3, 5, 2)
    found = lk.curvature.estimate(model, "categorical", [((x, length), y) for length in lengths], "kron")
    assert float(found.sums["cell"][2]) == len(x) * sum(lengths)
    assert len(asked) == 3, "each length once"


def test_ignored_targets_are_asked_about_every_time() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, CLASSES))).double()
    x, batches = data()[0], []
    for length in (5, 2, 5, 3):
        y = torch.randint(0, CLASSES, (4, STEPS), generator=rng(length))
        y[:, length:] = -100
        batches.append((x, y))
    found = together_as_alone(model, batches)
    assert float(found.sums["0"][2]) == 4 * 15


def test_weights_that_were_set_to_zero_are_seen_by_the_next_fit(asked: list[int]) -> None:
    """What was found is kept no longer than the weights."""
    model = seeded(lambda: nn.Sequential(nn.Conv1d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, CLASSES)))
    model = model.double()
    x, y = data()
    batches = [(x.transpose(1, 2), y)] * 2
    before = lk.curvature.estimate(model, "categorical", batches, "kron")
    model[3].weight.data[:, 1::2] = 0.0  # the second position of every channel
    after = lk.curvature.estimate(model, "categorical", batches, "kron")
    assert float(before.sums["0"][2]) == 2 * float(after.sums["0"][2]) == 16
    assert len(asked) == 2


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(),
        nn.Conv2d(2, 3, 1), nn.Hardtanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, CLASSES)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x) + x
        h = h + torch.relu(self.norm(self.two(h))) * 0.5
        return self.three(nn.functional.adaptive_avg_pool2d(h, 1).flatten(1))


class Encoder(nn.Module):
    """Down, up and the skip that joins them; a class per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 2, 2, stride=2), nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.head = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.up(nn.functional.silu(self.down(x))), x], 1))


@pytest.mark.parametrize("make", [lenet, Residual, Encoder])
def test_networks_without_masks_are_asked_once(make: Callable[[], nn.Module], asked: list[int]) -> None:
    model = seeded(make).double().eval()
    shape = (4, 8, 8) if make is Encoder else (4,)
    batches = [
        (torch.randn(4, 1, 8, 8, generator=rng(k)).double(), torch.randint(0, CLASSES, shape, generator=rng(k)))
        for k in range(4)
    ]
    lk.curvature.estimate(model, "categorical", batches, "kron")
    assert len(asked) == 1
    together_as_alone(model, batches)
    asked.clear()
    lk.curvature.estimate(model, "categorical", [*batches, (batches[0][0][:2], batches[0][1][:2])], "kron")
    assert len(asked) == 2, "another number of examples is another question"
    asked.clear()
    lk.curvature.estimate(model, "categorical", batches, "diag")
    assert not asked, "no counts, no question"


@pytest.mark.parametrize("normalise", [lambda: nn.LayerNorm(3), lambda: nn.Softmax(-1), nn.Softsign, nn.GLU])
def test_functions_that_can_cancel_are_asked_about_every_time(
    normalise: Callable[[], nn.Module], asked: list[int]
) -> None:
    half = 2 if normalise is nn.GLU else 1
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3 * half), normalise(), nn.Linear(3, CLASSES))).double()
    x, y = data()[0], torch.randint(0, CLASSES, (4, STEPS), generator=rng(0))
    lk.curvature.estimate(model, "categorical", [(x, y)] * 3, "kron")
    assert len(asked) == 3


def test_half_precision_is_asked_about_every_time(asked: list[int]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, CLASSES))).bfloat16()
    x, y = data()[0].bfloat16(), torch.randint(0, CLASSES, (4, STEPS), generator=rng(0))
    lk.curvature.estimate(model, "categorical", [(x, y)] * 3, "kron")
    assert len(asked) == 3


@pytest.mark.parametrize("cut", [False, True])
def test_windows_of_a_maximum_are_reached_and_nothing_else(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows with gaps between them, weights that sum to nothing; where all is counted, one image says it for all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2, 3, padding=1), nn.Conv2d(2, 1, 2), nn.Flatten()).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]])[None])
    seen: list[tuple[int, ...]] = []
    spread = F.conv_transpose2d
    monkeypatch.setattr(
        F, "conv_transpose2d", lambda x, *args, **more: (seen.append(tuple(x.shape)), spread(x, *args, **more))[1]
    )
    hidden = model[0](torch.randn(3, 1, 8, 8).double())
    outputs = model[1:](hidden)
    counted = torch.ones_like(outputs, dtype=torch.bool)
    counted[1] = not cut
    (found,) = reached(outputs, [get_gradient_edge(hidden)], counted)
    looked = torch.zeros(8, dtype=torch.bool)
    looked[[0, 2, 3, 5, 6]] = True  # windows [-1, 0], [2, 3], [5, 6]
    wanted = (looked[:, None] & looked).expand(3, 2, 8, 8).clone()
    wanted[1] &= not cut
    assert torch.equal(found != 0, wanted)
    assert seen == ([(6, 1, 3, 3)] if cut else [(1, 1, 3, 3)])
