"""Problems with long dependencies for recurrent networks: what counts at the end was shown at the beginning.

Temporal order, addition and noiseless memorisation (Martens 2016, 4.13; Hochreiter & Schmidhuber 1997, tasks 4 and 6a).
Inputs are ``(N, L, I)`` float32, one row a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from laplace_kf.likelihoods import Categorical, Gaussian, Likelihood
from laplace_kf.registry import Registry

__all__ = ["PROBLEMS", "Problem"]

BITS = 5


class Problem(ABC):
    """One kind of sequences, with ``length`` steps T between what matters and its use.

    Attributes:
        inputs: size I of one step.
        outputs: number C of network outputs per step.
        finite: all sequences there are, or ``None`` for any number.
    """

    inputs: ClassVar[int]
    outputs: ClassVar[int]
    finite: ClassVar[int | None] = None

    @abstractmethod
    def likelihood(self) -> Likelihood:
        """The density of the targets."""

    @abstractmethod
    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` sequences ``(N, L, I)`` and their targets; a finite problem gives all of its sequences."""

    @abstractmethod
    def select(self, hidden: Tensor) -> Tensor:
        """The hidden states ``(N, L, H)`` that outputs are read from: ``(N, H)``, or all of them."""

    @abstractmethod
    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which sequences are answered wrongly, ``(N,)`` bool."""


PROBLEMS: Registry[type[Problem]] = Registry("sequence problem")


def _between(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """Whole numbers from ``low`` to ``high − 1``, at least ``low`` itself, ``(N,)``."""
    return torch.randint(low, max(high, low + 1), (count,), generator=generator)


class _LastStep(Problem):
    def select(self, hidden: Tensor) -> Tensor:
        return hidden[:, -1]


@PROBLEMS.register("temporal order")
class TemporalOrder(_LastStep):
    """Which two of the symbols 1, 2 stood among the noise of 3 to 6, and in which order: four classes.

    The first stands in ``[T/10, 2T/10)``, the second in ``[5T/10, 6T/10)`` (the places of task 6a, scaled).
    """

    inputs, outputs = 6, 4

    def likelihood(self) -> Likelihood:
        return Categorical()

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(2, 6, (count, length), generator=generator)
        rows = torch.arange(count)
        first, second = (torch.randint(0, 2, (count,), generator=generator) for _ in range(2))
        symbols[rows, _between(length // 10, length // 5, count, generator)] = first
        symbols[rows, _between(length // 2, 6 * length // 10, count, generator)] = second
        return one_hot(symbols, 6).float(), 2 * first + second

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) != targets


@PROBLEMS.register("addition")
class Addition(_LastStep):
    """``½ + (u + v)/4`` of the two marked numbers among numbers from ``[−1, 1]``; an error above 0.04 is wrong.

    The first marked number stands in ``[0, T/10)``, the second in ``[T/10, T/2)``. Targets are as in task 4.
    The squared error is measured in units of ``2 · 0.1²``: in units of 1 the objective (the targets have variance 1/24)
    is small beside the penalty on changes of activities, and HF hardly moves.
    """

    inputs, outputs = 2, 1
    tolerance: ClassVar[float] = 0.04
    noise: ClassVar[float] = 0.1

    def likelihood(self) -> Likelihood:
        return Gaussian(self.noise)

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = 2 * torch.rand(count, length, generator=generator) - 1
        marks, rows = torch.zeros(count, length), torch.arange(count)
        marks[rows, _between(0, length // 10, count, generator)] = 1
        marks[rows, _between(length // 10, length // 2, count, generator)] = 1
        return torch.stack([numbers, marks], -1), 0.5 + (numbers * marks).sum(1, keepdim=True) / 4

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs()[:, 0] > self.tolerance


@PROBLEMS.register("memorisation")
class Memorisation(Problem):
    """Five bits, then T steps of which the fifth-last is a cue; at the last five the bits must be given back.

    Inputs are one of {0, 1, nothing, cue}, outputs one of {0, 1, nothing} at every step. There are 32 sequences.
    """

    inputs, outputs, finite = 4, 3, 2**BITS

    def likelihood(self) -> Likelihood:
        return Categorical()

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = torch.cartesian_prod(*[torch.arange(2)] * BITS)
        symbols = torch.full((len(bits), BITS + length), 2)
        targets = symbols.clone()
        symbols[:, :BITS] = targets[:, -BITS:] = bits
        symbols[:, -BITS] = 3
        return one_hot(symbols, 4).float(), targets

    def select(self, hidden: Tensor) -> Tensor:
        return hidden

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) != targets).any(-1)
