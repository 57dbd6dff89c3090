"""Streams of tasks for continual learning: the data of every task, and the network that learns them one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments import data, training
from laplace_kf import continual
from laplace_kf.registry import Registry

if TYPE_CHECKING:
    from experiments.continual import Config

__all__ = ["STREAMS", "Stream", "Task", "joined"]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: inputs ``(N, ...)`` with targets ``(N,)`` or ``(N, C)``, in three parts.

    Args:
        name: what it is about.
        train, val, test: its data.
    """

    name: str
    train: Pair
    val: Pair
    test: Pair

    def forward(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``(N, C)`` and targets of a batch of this task, as learners ask for them."""
        return model(batch[0]), batch[1]


class Stream(ABC):
    """A sequence of tasks for one network.

    Attributes:
        title: what the tasks are, for headings.
        likelihood: registered name.
        parameters: patterns of the weights that the methods protect.
    """

    title: str
    likelihood = "categorical"
    parameters: str | tuple[str, ...] = "all"

    @abstractmethod
    def tasks(self, config: Config, seed: int) -> list[Task]:
        """The tasks in their order."""

    def network(self, config: Config, seed: int) -> nn.Module:
        """The untrained network: 784-hidden-hidden-10."""
        return training.mlp([784, config.hidden, config.hidden, 10], seed=seed)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood, 0-dim, of outputs ``(N, C)``."""
        return nn.functional.cross_entropy(outputs, targets)

    def quality(self, model: nn.Module, task: Task, part: Pair) -> float:
        """How good the network is on a part of a task; more is better."""
        return continual.accuracy(model, part, forward=task.forward)


STREAMS: Registry[Stream] = Registry("task stream")


def _digits(config: Config) -> Task:
    (x, y), (x_test, y_test) = data.images("mnist", "train"), data.images("mnist", "test")
    device = torch.device(config.device)
    parts = [(x, y), (x_test, y_test)]
    (x, y), (x_test, y_test) = [(images.flatten(1).to(device), labels.to(device)) for images, labels in parts]
    size, val, test = config.train_size, config.val_size, config.test_size
    return Task("digits", (x[:size], y[:size]), (x[-val:], y[-val:]), (x_test[:test], y_test[:test]))


def _changed(base: Task, name: str, change: Any) -> Task:
    return Task(name, change(base.train), change(base.val), change(base.test))


class _Permuted(Stream):
    """The digits with their pixels in another fixed order for every task; the first task's is as written."""

    title = "permuted MNIST"

    def tasks(self, config: Config, seed: int) -> list[Task]:
        base, rng = _digits(config), training.generator(seed)
        tasks = [base]
        for number in range(1, config.tasks):
            order = torch.randperm(784, generator=rng).to(base.train[0].device)
            tasks.append(_changed(base, f"permutation {number}", lambda pair, o=order: (pair[0][:, o], pair[1])))
        return tasks


class _Disjoint(Stream):
    """Digits 0 to 4, then 5 to 9, both as a ten-way problem."""

    title = "disjoint MNIST"

    def tasks(self, config: Config, seed: int) -> list[Task]:
        base = _digits(config)

        def part(pair: Pair, low: int) -> Pair:
            chosen = (pair[1] >= low) & (pair[1] < low + 5)
            return pair[0][chosen], pair[1][chosen]

        return [_changed(base, f"{k} to {k + 4}", lambda pair, k=k: part(pair, k)) for k in (0, 5)]


STREAMS.register("permuted")(_Permuted())
STREAMS.register("disjoint")(_Disjoint())


def joined(parts: Sequence[Pair]) -> Pair:
    """Several parts ``(N, ...)`` as one."""
    inputs, targets = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(targets)
