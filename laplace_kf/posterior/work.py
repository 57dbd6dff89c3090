"""What tuning costs, in multiply-adds, before it is done: so that a budget in training epochs can be kept.

Counts, not clocks: the same data and seed give the same search on every machine. A training step costs three forward
passes (the pass, gradients of activations, gradients of weights); forward passes are counted by torch's own formulas
for the products of the network as it runs. An epoch counts ``LEAST`` multiply-adds at least, a hundredth of a second or
two: in smaller ones the fixed costs of calls rule, which no count tells; and a quarter of what the eigenbases of the
posterior cost at least, which any use of it takes: with few examples and a large network they are all there is. One
factor, ``OVERHEAD``, says how much slower than large products the rest is; it was measured on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from laplace_kf.operators import Blockwise, LowRank, Spectral
from laplace_kf.predictive.cost import draw_cost, rotations

__all__ = ["EPOCH", "FIXED", "Budget", "Costs", "Counter", "multiply_adds", "scored"]

EPOCH = 3.0  # forward passes in a training step
DECOMPOSITION = 10.0  # multiply-adds of a symmetric eigendecomposition, in units of side³
ELEMENT = 40.0  # multiply-adds in the time of scoring one drawn output
OVERHEAD = 1.3
LEAST = 2e8  # multiply-adds of an epoch
FIXED = 4.0  # epochs that the eigenbases may take


class _Nowhere:
    """Stands for torch's record of the modules that run, which fails where one returns a parameter without a graph."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *args: object) -> None:
        return


class Counter(FlopCounterMode):
    """Counts operations by torch's formulas: totals only, not module by module."""

    def __init__(self, custom_mapping: dict[Any, Any] | None = None) -> None:
        super().__init__(display=False, custom_mapping=custom_mapping)
        self.mod_tracker = _Nowhere()  # type: ignore[assignment]


@contextmanager
def multiply_adds(active: bool = True) -> Iterator[list[float]]:
    """Counts what runs inside: a list of one number, which stands there afterwards (0 unless ``active``)."""
    found = [0.0]
    if not active:
        yield found
        return
    with Counter() as counter:
        yield found
    found[0] = counter.get_total_flops() / 2


class Budget:
    """Multiply-adds that may be spent, and those that were.

    Args:
        epochs: training epochs; None for no limit.
        epoch: multiply-adds of one.

    Attributes:
        told: is called with the training epochs of every payment.
    """

    def __init__(self, epochs: float | None, epoch: float) -> None:
        self.epoch = max(epoch, LEAST)
        self.limit = math.inf if epochs is None else epochs * self.epoch
        self.spent = 0.0
        self.told: Callable[[float], Any] | None = None

    def at_least(self, epoch: float) -> None:
        """From now on an epoch counts at least so many multiply-adds."""
        if epoch > self.epoch:
            before, self.limit, self.epoch = self.cost, self.limit * epoch / self.epoch, epoch
            if self.told is not None:
                self.told(self.cost - before)

    @property
    def left(self) -> float:
        """Multiply-adds that are left; negative after an overrun."""
        return self.limit - self.spent

    @property
    def cost(self) -> float:
        """What was spent, in training epochs."""
        return self.spent / self.epoch

    def pay(self, work: float) -> None:
        """Books ``work`` multiply-adds."""
        self.spent += work
        if self.told is not None:
            self.told(work / self.epoch)


@dataclass(frozen=True)
class Costs:
    """What the stages of tuning cost, in multiply-adds.

    Args:
        precision: of the posterior, at any setting.
        forward: of one example at other weights.
        outputs: C', all outputs of an example.
        width: outputs whose covariances are wanted together, 1 where variances are enough.
    """

    precision: Blockwise
    forward: float
    outputs: int
    width: int = 1

    @property
    def positions(self) -> float:
        """How often an example uses a weight, on average."""
        return max(1.0, self.forward / max(1.0, float(sum(block.size for block, _ in self.precision.entries))))

    def decomposition(self) -> float:
        """Once: the eigenbases of all blocks."""
        sides = [
            basis.dual.shape[-1] ** 3 * basis.dual.shape[:-2].numel()
            for _, matrix in self.precision.entries
            if isinstance(matrix, Spectral)
            for basis in (matrix.inputs, matrix.outputs)
            if basis.dual is not None
        ]
        return DECOMPOSITION * float(sum(sides))

    def draw(self) -> float:
        """One draw of all weights."""
        return draw_cost(self.precision)

    def sampled(self, draws: int) -> float:
        """Per example: outputs at ``draws`` weights, and their score."""
        return OVERHEAD * draws * (self.forward + ELEMENT * self.outputs)

    def linearized(self, ratios: int) -> float:
        """Per example: the variances of all outputs at so many ratios ``λ / N``, in one pass."""
        once, each, times = self.forward * (1 + self.outputs), 0.0, self.positions
        for block, matrix in self.precision.entries:
            if isinstance(matrix, Spectral):
                right, left = rotations(matrix)
                groups, out, inp = matrix.grid.shape
                once += times * groups * (right + self.outputs * left)
                pairs = self.outputs * (self.width + 1) / 2
                if times < 2:
                    each += groups * out * (inp + pairs)
                else:
                    once += times * self.outputs * groups * out * inp
                    each += self.outputs * (1 + self.width) * groups * out * inp
            else:
                rank = matrix.values.shape[0] if isinstance(matrix, LowRank) else block.size
                each += self.outputs * block.size * (rank + self.width)
        return OVERHEAD * (once + ratios * each)


def scored(outputs: int, draws: int = 1) -> float:
    """Per example with so many outputs: a score from normal ones, by ``draws`` draws of them (1: in closed form)."""
    return ELEMENT * outputs * draws
