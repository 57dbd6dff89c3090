"""Problems with long dependencies for recurrent networks: what counts at the end was shown at the beginning.

The seven problems of Martens 2016, 4.13 (Hochreiter & Schmidhuber 1997, tasks 2b, 4, 5, 6a and 6b), the last one with
five bits and with twenty. Inputs are ``(N, L, I)`` float32, one row a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from laplace_kf.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from laplace_kf.registry import Registry

__all__ = ["PROBLEMS", "Problem"]


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


class _Order(_LastStep):
    """Which of the symbols 1, 2 stood at each of some places among the noise of 3 to 6: the first is the highest bit.

    Attributes:
        places: first and last share of T, in hundredths, between which each of them stands.
    """

    inputs = 6
    places: ClassVar[tuple[tuple[int, int], ...]]

    def likelihood(self) -> Likelihood:
        return Categorical()

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(2, 6, (count, length), generator=generator)
        rows, answers = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        special = [torch.randint(0, 2, (count,), generator=generator) for _ in self.places]
        for (low, high), bit in zip(self.places, special, strict=True):
            symbols[rows, _between(low * length // 100, high * length // 100, count, generator)] = bit
            answers = 2 * answers + bit
        return one_hot(symbols, 6).float(), answers

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) != targets


@PROBLEMS.register("temporal order")
class TemporalOrder(_Order):
    """Two symbols, four classes.

    The first stands in ``[T/10, 2T/10)``, the second in ``[5T/10, 6T/10)`` (the places of task 6a, scaled).
    """

    outputs = 4
    places = (10, 20), (50, 60)


@PROBLEMS.register("3-bit temporal order")
class ThreeBitOrder(_Order):
    """Three symbols, eight classes, in ``[T/10, 2T/10)``, ``[33T/100, 43T/100)``, ``[66T/100, 76T/100)`` (task 6b)."""

    outputs = 8
    places = (10, 20), (33, 43), (66, 76)


class _Marked(_LastStep):
    """A function of two marked values: the first stands in ``[0, T/10)``, the second in ``[T/10, T/2)``."""

    inputs, outputs = 2, 1

    @abstractmethod
    def values(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """All values, ``(N, L)``."""

    @abstractmethod
    def answer(self, first: Tensor, second: Tensor) -> Tensor:
        """Targets ``(N,)`` of the marked values ``(N,)``."""

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        values = self.values(count, length, generator)
        marks, rows = torch.zeros(count, length), torch.arange(count)
        first = _between(0, length // 10, count, generator)
        second = _between(length // 10, length // 2, count, generator)
        marks[rows, first] = marks[rows, second] = 1
        return torch.stack([values, marks], -1), self.answer(values[rows, first], values[rows, second])[:, None]


class _Continuous(_Marked):
    """An error above 0.04 is wrong.

    The squared error is measured in units of ``2 · 0.1²``: in units of 1 the objective (the targets of the addition
    have variance 1/24) is small beside the penalty on changes of activities, and HF hardly moves.
    """

    tolerance: ClassVar[float] = 0.04
    noise: ClassVar[float] = 0.1

    def likelihood(self) -> Likelihood:
        return Gaussian(self.noise)

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs()[:, 0] > self.tolerance


@PROBLEMS.register("addition")
class Addition(_Continuous):
    """``½ + (u + v)/4`` of the two marked numbers among numbers from ``[−1, 1]`` (values and targets of task 4)."""

    def values(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        return 2 * torch.rand(count, length, generator=generator) - 1

    def answer(self, first: Tensor, second: Tensor) -> Tensor:
        return 0.5 + (first + second) / 4


@PROBLEMS.register("multiplication")
class Multiplication(_Continuous):
    """``u v`` of the two marked numbers among numbers from ``[0, 1]`` (task 5)."""

    def values(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, length, generator=generator)

    def answer(self, first: Tensor, second: Tensor) -> Tensor:
        return first * second


@PROBLEMS.register("XOR")
class ExclusiveOr(_Marked):
    """Whether the two marked bits differ."""

    def likelihood(self) -> Likelihood:
        return Bernoulli()

    def values(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 2, (count, length), generator=generator).float()

    def answer(self, first: Tensor, second: Tensor) -> Tensor:
        return (first != second).float()

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) != (targets > 0.5))[:, 0]


@PROBLEMS.register("random permutation")
class RandomPermutation(Problem):
    """The next of T symbols at every step: the last one is the first, 1 or 2, and those between are noise of 3 to 100.

    Only the last one can be known, and it decides whether a sequence is answered wrongly (task 2b).
    """

    inputs = outputs = 100

    def likelihood(self) -> Likelihood:
        return Categorical()

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(2, 100, (count, length), generator=generator)
        symbols[:, 0] = symbols[:, -1] = torch.randint(0, 2, (count,), generator=generator)
        return one_hot(symbols, 100).float(), symbols[:, 1:]

    def select(self, hidden: Tensor) -> Tensor:
        return hidden[:, :-1]

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, -1].argmax(-1) != targets[:, -1]


@PROBLEMS.register("memorisation")
class Memorisation(Problem):
    """Five bits, then T steps of which the fifth-last is a cue; at the last five the bits must be given back.

    Inputs are one of {0, 1, nothing, cue}, outputs one of {0, 1, nothing} at every step. There are 32 sequences.

    Attributes:
        symbols: how many there are to choose from.
        width: how many are shown.
    """

    symbols: ClassVar[int] = 2
    width: ClassVar[int] = 5
    inputs, outputs = 4, 3
    finite: ClassVar[int | None] = 2**5

    def likelihood(self) -> Likelihood:
        return Categorical()

    def shown(self, count: int, generator: torch.Generator) -> Tensor:
        """What is to be remembered, ``(N, width)``."""
        return torch.cartesian_prod(*[torch.arange(self.symbols)] * self.width)

    def draw(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shown, nothing = self.shown(count, generator), self.symbols
        inputs = torch.full((len(shown), self.width + length), nothing)
        targets = inputs.clone()
        inputs[:, : self.width] = targets[:, -self.width :] = shown
        inputs[:, -self.width] = nothing + 1
        return one_hot(inputs, self.inputs).float(), targets

    def select(self, hidden: Tensor) -> Tensor:
        return hidden

    def wrong(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) != targets).any(-1)


@PROBLEMS.register("20-bit memorisation")
class LongMemorisation(Memorisation):
    """Ten symbols of four, 20 bits, in place of five of two; drawn, as there are a million sequences.

    Martens 2016 names the twenty bits and does not say how they are written; four symbols are **[assumption]**.
    """

    symbols, width = 4, 10
    inputs, outputs, finite = 6, 5, None

    def shown(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.symbols, (count, self.width), generator=generator)
