"""MC dropout: masks of every kind of dropout against enumerated or hand-written thinned networks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from tests.cases import normal, rng
from tests.checks import close

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (nn.Dropout(0.5), (4, 6)),
    "channels 1d": (nn.Dropout1d(0.5), (4, 3, 5)),
    "channels 2d": (nn.Dropout2d(0.5), (4, 3, 2, 2)),
    "channels 3d": (nn.Dropout3d(0.5), (4, 3, 2, 2, 1)),
    "alpha": (nn.AlphaDropout(0.5), (4, 6)),
    "feature alpha": (nn.FeatureAlphaDropout(0.5), (4, 3, 5)),
    "in place": (nn.Dropout(0.5, inplace=True), (4, 6)),
}


class Flat(nn.Module):
    def __init__(self, drop: Any) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * 1.0).flatten(1)


def samples(model: nn.Module, x: Tensor, count: int, seed: int = 0) -> Tensor:
    return lk.predictive.mc_dropout(model, "gaussian", count, rng(seed))(x, keep_samples=True).samples


def alike(one: Tensor, two: Tensor) -> None:
    """Means and variances of two sets of draws ``(S, F)`` differ by no more than five of their standard errors."""
    for power in (1, 2):
        a, b = ((draws - one.mean(0)) ** power for draws in (one, two))
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert float(((a.mean(0) - b.mean(0)).abs() / (error + 1e-12)).max()) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module(kind: str) -> None:
    """Mean and variance are those of torch's own module; all inputs see one mask."""
    drop, shape = KINDS[kind]
    x = normal(*shape, seed=1).abs() + 0.5
    model = Flat(drop).double()
    drawn = samples(model, torch.cat([x[:1]] * 4), 400)
    assert (drawn == drawn[:, :1]).all()  # the same mask for every input
    torch.manual_seed(0)
    own = torch.stack([model.train()(x[:1]) for _ in range(400)])
    alike(drawn[:, 0], own[:, 0])
    dead = (drawn[:, 0] == drawn[:, 0, :].amin(0)).double()  # whole channels drop, or single entries
    assert torch.equal(dead.T @ dead > 0.75 * 200, _together(kind, shape))


def _together(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Which flattened features drop together."""
    size = torch.Size(shape[1:]).numel()
    channel = torch.arange(size) // (size // shape[1] if "channels" in kind or "feature" in kind else 1)
    return channel[:, None] == channel[None]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x).tanh(), 0.25, self.training))


def test_functional_dropout_by_enumeration() -> None:
    torch.manual_seed(0)
    model, x = Functional().double().eval(), normal(3, 3, seed=1)
    hidden, expected = model.first(x).tanh(), torch.zeros(3, 2).double()
    for mask in product([0.0, 1.0], repeat=2):
        weight = 0.75 ** sum(mask) * 0.25 ** (2 - sum(mask))
        expected = expected + weight * model.last(hidden * torch.tensor(mask) / 0.75).softmax(-1)
    found = lk.predictive.mc_dropout(model, "categorical", 1000, rng(0))(x)
    close(found.probs, expected.detach(), 0.04)
    assert (found.mutual_information > 0).all()


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0).flatten(1)
        return self.inner(x, x, x, need_weights=self.kind == "weights")[0].flatten(1)


@pytest.mark.parametrize("kind", ["sdpa", "weights", "fast"])
def test_attention(kind: str) -> None:
    torch.manual_seed(0)
    model = Attention(kind).double().eval()
    x = normal(1, 5, 4, seed=1)
    drawn = samples(model, torch.cat([x, x, x]), 300)
    close(drawn[:, 0], drawn[:, 2])
    assert drawn[:, 0].std(0).min() > 0.01
    torch.manual_seed(1)
    own = torch.stack([model.train()(x)[0] for _ in range(300)])
    alike(drawn[:, 0], own.detach())


def test_recurrent_layers() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    model, x = Net().double(), normal(1, 5, 3, seed=1)
    drawn = samples(model, torch.cat([x, x, x]), 20)
    close(drawn[:, 0], drawn[:, 1])
    assert drawn[:, 0].std(0).min() > 0


def test_batches_and_gradients() -> None:
    """A sample is one network, batch after batch, and predictions are differentiable in the input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, before = normal(6, 3, seed=1), torch.get_rng_state()
    predict = lk.predictive.mc_dropout(model, "categorical", 7, rng(0))
    whole = predict(x).probs
    close(torch.cat([predict(x[:2]).probs, predict(x[2:3]).probs, predict(x[3:]).probs]), whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.autograd.gradcheck(lambda z: predict(z).probs, x.clone().requires_grad_())
    assert not torch.equal(lk.predictive.mc_dropout(model, "categorical", 7, rng(1))(x).probs, whole)


def test_nothing_to_drop_is_said() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0)).double(), normal(4, 3, seed=1)
    with pytest.warns(UserWarning, match="nothing to drop"):
        found = lk.predictive.mc_dropout(model, "categorical", 3)(x)
    close(found.probs, model(x).softmax(-1).detach())


def test_other_random_numbers_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x) if self.training else x

    with pytest.raises(lk.errors.UnsupportedLayer, match="no dropout mask"):
        lk.predictive.mc_dropout(nn.Sequential(nn.Linear(3, 2), Noisy(), nn.Dropout(0.5)), "categorical", 2)(
            torch.zeros(4, 3)
        )
