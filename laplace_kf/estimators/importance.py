"""Importance-sampled root columns: back-propagates only the columns that carry the curvature.

On a trained classifier most root columns ``√p_k (e_k − p)`` are almost zero. A column with squared norm ``q`` is kept
with probability ``π = min(1, c q)`` and scaled by ``π^{-1/2}``, which is unbiased; ``c`` is set so that the expected
number kept is the budget. Selection is systematic in a random order, which keeps the number of columns fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import InvalidArgument
from laplace_kf.estimators.base import ESTIMATORS, Estimator, Sink, widened
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.tape import Observation

__all__ = ["Importance", "inclusion_probabilities", "systematic"]


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


def systematic(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Indices included by systematic sampling with probabilities ``(K,)``; their number is fixed up to rounding."""
    # in a random order: equal probabilities in the order of the data would pick the same column of every example
    order = torch.randperm(len(probabilities), generator=generator, device=generator.device).to(probabilities.device)
    edges = probabilities[order].double().cumsum(0)
    start = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).to(edges.device)
    crossings = torch.floor(edges - start)
    before = torch.cat([torch.floor(-start)[None], crossings[:-1]])
    return order[crossings > before].sort().values


@ESTIMATORS.register("importance")
class Importance(Estimator):
    """Root columns drawn with probabilities proportional to their squared norms, ``columns`` of them per example.

    Args:
        columns: expected number of root columns per example.
    """

    name = "importance"
    draws = True

    def __init__(self, columns: float = 1.0) -> None:
        if not columns > 0:
            raise InvalidArgument(f"columns must be positive, got {columns}")
        self.columns = columns

    def options(self) -> dict[str, Any]:
        return {"columns": self.columns}

    def measure(self, observation: Observation, likelihood: Likelihood, sink: Sink, generator: torch.Generator) -> None:
        outputs = widened(observation.outputs)
        root = likelihood.root(outputs, observation.targets)
        kinds, (count, positions, width) = root.count, root.shape
        kept = likelihood.counted_positions(outputs, observation.targets)
        # only columns of positions that count are there to choose from, so that the others do not shift the choice
        place = kept.flatten().nonzero()[:, 0, None] * kinds + torch.arange(kinds, device=kept.device)
        place = place.flatten()
        weights = root.norms().reshape(-1)[place]  # of (N, T, K)
        probability = inclusion_probabilities(weights, self.columns * int(kept.any(1).sum()))
        taken = systematic(probability, generator)
        if not len(taken):
            return
        chosen = place[taken]
        example, position, kind = chosen // (positions * kinds), chosen // kinds % positions, chosen % kinds
        scale = probability[taken].rsqrt().to(outputs.dtype)
        values = root.entries(kind, example, position) * scale[:, None]  # (M, C)
        step = max(1, sink.columns_at_once(observation)) * count
        for start in range(0, len(chosen), step):
            part = slice(start, start + step)
            rows = values.new_zeros(1, len(values[part]), positions, width)
            rows[0, torch.arange(rows.shape[1], device=rows.device), position[part]] = values[part]
            columns = likelihood.from_positions(rows, outputs[example[part]])
            if observation.chain is not None:
                sink.add_columns(observation.row_signals(columns, example[part]))
                continue
            again = observation.gathered(example[part])
            if again is not None:
                sink.add_columns(again.signals(columns))
                continue
            for chunk in _layers(rows[0], example[part], count).split(max(1, sink.columns_at_once(observation))):
                sink.add_columns(observation.signals(likelihood.from_positions(chunk, outputs)))


def _layers(rows: Tensor, example: Tensor, count: int) -> Tensor:
    """Rows ``(M, T, C)`` of examples ``(M,)`` as columns ``(V, N, T, C)``: an example's k-th row stands in column k."""
    rank = (example[:, None] == example[None, :]).tril(-1).sum(1)
    out = rows.new_zeros(int(rank.max()) + 1, count, *rows.shape[1:])
    out[rank, example] = rows
    return out
