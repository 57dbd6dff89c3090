"""A task sequence that is killed, between tasks or during one, goes on with the same numbers, bit for bit."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import continual
from tests import oracles
from tests.continual.problems import N, moved, network, task
from tests.continual.test_learners import METHODS, batches

SAMPLED = {
    "online-sampled": lambda m: continual.OnlineLaplace(m, "categorical", estimator="sampled"),
    "online-implicit": lambda m: continual.OnlineLaplace(m, "categorical", multiplier=50.0),
}
TASKS, STEPS = 3, 6


class Killed(Exception):
    """Stands for the end of the process."""


@dataclass
class Run:
    """Everything that changes while tasks are learned: what a checkpoint has to hold."""

    model: nn.Module
    learner: continual.Learner
    optimizer: torch.optim.Optimizer
    scheduler: Any
    rng: torch.Generator
    task: int = 0
    step: int = 0

    def save(self, file: Any) -> None:
        parts = {"model": self.model, "learner": self.learner, "optimizer": self.optimizer, "schedule": self.scheduler}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "rng": self.rng.get_state(), "task": self.task, "step": self.step}, file)

    def load(self, file: Any) -> None:
        state = torch.load(file, weights_only=True)
        parts = {"model": self.model, "learner": self.learner, "optimizer": self.optimizer, "schedule": self.scheduler}
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        self.task, self.step = state["task"], state["step"]
        if hasattr(self.learner, "revisit"):
            self.learner.revisit([batches(k) for k in range(self.task)])


def started(name: str, seed: int | None = None) -> Run:
    model = network()
    if seed is not None:
        moved(model, seed)  # a fresh process builds a network of other weights
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    if name == "online-implicit":
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)  # type: ignore[assignment]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TASKS * STEPS)
    make = {**METHODS, **SAMPLED}[name]
    return Run(model, make(model), optimizer, scheduler, torch.Generator().manual_seed(0))


def go(run: Run, kill: tuple[int, int] | None = None, file: Any = None) -> list[float]:
    """Learns what is left, in an order of minibatches that is drawn on the way; the losses of all steps."""
    losses = []
    while run.task < TASKS:
        data = [batch for batch in run.learner.training_data(batches(run.task)) for _ in range(2)]
        while run.step < STEPS:
            if kill == (run.task, run.step):
                run.save(file)
                raise Killed
            x, y = data[int(torch.randint(len(data), (), generator=run.rng))]
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.model(x), y) + run.learner.penalty() / N
            loss.backward()
            run.learner.precondition_gradients(run.optimizer.param_groups[0]["lr"] / N)
            run.optimizer.step()
            run.learner.after_step()
            run.scheduler.step()
            run.step += 1
            losses.append(float(loss.detach()))
        run.learner.after_task(batches(run.task), generator=run.rng)
        run.task, run.step = run.task + 1, 0
    return losses


@functools.cache
def finished(name: str) -> tuple[list[float], Tensor, Tensor]:
    """A run that nothing stops: its losses and weights, and the penalty near them."""
    run = started(name)
    losses, weights = go(run), oracles.flat_parameters(run.model).clone()
    moved(run.model, 7)
    return losses, weights, run.learner.penalty().detach()


@pytest.mark.share(2)
@pytest.mark.parametrize("kill", [(1, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("name", [*METHODS, *SAMPLED])
def test_the_same_numbers(name: str, kill: tuple[int, int]) -> None:
    wanted, weights, penalty = finished(name)
    file = io.BytesIO()
    with pytest.raises(Killed):
        go(started(name), kill, file)
    file.seek(0)
    resumed = started(name, seed=3)
    resumed.load(file)
    assert (resumed.task, resumed.learner.tasks) == (kill[0], kill[0])
    losses = go(resumed)
    assert losses == wanted[kill[0] * STEPS + kill[1] :]
    assert torch.equal(oracles.flat_parameters(resumed.model), weights)
    moved(resumed.model, 7)
    assert torch.equal(resumed.learner.penalty(), penalty)


@pytest.mark.parametrize("name", ["joint", "non-online"])
def test_data_that_a_state_does_not_hold_is_asked_for(name: str) -> None:
    run = started(name)
    go(run)
    learner: Any = METHODS[name](run.model)
    learner.load_state_dict(run.learner.state_dict())
    with pytest.raises(lk.errors.IncompatiblePair, match="revisit"):
        (learner.after_task if name == "non-online" else learner.training_data)(batches(2))
    with pytest.raises(lk.errors.IncompatiblePair, match="2 loaders"):
        learner.revisit([batches(0), batches(1)])


def test_a_state_of_another_method_is_refused() -> None:
    model = network()
    with pytest.raises(lk.errors.IncompatiblePair, match="state"):
        continual.FineTuning(model, "categorical").load_state_dict({"method": "other", "tasks": 1})


def test_a_state_does_not_share_memory_with_the_learner() -> None:
    """A state that is kept in memory is that of its moment."""
    for name, make in METHODS.items():
        run = started(name)
        run.learner = make(run.model)
        run.task = 1
        go(run)
        before: Tensor = run.learner.penalty().detach()
        state = run.learner.state_dict()
        again = make(run.model)
        run.learner.after_task([task(0)]) if name not in ("joint", "non-online") else None
        again.load_state_dict(state)
        assert torch.equal(again.penalty(), before), name
