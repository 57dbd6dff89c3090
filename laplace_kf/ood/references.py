"""Scores of in-distribution data, against which new ones are judged, and one score from several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["References", "combined"]


@dataclass(frozen=True)
class References:
    """Sorted scores ``(n,)`` of in-distribution examples by name; all of the same n examples.

    Attributes:
        scores: ascending, in float64.
    """

    scores: Mapping[str, Tensor]

    @classmethod
    def of(cls, scores: Mapping[str, Tensor]) -> References:
        """From scores ``(n,)`` in any order; the same examples under every name."""
        return cls({name: value.detach().double().cpu().sort().values for name, value in scores.items()})

    @property
    def count(self) -> int:
        """Number of examples n."""
        return len(next(iter(self.scores.values())))

    def p_value(self, name: str, scores: Tensor) -> Tensor:
        """Upper-tail p-values ``(N,)`` in (0, 1]: ``(1 + #{reference ≥ score}) / (n + 1)``.

        For an example that is exchangeable with the references it is at most α with probability at most α.
        """
        known = self.scores[name].to(scores.device)
        above = len(known) - torch.searchsorted(known, scores.detach().double().contiguous())
        return (1.0 + above.double()) / (len(known) + 1.0)


def combined(p_values: list[Tensor]) -> Tensor:
    """``log mean_k 1 / p_k`` of p-values ``(N,)``: ``(N,)``, larger is stranger; minus the log of their harmonic mean.

    The harmonic mean p-value (Wilson 2019, PNAS 116(4)) needs no independence, and one small p-value is enough: scores
    that say nothing about a stranger hide it less than in Fisher's sum of logarithms.
    """
    return (1.0 / torch.stack(p_values)).mean(0).log()
