"""What ``fit`` and ``tune`` take, what they refuse, and that they leave models and inputs as they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests.classifiers import DOUBLE, data, net, seeded


class ChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.layer(x)


def test_a_model_that_changes_its_input() -> None:
    model, (x, y) = seeded(ChangesInput), data()
    before = x.clone()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    posterior.n_data = 1e14
    drawn = posterior.predict(x, method="mc", samples=7).probs
    torch.testing.assert_close(drawn, posterior.predict(x, method="map").probs, rtol=1e-5, atol=1e-6)
    posterior.tune((x, y), n_data=[6.0], prior_precision=[1.0], method="mc", samples=2)
    assert torch.equal(x, before)


def test_a_zero_in_a_prior_by_patterns_is_not_silent() -> None:
    model, (x, y) = net(4, 5, 3), data(20, 4)
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision={"*weight": 0.0, "*bias": 1.0}).fit((x, y))
    expected = posterior.n_data * posterior.curvature.dense()
    place = {name: k for k, name in enumerate(posterior.mean)}
    prior = [torch.full((v.numel(),), float("bias" in name), **DOUBLE) for name, v in posterior.mean.items()]
    expected = expected + torch.diag(torch.cat(prior))
    assert len(place) == 4
    torch.testing.assert_close(posterior.precision.dense(), expected, rtol=1e-9, atol=1e-12)


def test_fit_inside_inference_mode() -> None:
    model, (x, y) = net(3, 4, 3), data()
    expected = lk.LaplacePosterior(model, "categorical").fit((x, y)).precision.dense()
    with torch.inference_mode():
        found = lk.LaplacePosterior(model, "categorical").fit((x.clone(), y.clone())).precision.dense()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("grid", [np.array([1.0, 10.0]), torch.tensor([1.0, 10.0]), range(1, 3), 5.0])
def test_grids_of_any_kind(grid: Any) -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    result = posterior.tune((x, y), n_data=grid, prior_precision=[1.0, 2.0, 4.0], samples=2, objective="nll")
    assert len(result.table) == 3 * (1 if isinstance(grid, float) else 2)
    with pytest.raises(ValueError, match="empty"):
        posterior.tune((x, y), n_data=[])


def test_the_last_layer_may_be_parametrised_but_not_frozen() -> None:
    model, (x, y) = net(3, 4, 3), data()
    nn.utils.parametrizations.weight_norm(model[2])
    posterior = lk.LaplacePosterior(model, "categorical", "diag", parameters="last_layer").fit((x, y))
    assert set(posterior.mean) == {n for n, _ in model.named_parameters() if n.startswith("2.")}
    frozen = net(3, 4, 3)
    frozen[2].requires_grad_(False)
    with pytest.raises(lk.errors.UnsupportedLayer, match="frozen"):
        lk.LaplacePosterior(frozen, "categorical", parameters="last_layer").fit((x, y))


class Untidy(nn.Module):
    """Counts its calls, remembers features and renormalises an embedding."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 2, max_norm=0.1), nn.LSTM(2, 3, batch_first=True)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.count += 1
        h = self.table(tokens)
        self.features = h
        self.seen.append(h)
        return self.head(h)[0][:, -1]


def test_whatever_the_forward_pass_writes_is_put_back() -> None:
    model, tokens, y = seeded(Untidy), torch.tensor([[0, 1], [2, 2], [3, 0]]), torch.arange(3)
    state = copy.deepcopy(model.state_dict())
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    flat = list(model.head._flat_weights)
    posterior = lk.LaplacePosterior(model, "categorical", "diag").fit((tokens, y))
    posterior.predict(tokens, method="mc", samples=2)
    posterior.tune((tokens, y), n_data=[3.0], prior_precision=[1.0], method="mc", samples=2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert model.seen == []
    assert all(a is b for a, b in zip(model.head._flat_weights, flat, strict=True))
    copy.deepcopy(model)


def test_a_damping_without_effect_is_refused() -> None:
    with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
        lk.LaplacePosterior(net(3, 3), "categorical", "diag", damping="factored")


def test_tune_names_the_bad_validation_batch() -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    bad = x.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(lk.errors.NonFinite, match="1"):
        posterior.tune([(x, y), (bad, y)], n_data=[1.0], prior_precision=[1.0])


def test_the_last_layer_is_one_that_the_outputs_depend_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.first(x))
            return {"logits": self.head(h), "other": self.other(h)}

    posterior = lk.LaplacePosterior(seeded(Net), "categorical", parameters="last_layer").fit(data())
    assert set(posterior.mean) == {"head.weight", "head.bias"}


def test_a_batch_without_examples_is_named() -> None:
    model, (x, y) = nn.Sequential(net(3, 4), nn.LayerNorm(4, **DOUBLE), net(4, 3)), data()
    for structure in ("kron", "full"):
        with pytest.raises(lk.errors.ShapeMismatch, match="batch 1 has no examples"):
            lk.LaplacePosterior(model, "categorical", structure).fit([(x, y), (x[:0], y[:0])])
