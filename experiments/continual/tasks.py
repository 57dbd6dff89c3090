"""What a stream of tasks for continual learning consists of; the streams are in ``streams.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import training
from experiments.common.claims import Claim
from experiments.continual.settings import Config
from laplace_kf import continual
from laplace_kf.batches import Forward
from laplace_kf.errors import LaplaceKFError
from laplace_kf.likelihoods import Likelihood, get_likelihood

__all__ = ["ABOVE", "KRON", "BadStream", "Derived", "Measure", "Pair", "Stream", "Task", "Tasks", "joined"]

Pair = tuple[Tensor, Tensor]
KRON = "Kronecker online"
ABOVE = (
    Claim("Kronecker above diagonal", "average", KRON, "diagonal online", least=0.0),
    Claim("Kronecker above Synaptic Intelligence", "average", KRON, "Synaptic Intelligence", least=0.0),
)


class BadStream(LaplaceKFError, ValueError):
    """Settings for which a stream has no tasks; says which to change."""


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

    @property
    def forward(self) -> Forward | None:
        """``(model, batch) -> (outputs (N, C), targets)`` as learners ask for it; None: the plain call."""
        return None

    def changed(self, name: str, change: Callable[[Pair], Pair]) -> Task:
        """Another task, with ``change`` done to every part."""
        return Task(name, change(self.train), change(self.val), change(self.test))


class Derived(Task):
    """A task made from another one whenever it is asked for, so that many tasks take the memory of one.

    Args:
        name: what it is about.
        base: the other one.
        change: done to a part of it; cheap.
    """

    def __init__(self, name: str, base: Task, change: Callable[[Pair], Pair]) -> None:
        vars(self).update(name=name, base=base, change=change)

    train = property(lambda self: self.change(self.base.train))
    val = property(lambda self: self.change(self.base.val))
    test = property(lambda self: self.change(self.base.test))


@dataclass(frozen=True)
class Tasks:
    """The tasks in their order, and what a reader of the results must know of the data.

    Args:
        tasks: those that there is data for.
        absent: why others are left out, by name.
        remarks: of the data that was used, by name.
    """

    tasks: Sequence[Task]
    absent: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """What a stream is judged by; the matrices hold ``sign`` times it, of which more is better.

    Args:
        name: for headings.
        scale: from the stored number to the printed one.
        sign: 1, or −1 where less is better.
        digits: behind the point, when printed.
    """

    name: str
    scale: float = 1.0
    sign: int = 1
    digits: int = 2


class Stream(ABC):
    """A sequence of tasks for one network.

    Attributes:
        title: what the tasks are, for headings.
        measure: what the network is judged by.
        parameters: patterns of the weights that the methods protect.
        claims: what is expected of the methods; those on methods that were run are judged.
        published: per cent after the last task, by method and task.
        picture: file name of the picture of the progress.
    """

    title: str
    measure = Measure("accuracy (%)", scale=100)
    parameters: str | tuple[str, ...] = "all"
    claims: tuple[Claim, ...] = (
        *ABOVE,
        Claim("within 2 points of joint training", "average", KRON, "joint training", least=-0.02),
        Claim("projected keeps 99 % of kept", "average", f"{KRON}, projected", KRON, least=-0.01),
        Claim("summed factors are not above kept ones", "average", f"{KRON}, summed", KRON, most=0.0),
    )
    published: Mapping[str, Mapping[str, float]] = {}
    picture = "accuracy"

    @abstractmethod
    def tasks(self, config: Config, seed: int) -> Tasks:
        """The tasks in their order."""

    def network(self, config: Config, tasks: Sequence[Task], seed: int) -> nn.Module:
        """The untrained network: pixels-hidden-hidden-10."""
        return training.mlp([tasks[0].train[0].shape[1], config.hidden, config.hidden, 10], seed=seed)

    def begin(self, model: nn.Module, number: int, revisits: bool) -> None:
        """Called before task ``number`` (from 0) is learned; ``revisits``: with the data of the earlier tasks."""
        return

    def likelihood(self, config: Config) -> Likelihood:
        """That of a task's targets."""
        return get_likelihood("categorical")

    def loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        """Mean negative log-likelihood, 0-dim, of outputs ``(N, C)`` of the network and targets of any tasks."""
        return nn.functional.cross_entropy

    def quality(self, config: Config, model: nn.Module, task: Task, part: Pair) -> float:
        """How good the network is on a part of a task; more is better."""
        return continual.accuracy(model, part, forward=task.forward)

    def closing(
        self, config: Config, model: nn.Module, learner: continual.Learner, tasks: Sequence[Task]
    ) -> dict[str, Any]:
        """JSON-able results that are found once, after the last task."""
        return {}


def joined(parts: Sequence[Pair]) -> Pair:
    """Several parts ``(N, ...)`` as one."""
    inputs, targets = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(targets)
