"""MC dropout: masks of every kind of dropout against enumerated or hand-written thinned networks."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np
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


class TimeMajor(nn.Module):
    """Positions on the first axis inside, as torch's own layers have them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x.transpose(0, 1))
        return (found[0] if isinstance(found, tuple) else found).mean(0)


class Weights(nn.Module):
    """The mask is on the weights; as many outputs as examples are no reason to take them for examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean(1), F.dropout(self.layer.weight, 0.5, self.training), self.layer.bias)


ANYWHERE: dict[str, Any] = {
    "rows": lambda: TimeMajor(nn.Dropout(0.5)),
    "encoder": lambda: TimeMajor(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5)),
    "lstm": lambda: TimeMajor(nn.LSTM(4, 4, 2, dropout=0.5)),
    "weights": Weights,
}


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("kind", ANYWHERE)
def test_examples_on_any_axis_of_a_mask(kind: str, steps: int) -> None:
    """Of N = 3 examples, as many positions, or twice as many, are not taken for examples: positions drop alone."""
    torch.manual_seed(0)
    model, x = ANYWHERE[kind]().double(), normal(1, steps, 4, seed=1)
    drawn = samples(model, torch.cat([x] * 3), 60)
    close(drawn, drawn[:, :1].expand_as(drawn))
    close(samples(model, x, 60), drawn[:, :1])  # alone, too
    torch.manual_seed(1)
    own = torch.stack([model.train()(x)[0] for _ in range(60)])
    alike(drawn[:, 0], own.detach())


def test_masks_drawn_by_probabilities_are_shared_as_well() -> None:
    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            keep = torch.full_like(x, 0.75)
            mask = torch.bernoulli(keep) * torch.distributions.Bernoulli(keep).sample() if self.training else 1.0
            return x * mask

    x = normal(1, 4, seed=1)
    drawn = samples(nn.Sequential(Drawn()).double(), torch.cat([x, x]), 600)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    close((drawn[:, 0] != 0).double().mean(), torch.tensor(0.75**2).double(), 0.1)


def test_arrays_and_functions_of_a_batch() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)), normal(6, 4, seed=1).float()
    wanted = lk.predictive.mc_dropout(model, "categorical", 5, rng(0))(x).probs
    assert torch.equal(lk.predictive.mc_dropout(model, "categorical", 5, rng(0))(x.numpy()).probs, wanted)
    read = lk.predictive.mc_dropout(model, "categorical", 5, rng(0), inputs=lambda b: b["x"], targets=lambda b: b["y"])
    assert torch.equal(read({"x": x, "y": torch.zeros(6)}).probs, wanted)
    for wrong in (0, -1, 2.5, "3", True):
        with pytest.raises(lk.errors.InvalidArgument, match="samples must be a whole number of at least 1"):
            lk.predictive.mc_dropout(model, "categorical", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda: nn.RReLU(), lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
                                  lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))])  # fmt: skip
def test_what_is_no_dropout_is_in_eval_mode(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Dropout(0.0), nn.Linear(4, 2)).double().eval()
    state, x = {name: value.clone() for name, value in model.state_dict().items()}, normal(3, 4, seed=1)
    with pytest.warns(UserWarning, match="nothing to drop"):
        found = lk.predictive.mc_dropout(model.train(), "categorical", 3)(x)
    close(found.probs, model.eval()(x).softmax(-1).detach())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["numpy", "python", "rows"])
def test_random_numbers_that_cannot_be_seen_are_found_out(kind: str) -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            if kind == "python":
                return x * random.random()
            if kind == "rows":  # positions before examples, in one axis
                return F.dropout(x.view(len(x), 2, 2).transpose(0, 1).reshape(-1, 2), 0.5).view(2, -1, 2).sum(0)
            return x * torch.as_tensor(np.random.default_rng().random(x.shape))

    torch.manual_seed(0)
    for x in (normal(4, 4, seed=1), *([normal(1, 4, seed=1)] if kind != "rows" else [])):
        for seed in range(8):  # whatever masks of zeros and ones come up
            predict = lk.predictive.mc_dropout(
                nn.Sequential(nn.Linear(4, 4), Hidden()).double(), "gaussian", 3, rng(seed)
            )
            with pytest.raises(lk.errors.UnsupportedLayer, match="does not have the same outputs"):
                predict(x)


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
