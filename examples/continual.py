"""Two tasks, one network, no earlier data: the penalty in a plain training loop, and as a callback of somebody else's.

The two moons are learned first, then two moons that lie elsewhere. :func:`plain_loop` is all there is to it where the
loop is one's own. :class:`Trainer` stands for a trainer with hooks that cannot be changed (it calls them by Lightning's
names), and :class:`laplace_kf.continual.Callback` plugs the same learner into it.

Run it with ``python -m examples.continual`` (seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import continual

__all__ = ["Trainer", "main", "network", "plain_loop", "tasks", "with_callbacks"]

Batches = list[tuple[Tensor, Tensor]]


def plain_loop(model: nn.Module, streams: Sequence[Batches], learner: continual.Learner, epochs: int) -> list[Tensor]:
    """Learns task after task, each from batches ``(x (N, 2), y (N,))``; the accuracies ``(T,)`` after every task."""
    accuracies = []
    for batches in streams:
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        n_task = sum(len(y) for _, y in batches)
        for _ in range(epochs):
            for x, y in batches:
                loss = nn.functional.cross_entropy(model(x), y) + learner.penalty() / n_task
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                learner.after_step()
        learner.after_task(batches)
        accuracies.append(torch.tensor([continual.accuracy(model, other) for other in streams]))
    return accuracies


class Trainer:
    """A training loop with hooks that knows nothing of tasks; the callbacks see ``(trainer, module, ...)``."""

    def __init__(self, epochs: int, callbacks: Sequence[Any]) -> None:
        self.epochs, self.callbacks = epochs, callbacks

    def fit(self, model: nn.Module, batches: Batches) -> None:
        """Trains on batches ``(x (N, ...), y (N,))``."""
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(self.epochs):
            for index, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                self._call("on_after_backward", model)
                optimizer.step()
                self._call("on_train_batch_end", model, loss, (x, y), index)
        self._call("on_train_end", model)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)


def with_callbacks(
    model: nn.Module, streams: Sequence[Batches], learner: continual.Learner, epochs: int
) -> list[Tensor]:
    """What :func:`plain_loop` does, for batches ``(x (N, 2), y (N,))``, by hooks; the accuracies ``(T,)``."""
    accuracies = []
    for batches in streams:
        callback = continual.Callback(learner, batches, n_task=sum(len(y) for _, y in batches))
        Trainer(epochs, [callback]).fit(model, batches)
        accuracies.append(torch.tensor([continual.accuracy(model, other) for other in streams]))
    return accuracies


def tasks(seed: int = 0, count: int = 200) -> list[Batches]:
    """Two tasks of two classes, in batches of 50: inputs ``(N, 2)`` and labels ``(N,)``."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for shift in (torch.tensor([0.0, 0.0]), torch.tensor([6.0, 0.0])):
        y = torch.randint(0, 2, (count,), generator=rng)
        angle = torch.pi * torch.rand(count, generator=rng)
        upper = torch.stack([angle.cos(), angle.sin()], 1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
        x = torch.where(y[:, None] == 0, upper, lower) + 0.1 * torch.randn(count, 2, generator=rng) + shift
        found.append([(x[i : i + 50], y[i : i + 50]) for i in range(0, count, 50)])
    return found


def network(seed: int = 0) -> nn.Module:
    """2-50-2 with tanh, weights from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))


def main(epochs: int = 150) -> dict[str, list[Tensor]]:
    """Prints and returns, for every way, the accuracies ``(T,)`` on both tasks after each of them."""
    found = {}
    for name, loop, method in (
        ("no protection", plain_loop, continual.FineTuning),
        ("online Laplace", plain_loop, continual.OnlineLaplace),
        ("online Laplace, by callbacks", with_callbacks, continual.OnlineLaplace),
    ):
        model = network()
        learner = method(model, "categorical", prior_precision=0.01)
        found[name] = loop(model, tasks(), learner, epochs)
        print(f"{name:30}" + "  then  ".join("  ".join(f"{100 * float(a):5.1f} %" for a in row) for row in found[name]))
    return found


if __name__ == "__main__":
    main()
