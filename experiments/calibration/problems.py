"""The problems of the calibration benchmark: regression tables and small image classifiers, ready to train on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from experiments.common import data, training
from laplace_kf.errors import UnknownName
from laplace_kf.likelihoods import Categorical, Gaussian, Likelihood, Prediction
from laplace_kf.reports import metrics

__all__ = ["SETS", "Forecast", "Problem", "Task", "problem"]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Forecast:
    """What a method says about the test inputs.

    Args:
        log_prob: log predictive density of the targets ``(N,)``, in the units the network was trained in.
        point: predictive means ``(N, 1)`` or class probabilities ``(N, C)``.
    """

    log_prob: Tensor
    point: Tensor


class Task(ABC):
    """What regression and classification do differently."""

    likelihood: ClassVar[str]
    peer: ClassVar[str]
    """Name of the likelihood in laplace-torch."""
    first: ClassVar[str]
    """The metric that stands beside the negative log-likelihood in tables."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean training loss, 0-dim, of outputs and targets ``(N, ...)``."""

    @abstractmethod
    def plain(self, outputs: Tensor, val: tuple[Tensor, Tensor]) -> Callable[[Tensor], Prediction]:
        """The network's own prediction: ``outputs (N, C)`` on validation data of targets ``val[1]`` may set its noise.

        Returns:
            What makes a prediction of test outputs ``(N, C)``.
        """

    @abstractmethod
    def likelihoods(self, outputs: Tensor, targets: Tensor) -> list[Likelihood]:
        """Those to choose from where several networks are mixed, placed by one's outputs ``(N, C)`` and targets."""

    def temperature(self, outputs: Tensor, targets: Tensor) -> float:
        """By what to divide ``(N, C)`` outputs: where that is a choice, what suits targets ``(N, ...)`` best."""
        return 1.0

    @abstractmethod
    def point(self, prediction: Prediction) -> Tensor:
        """Means ``(N, 1)`` or probabilities ``(N, C)``."""

    @abstractmethod
    def scores(self, forecast: Forecast, targets: Tensor, scale: float) -> dict[str, float]:
        """Metrics on test targets ``(N, ...)``, in original units: ``nll`` in nats, and those of the task."""


class RegressionTask(Task):
    """Targets ``(N, 1)`` with Gaussian noise."""

    likelihood, peer, first = "gaussian", "regression", "rmse"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the mean squared error ``(...)``: the negative log density with noise 1 but for a constant."""
        return (outputs - targets).square().mean((-2, -1)) / 2

    def plain(self, outputs: Tensor, val: tuple[Tensor, Tensor]) -> Callable[[Tensor], Prediction]:
        """The noise is the root mean squared error on validation data, which maximises their likelihood."""
        noise = Gaussian(float((outputs - val[1]).square().mean().sqrt()))
        return lambda found: noise.predict(found[None])

    def likelihoods(self, outputs: Tensor, targets: Tensor) -> list[Likelihood]:
        """Noise scales from a tenth to one and a half of the root mean squared error of ``(N, 1)`` outputs."""
        rmse = float((outputs - targets).square().mean().sqrt())
        return [Gaussian(rmse * 10 ** (k / 20)) for k in range(-20, 4)]

    def point(self, prediction: Prediction) -> Tensor:
        """Predictive means ``(N, 1)``."""
        return prediction.mean

    def scores(self, forecast: Forecast, targets: Tensor, scale: float) -> dict[str, float]:
        """``nll`` in nats and ``rmse``, for targets ``(N, 1)``; ``scale`` is the unit they were trained in."""
        log_scale = torch.tensor(scale).log()
        rmse = scale * (forecast.point - targets).square().mean().sqrt()
        return {"nll": float(log_scale - forecast.log_prob.mean()), "rmse": float(rmse)}


class ClassificationTask(Task):
    """Labels ``(N,)``."""

    likelihood, peer, first = "categorical", "classification", "accuracy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy ``(...)``."""
        return -outputs.log_softmax(-1).gather(-1, targets[..., None]).mean((-2, -1))

    def plain(self, outputs: Tensor, val: tuple[Tensor, Tensor]) -> Callable[[Tensor], Prediction]:
        """The softmax of ``(N, C)`` outputs as it is."""
        return lambda found: Categorical().predict(found[None])

    def temperature(self, outputs: Tensor, targets: Tensor) -> float:
        """The temperature between 0.05 and 20 of the smallest cross-entropy of ``(N, C)`` logits, labels ``(N,)``."""

        def value(log: float) -> float:
            return float(nn.functional.cross_entropy(outputs.double() / math.exp(log), targets))

        return math.exp(minimize_scalar(value, bounds=(math.log(0.05), math.log(20)), method="bounded").x)

    def likelihoods(self, outputs: Tensor, targets: Tensor) -> list[Likelihood]:
        """The softmax: it has nothing to choose."""
        return [Categorical()]

    def point(self, prediction: Prediction) -> Tensor:
        """Class probabilities ``(N, C)``."""
        return prediction.probs

    def scores(self, forecast: Forecast, targets: Tensor, scale: float) -> dict[str, float]:
        """``nll`` in nats, ``accuracy``, ``brier`` and ``ece``, for labels ``(N,)``."""
        found = metrics.classification(forecast.point, targets)
        return {"nll": float(-forecast.log_prob.mean()), **{key: found[key] for key in ("accuracy", "ece", "brier")}}


@dataclass(frozen=True)
class Problem:
    """One split of one set.

    Args:
        task: regression or classification.
        train: inputs ``(N, D)`` and targets; the validation part is not in it.
        val: held out of the training split, for tuning.
        test: what everything is measured on.
        outputs: of the network, C.
        scale: unit of regression targets; 1 for labels.
    """

    task: Task
    train: Pair
    val: Pair
    test: Pair
    outputs: int
    scale: float = 1.0


def problem(
    name: str, split: int, *, seed: int, val_share: float, val_most: int, train_most: int, test_most: int
) -> Problem:
    """Split ``split`` of the set ``name``.

    Args:
        name: one of :data:`SETS`.
        split: number of the standard split (regression), or of the random subset of images.
        seed: of the choice of validation rows and images.
        val_share: share of the training rows that is held out for tuning.
        val_most: at most this many.
        train_most: images to train on at most, the held-out ones included.
        test_most: test images at most.

    Raises:
        UnknownName: for a set or split that does not exist.
        MissingData: if the file is not there.
    """
    if name not in SETS:
        raise UnknownName("benchmark set", name, SETS)
    rng = training.generator(1000 * seed + split)
    if name in data.tables():
        return _table(name, split, rng, val_share, val_most)
    return _images(name, rng, val_share, val_most, train_most, test_most)


def _held_out(count: int, rng: torch.Generator, share: float, most: int) -> tuple[Tensor, Tensor]:
    """Indices ``(n,)`` to train on and to validate on."""
    order = torch.randperm(count, generator=rng)
    held = max(1, min(int(share * count), most))
    return order[held:], order[:held]


def _table(name: str, split: int, rng: torch.Generator, val_share: float, val_most: int) -> Problem:
    table = data.regression(name)
    if split >= len(table.splits):
        raise UnknownName(f"split of {name}:", str(split), [str(i) for i in range(len(table.splits))])
    rows, test = table.splits[split]
    train, val = (rows[part] for part in _held_out(len(rows), rng, val_share, val_most))
    x, y = (_standardised(values, train) for values in (table.features, table.target))
    scale = float(table.target[train].std())
    return Problem(RegressionTask(), (x[train], y[train]), (x[val], y[val]), (x[test], y[test]), 1, scale)


def _standardised(values: Tensor, train: Tensor) -> Tensor:
    """Columns of ``(N, D)`` with mean 0 and deviation 1 over the training rows, float32; constant ones become 0."""
    spread = values[train].std(0)
    return ((values - values[train].mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))).float()


def _images(
    name: str, rng: torch.Generator, val_share: float, val_most: int, train_most: int, test_most: int
) -> Problem:
    x, y = _small(*data.images(name, "train"))
    order = torch.randperm(len(x), generator=rng)
    most = min(train_most, 2 * len(x) // 3) if name in BUNDLED else train_most
    rows, rest = order[:most], order[most:]
    if name in BUNDLED:  # one file only: what is not trained on is for testing
        x_test, y_test = x[rest][:test_most], y[rest][:test_most]
    else:
        x_test, y_test = _small(*data.images(name, "test"))
        chosen = torch.randperm(len(x_test), generator=rng)[:test_most]
        x_test, y_test = x_test[chosen], y_test[chosen]
    train, val = (rows[part] for part in _held_out(len(rows), rng, val_share, val_most))
    return Problem(ClassificationTask(), (x[train], y[train]), (x[val], y[val]), (x_test, y_test), 10)


def _small(images: Tensor, labels: Tensor) -> Pair:
    """28x28 images averaged to 14x14, all of them flattened to ``(N, D)``."""
    if images.shape[-1] > 14:
        images = nn.functional.avg_pool2d(images, 2)
    return images.flatten(1), labels


BUNDLED = ("digits",)
"""Sets without a test file; at least a third of them is left for testing."""
SETS: tuple[str, ...] = (*data.tables(), "digits", "mnist", "fashion-mnist")
"""All sets of the benchmark."""
