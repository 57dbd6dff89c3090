"""Root columns sent back through the network: all of them, or some that are chosen, beside closed forms at the output.

A set of columns ``{r_i}`` with ``Σ r_i r_iᵀ = H`` is thinned without bias by keeping column ``i`` with probability
``π_i`` and scaling it by ``π_i^{-1/2}``. Where inclusions are not positively correlated, the squared Frobenius error of
the sum is at most ``Σ (1/π_i − 1) w_i²`` in expectation, with ``w_i = ‖r_i‖²``; for a given number of columns that is
least for ``π_i = min(1, c w_i)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.roots import Root
from laplace_kf.tape import Observation, Signals

__all__ = [
    "OutputCurvature",
    "Sink",
    "at_closed_forms",
    "counted_columns",
    "error_probabilities",
    "inclusion_probabilities",
    "send_all",
    "send_chosen",
    "systematic",
]


class Sink(Protocol):
    """Where an estimator puts what it found in one minibatch."""

    def add_columns(self, signals: Mapping[str, Signals]) -> None:
        """Takes in the signals of some columns."""

    def add_output_factor(self, name: str, factor: Tensor) -> None:
        """Takes in an output factor ``(O, O)`` of a block."""

    def takes_output_signals(self) -> bool:
        """Whether :meth:`add_columns` takes the closed forms of ``observation.output_signals``."""

    def expect_columns(self, count: int, observation: Observation) -> None:
        """Is told how many columns of this minibatch will come; warns if they will take very long."""

    def columns_at_once(self, observation: Observation) -> int:
        """How many columns of this minibatch fit into the memory budget (at least 1)."""


class OutputCurvature:
    """A likelihood's curvature at the outputs ``(N, ...)`` of one minibatch."""

    def __init__(self, likelihood: Likelihood, outputs: Tensor, targets: Any) -> None:
        self.likelihood, self.outputs, self.targets = likelihood, outputs, targets

    @cached_property
    def _total(self) -> Tensor:
        return self.likelihood.summed_curvature(self.outputs, self.targets)

    def total(self, directions: Tensor | None = None) -> Tensor:
        """``Σ_n Σ_t H_nt (C, C)``, computed once and not to be changed; or its product with ``directions (C, K)``."""
        if directions is None:
            return self._total
        return self.likelihood.summed_curvature(self.outputs, self.targets, directions)

    def diagonal(self) -> Tensor:
        """``diag(H_nt)``, ``(N, T, C)``."""
        return self.likelihood.curvature_diagonal(self.outputs, self.targets)

    def rows(self, output: int) -> Tensor:
        """Row ``output`` of every ``H_nt``, ``(N, T, C)``."""
        return self.likelihood.curvature_rows(output, self.outputs, self.targets)


def at_closed_forms(observation: Observation, curvature: OutputCurvature, sink: Sink) -> set[str]:
    """Hands on the blocks whose layer's output is the network's, ``(N, ...)``, without columns; their names."""
    if not sink.takes_output_signals():
        return set()
    found = observation.output_signals(curvature.likelihood.to_positions, curvature)
    if found:
        sink.add_columns(found)
    return set(found)


def send_all(
    observation: Observation, likelihood: Likelihood, outputs: Tensor, root: Root, sink: Sink, closed: Collection[str]
) -> None:
    """Every column of the root, at outputs ``(N, ...)``, for all blocks that are not ``closed``."""
    places = root.places()  # columns of targets that are ignored are not sent back
    total = root.count * places.shape[1]
    sink.expect_columns(total, observation)
    step = sink.columns_at_once(observation)
    for start in range(0, total, step):
        chunk = likelihood.from_positions(root.columns(start, start + step, places), outputs)
        signals = observation.signals(chunk)
        sink.add_columns({name: signal for name, signal in signals.items() if name not in closed})


def counted_columns(likelihood: Likelihood, outputs: Tensor, targets: Any, root: Root) -> tuple[Tensor, int]:
    """Flat places in ``(N, T, K)`` of the columns of positions that count, ``(M,)``; how many examples count.

    Only they are there to choose from, so that the others do not shift the choice.
    """
    kept = likelihood.counted_positions(outputs, targets)
    place = kept.flatten().nonzero()[:, 0, None] * root.count + torch.arange(root.count, device=kept.device)
    return place.flatten(), int(kept.any(1).sum())


def send_chosen(
    observation: Observation,
    likelihood: Likelihood,
    outputs: Tensor,
    root: Root,
    chosen: Tensor,
    scale: Tensor,
    sink: Sink,
    closed: Collection[str] = (),
) -> None:
    """Some columns of the root, each as a row of its own example, for all blocks that are not ``closed``.

    Args:
        observation, likelihood, outputs, root, sink: of the minibatch; outputs ``(N, ...)``.
        chosen: flat places in ``(N, T, K)``, ``(M,)``.
        scale: what each column is multiplied by, ``(M,)``.
        closed: names of blocks that are left out.
    """
    kinds, (count, positions, width) = root.count, root.shape
    example, position, kind = chosen // (positions * kinds), chosen // kinds % positions, chosen % kinds
    values = root.entries(kind, example, position) * scale[:, None]  # (M, C)
    step = max(1, sink.columns_at_once(observation)) * count

    def hand_on(signals: dict[str, Any]) -> None:
        sink.add_columns({name: signal for name, signal in signals.items() if name not in closed})

    for start in range(0, len(chosen), step):
        part = slice(start, start + step)
        rows = values.new_zeros(1, len(values[part]), positions, width)
        rows[0, torch.arange(rows.shape[1], device=rows.device), position[part]] = values[part]
        columns = likelihood.from_positions(rows, outputs[example[part]])
        if observation.chain is not None:
            hand_on(observation.row_signals(columns, example[part]))
            continue
        again = observation.gathered(example[part])
        if again is not None:
            hand_on(again.signals(columns))
            continue
        for chunk in _layers(rows[0], example[part], count).split(max(1, sink.columns_at_once(observation))):
            hand_on(observation.signals(likelihood.from_positions(chunk, outputs)))


def _layers(rows: Tensor, example: Tensor, count: int) -> Tensor:
    """Rows ``(M, T, C)`` of examples ``(M,)`` as columns ``(V, N, T, C)``: an example's k-th row stands in column k."""
    rank = (example[:, None] == example[None, :]).tril(-1).sum(1)
    out = rows.new_zeros(int(rank.max()) + 1, count, *rows.shape[1:])
    out[rank, example] = rows
    return out


# ------------------------------------------------------------------------------------------------ the choice


def inclusion_probabilities(weights: Tensor, budget: float) -> Tensor:
    """``min(1, c · weights)`` with ``c`` such that they add up to ``min(budget, number of positive weights)``.

    Args:
        weights: non-negative, ``(K,)``.
        budget: expected number of inclusions.
    """
    positive = weights > 0
    if int(positive.sum()) <= budget:
        return positive.to(weights.dtype)
    ordered, _ = weights.sort(descending=True)
    tail = ordered.flip(0).cumsum(0).flip(0)  # sum of this and all smaller weights
    certain = torch.arange(len(ordered), device=weights.device, dtype=weights.dtype)
    scale = (budget - certain) / tail.clamp_min(torch.finfo(weights.dtype).tiny)
    # the first j for which the j largest are certain and the next one is not
    fits = (scale * ordered <= 1) & (budget - certain > 0)
    first = int(torch.nonzero(fits)[0, 0]) if bool(fits.any()) else 0
    return (scale[first] * weights).clamp(0, 1)


def error_probabilities(weights: Tensor, error: float) -> Tensor:
    """``min(1, c · weights)`` with the smallest ``c`` for which ``Σ (1/π − 1) weights²`` is at most ``error``.

    Args:
        weights: non-negative, ``(K,)``.
        error: expected squared error that is allowed, in units of squared weights.
    """
    positive = weights[weights > 0]
    if not len(positive):
        return torch.zeros_like(weights)
    ordered, _ = positive.sort(descending=True)
    sums, squares = (part.flip(0).cumsum(0).flip(0) for part in (ordered, ordered.square()))
    # the error if c is one over the j-th weight: those before it are certain
    within = (ordered * sums - squares <= error).nonzero()
    first = int(within[0, 0]) if len(within) else len(ordered) - 1
    scale = sums[first] / (error + squares[first])
    return (scale * weights).clamp(0, 1)


def systematic(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Indices included by systematic sampling with probabilities ``(K,)``; their number is fixed up to rounding."""
    # in a random order: equal probabilities in the order of the data would pick the same column of every example
    order = torch.randperm(len(probabilities), generator=generator, device=generator.device).to(probabilities.device)
    edges = probabilities[order].double().cumsum(0)
    start = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).to(edges.device)
    crossings = torch.floor(edges - start)
    before = torch.cat([torch.floor(-start)[None], crossings[:-1]])
    return order[crossings > before].sort().values
