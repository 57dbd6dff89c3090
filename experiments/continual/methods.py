"""The methods that a stream of tasks is learned with: how the learner is made, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from experiments.continual.settings import Config
from laplace_kf import continual
from laplace_kf.registry import Registry

__all__ = ["LEARNERS", "Averaged", "Method"]


Make = Callable[..., continual.Learner]
"""``(strength, examples of a task, **what all learners have in common) -> learner``"""


@dataclass(frozen=True)
class Method:
    """A method of continual learning.

    Args:
        make: the learner.
        grid: name of the setting that holds its strengths; empty if it has none.
        decay: name of the setting that shortens its steps from task to task; empty for none.
        optimizer: name of the setting that names its optimiser.
        revisits: whether it trains on the data of all tasks so far.
        fresh: whether every task gets a new network.
        implicit: whether its penalty may be stepped implicitly (if the configuration says so).
        settings: names of settings that the learner takes, by its argument.
    """

    make: Make
    grid: str = "multipliers"
    decay: str = "decay_kron"
    optimizer: str = "optimizer"
    revisits: bool = False
    fresh: bool = False
    implicit: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)

    def strengths(self, config: Config) -> list[float]:
        """The strengths to try; 1 for a method that has none."""
        if not self.grid:
            return [1.0]
        found: list[float] = getattr(config, self.grid) or config.multipliers
        return found


LEARNERS: Registry[Method] = Registry("continual learning method")


def _online(structure: str, terms: str) -> Make:
    return lambda strength, examples, **shared: continual.OnlineLaplace(
        structure=structure, multiplier=strength, terms=terms, **shared
    )


class Averaged(continual.OnlineLaplace):
    """Summed factors, and their part of the penalty divided by the number T of tasks.

    For T similar tasks the product of two sums is about T times the sum of the products (methods 11.2).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, terms="sum", **kwargs)

    def _penalty(self) -> Tensor:
        total = super()._penalty()
        if self.posterior is None:
            return total
        pull = self._pull(self.posterior.mean)
        return pull + (total - pull) / self.tasks


def _ewc(structure: str) -> Make:
    return lambda strength, examples, **shared: continual.EWC(structure=structure, multiplier=strength, **shared)


def _intelligence(strength: float, examples: int, **shared: Any) -> continual.Learner:
    return continual.SynapticIntelligence(c=strength * examples, **shared)


def _first_intelligence(strength: float, examples: int, **shared: Any) -> continual.Learner:
    """One centre and ε = 0.1, as Zenke et al. (2017) ran permuted MNIST; their c is half of this one (no ½ there)."""
    return _intelligence(strength, examples, epsilon=0.1, centres="last", **shared)


def _fine_tuning(strength: float, examples: int, **shared: Any) -> continual.Learner:
    return continual.FineTuning(**shared)


def _add(name: str, make: Make, **how: Any) -> None:
    LEARNERS.register(name)(Method(make, **how))


_add("Kronecker online", _online("kron", "keep"))
_add("Kronecker online, projected", _online("kron", "project"))
_add("Kronecker online, bounded", _online("kron", "keep"), settings={"max_terms": "max_terms"})
_add("Kronecker online, summed", _online("kron", "sum"))
_add("diagonal online", _online("diag", "keep"), grid="multipliers_diag", decay="decay_diag")
_add("Kronecker EWC", _ewc("kron"))
_add("diagonal EWC", _ewc("diag"), grid="multipliers_diag", decay="decay_diag")
_add("Synaptic Intelligence", _intelligence, grid="strengths", decay="", optimizer="si_optimizer")
_add("Synaptic Intelligence, as published", _first_intelligence, grid="strengths", decay="", optimizer="si_optimizer")
_add("fine-tuning", _fine_tuning, grid="", decay="")
_add(
    "joint training",
    lambda strength, examples, **shared: continual.JointTraining(**shared),
    grid="",
    decay="",
    revisits=True,
)

_add(
    "single-task networks",
    _fine_tuning,
    grid="",
    decay="",
    fresh=True,
)
_add("full online", _online("full", "keep"))
_add("Kronecker online, explicit steps", _online("kron", "keep"), implicit=False)
_add(
    "diagonal online, explicit steps",
    _online("diag", "keep"),
    grid="multipliers_diag",
    decay="decay_diag",
    implicit=False,
)
_add("Synaptic Intelligence, implicit steps", _intelligence, grid="strengths", decay="")
_add("Kronecker online, summed over T", lambda strength, examples, **shared: Averaged(multiplier=strength, **shared))
