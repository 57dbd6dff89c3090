"""The estimators beside scikit-learn's own checks, and in its tools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import laplace_kf as lk

pytest.importorskip("sklearn")

from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from laplace_kf.bridges.sklearn import LaplaceClassifier, LaplaceRegressor

# Few epochs with large steps: the checks fit two hundred times, and the defaults are met in the tests below.
QUICK: dict[str, Any] = {"epochs": 20, "lr": 0.05}


@parametrize_with_checks([LaplaceClassifier(**QUICK), LaplaceRegressor(**QUICK)])
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def moons(count: int = 120) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 2))
    return x, np.where(x[:, 0] * x[:, 1] > 0, "same", "other")


def test_probabilities_are_those_of_the_posterior() -> None:
    x, y = moons()
    found = LaplaceClassifier(random_state=0).fit(x, y)
    assert list(found.classes_) == ["other", "same"] and found.score(x, y) > 0.9
    probs = found.posterior_.predict(torch.tensor(x)).probs
    np.testing.assert_allclose(found.predict_proba(x), probs.numpy())
    assert found.posterior_.prior_precision == found.tuning_.best["prior_precision"]
    again = LaplaceClassifier(random_state=0).fit(x, y)
    np.testing.assert_array_equal(again.predict_proba(x), found.predict_proba(x))


def test_deviations_are_those_of_new_observations() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, size=(200, 1))
    y = 50 + 30 * np.sin(2 * x[:, 0]) + 3 * rng.normal(size=200)
    found = LaplaceRegressor(random_state=0, epochs=150).fit(x, y)
    mean, std = found.predict(x, return_std=True)
    assert mean.shape == std.shape == (200,)
    assert found.score(x, y) > 0.95
    assert 2 < float(np.median(std)) < 5  # the noise, which the evidence finds
    prediction = found.posterior_.predict(torch.tensor(x))
    np.testing.assert_allclose(std**2, prediction.variance[:, 0].numpy())
    far = found.predict(np.array([[8.0]]), return_std=True)[1]
    assert far[0] > 1.3 * np.median(std)
    two = LaplaceRegressor(random_state=0, epochs=5).fit(x, np.stack([y, -y], 1))
    assert two.predict(x).shape == (200, 2) and two.predict(x, return_std=True)[1].shape == (200, 2)


def test_pipelines_and_grid_search() -> None:
    x, y = load_iris(return_X_y=True)
    chain = make_pipeline(StandardScaler(), LaplaceClassifier(epochs=30, random_state=0))
    search = GridSearchCV(chain, {"laplaceclassifier__structure": ["diag", "kron"]}, cv=2, error_score="raise")
    assert search.fit(x, y).best_score_ > 0.85
    assert search.best_estimator_[-1].posterior_.structure.name in ("diag", "kron")


class Net(nn.Module):
    """Two layers; logits or probabilities."""

    def __init__(self, features: int = 2, outputs: int = 2, probabilities: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, outputs))
        self.probabilities = probabilities

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out.softmax(-1) if self.probabilities else out


def test_modules_and_functions() -> None:
    x, y = moons()
    torch.manual_seed(0)
    own = Net()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    found = LaplaceClassifier(own, epochs=60, structure="full", random_state=0).fit(x.astype(np.float32), y)
    assert found.score(x, y) > 0.9 and found.posterior_.structure.name == "full"
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    made = LaplaceClassifier(Net, epochs=60, structure="lowrank", options={"rank": 5}, random_state=0).fit(x, y)
    assert made.score(x, y) > 0.9
    taken = LaplaceClassifier(found.module_, epochs=0, tune=False, prior_precision=3.0).fit(x, y)
    assert torch.equal(taken.module_.layers[0].weight, found.module_.layers[0].weight)
    assert taken.posterior_.prior_precision == 3.0 and taken.tuning_ is None
    single = LaplaceClassifier(lambda d, c: Net(d, c), epochs=60, likelihood="bernoulli", random_state=0).fit(x, y)
    assert single.predict_proba(x).shape == (120, 2) and single.score(x, y) > 0.9


@pytest.mark.parametrize("probabilities", [True, False])
def test_networks_of_skorch(probabilities: bool) -> None:
    skorch = pytest.importorskip("skorch")
    x, y = moons()
    criterion = nn.NLLLoss if probabilities else nn.CrossEntropyLoss
    net = skorch.NeuralNetClassifier(
        Net, module__probabilities=probabilities, criterion=criterion, max_epochs=60, lr=0.1,
        optimizer__momentum=0.9, batch_size=32, train_split=None, verbose=0,
    )  # fmt: skip
    found = LaplaceClassifier(net, random_state=0).fit(x, y)
    assert found.score(x, y) > 0.9
    mean = found.posterior_.predict(torch.tensor(x, dtype=torch.float32), method="map").probs
    logits = found.module_(torch.tensor(x, dtype=torch.float32))
    torch.testing.assert_close(mean, logits.softmax(-1).detach())
    line = skorch.NeuralNetRegressor(
        Net, module__features=1, module__outputs=1, max_epochs=30, lr=0.05, train_split=None, verbose=0
    )
    t = np.linspace(-1, 1, 80)[:, None]
    assert LaplaceRegressor(line, random_state=0).fit(t, 2 * t[:, 0]).score(t, 2 * t[:, 0]) > 0.8


def test_refusals() -> None:
    x, y = moons(20)
    with pytest.raises(NotFittedError):
        LaplaceClassifier().predict(x)
    with pytest.raises(ValueError, match="one class"):
        LaplaceClassifier().fit(x, np.zeros(20))
    with pytest.raises(lk.errors.IncompatiblePair, match="skorch"):
        LaplaceClassifier(StandardScaler()).fit(x, y)
    with pytest.raises(lk.errors.UnknownName):
        LaplaceClassifier(structure="krn", epochs=1).fit(x, y)
    with pytest.raises(ValueError, match="bernoulli"):
        LaplaceClassifier(likelihood="bernoulli").fit(x, np.arange(20) % 3)


def test_networks_are_trained_on_the_loss_of_the_likelihood() -> None:
    """Outputs of a Poisson likelihood are log rates, and those of predicted noise are two."""
    x = np.linspace(-1, 1, 60)[:, None]
    rates = np.exp(1 + x[:, 0])
    counts = np.random.default_rng(0).poisson(rates)
    found = LaplaceRegressor(likelihood="poisson", epochs=60, random_state=0).fit(x, counts)
    assert np.abs(found.predict(x) / rates - 1).max() < 0.5
    spread = np.random.default_rng(0).normal(size=60) * np.where(x[:, 0] > 0, 2.0, 0.1)
    noisy = LaplaceRegressor(
        module=lambda features, outputs: nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, 2 * outputs)),
        likelihood="heteroscedastic_gaussian", epochs=60, random_state=0,
    ).fit(x, spread)  # fmt: skip
    deviations = noisy.predict(x, return_std=True)[1]
    assert deviations[-1] > 5 * deviations[0]


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    x, y = moons(30)
    for outputs in (1, 3):  # with 3, labels were looked up beyond the classes
        with pytest.raises(lk.errors.ShapeMismatch, match=rf"outputs \(1, {outputs}\).*2 classes.*must be \(1, 2\)"):
            LaplaceClassifier(module=nn.Linear(2, outputs), epochs=1).fit(x, y)
    with pytest.raises(lk.errors.InvalidType, match=r"module must be.*got 'mlp'"):
        LaplaceClassifier(module="mlp").fit(x, y)
    for wrong in ({"epochs": -1}, {"epochs": 1.5}, {"batch_size": 0}, {"hidden": 0}, {"lr": -1.0}, {"lr": "big"}):
        with pytest.raises(lk.errors.InvalidArgument, match=next(iter(wrong))):
            LaplaceClassifier(**wrong).fit(x, y)
