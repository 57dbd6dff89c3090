"""Rows of examples of different lengths (the nodes of several graphs), brought to one length by padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ragged"]


@dataclass(frozen=True)
class Ragged:
    """Which row belongs to which example, for rows in any order.

    Attributes:
        count: number of examples N.
        longest: positions L of every example after padding.
        slot: place ``(M,)`` of every row among the ``N·L`` padded ones.
        source: row ``(N·L,)`` that stands at every padded place; M where there is none.
    """

    count: int
    longest: int
    slot: Tensor
    source: Tensor

    @classmethod
    def of(cls, example: Tensor, count: int, least: int = 1) -> Ragged:
        """From the example ``(M,)`` of every row; rows of one example keep their order.

        Args:
            example: numbers in ``0 .. count - 1``.
            count: number of examples.
            least: fewest positions L of an example after padding.
        """
        total = example.shape[0]
        lengths = torch.bincount(example, minlength=count)
        longest = max(least, int(lengths.max())) if count else least
        order = torch.argsort(example, stable=True)
        starts = lengths.cumsum(0) - lengths
        places = torch.empty_like(order)
        places[order] = torch.arange(total, device=example.device) - starts[example[order]]
        slot = example * longest + places
        source = torch.full((count * longest,), total, dtype=slot.dtype, device=slot.device)
        source[slot] = torch.arange(total, device=slot.device)
        return cls(count, longest, slot, source)

    @property
    def kept(self) -> Tensor:
        """Which padded places hold a row, bool ``(N, L)``."""
        return (self.source < self.slot.shape[0]).reshape(self.count, self.longest)

    def padded(self, rows: Tensor, axis: int = 0, fill: float = 0) -> Tensor:
        """Rows ``(..., M, *rest)`` with M on ``axis`` to ``(..., N, L, *rest)``, with ``fill`` where there is none."""
        before, after = rows.shape[:axis], rows.shape[axis + 1 :]
        nothing = rows.new_full((*before, 1, *after), fill)
        found = torch.cat([rows, nothing], axis).index_select(axis, self.source.to(rows.device))
        return found.reshape(*before, self.count, self.longest, *after)

    def flat(self, padded: Tensor) -> Tensor:
        """The inverse of :meth:`padded`: ``(N, L, *rest)`` to ``(M, *rest)`` in the order of the rows."""
        return padded.flatten(0, 1).index_select(0, self.slot.to(padded.device))
