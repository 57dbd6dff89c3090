"""Single weights as the flat vector: a layout that covers some entries of some parameters (a subnetwork).

A vector of such a layout has one number per chosen entry, in model order. As parameters it reads with zeros at the
entries that were not chosen, so that a draw added to the trained weights moves the chosen ones only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.tape.blocks import Block, FlatLayout

__all__ = ["EntryBlock", "EntryLayout"]


@dataclass(frozen=True)
class EntryLayout(FlatLayout):
    """Names and shapes of the parameters that have chosen entries, and which entries those are.

    Attributes:
        chosen: for every name, row-major positions in that parameter, increasing.
    """

    chosen: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, layout: FlatLayout, positions: Tensor) -> EntryLayout:
        """The chosen flat ``positions (k,)`` of a layout of whole parameters; parameters without any are left out."""
        ordered, kept, start = positions.sort().values.cpu(), [], 0
        for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
            mine = ordered[(ordered >= start) & (ordered < start + size)] - start
            start += size
            if len(mine):
                kept.append((name, shape, tuple(mine.tolist())))
        names, shapes, chosen = zip(*kept, strict=True)
        return cls(names, shapes, chosen)

    @property
    def sizes(self) -> list[int]:
        return [len(entries) for entries in self.chosen]

    @cached_property
    def index(self) -> tuple[Tensor, ...]:
        """The chosen entries as tensors ``(k_name,)`` of int64."""
        return tuple(torch.tensor(entries) for entries in self.chosen)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """``(K, k)`` to ``{name: (K, *shape)}`` with zeros at the entries that were not chosen.

        Raises:
            ShapeMismatch: if the last axis is not ``k`` long.
        """
        if flat.shape[-1] != self.size:
            raise ShapeMismatch(f"expected vectors of {self.size} chosen weights, got shape {tuple(flat.shape)}")
        out = {}
        parts = zip(self.names, self.shapes, self.index, flat.split(self.sizes, -1), strict=True)
        for name, shape, index, part in parts:
            whole = part.new_zeros(flat.shape[0], torch.Size(shape).numel())
            out[name] = whole.index_copy(1, index.to(part.device), part).reshape(flat.shape[0], *shape)
        return out

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``{name: (K, *shape)}`` to ``(K, k)``."""
        parts = []
        for name, index in zip(self.names, self.index, strict=True):
            whole = tensors[name].reshape(tensors[name].shape[0], -1)
            parts.append(whole[:, index.to(whole.device)])
        return torch.cat(parts, 1)

    def positions(self, block: Block) -> Tensor:
        """Flat positions of a block's entries: the one block covers all of them in order, ``(k,)``."""
        return torch.arange(block.size)

    def within(self, layout: FlatLayout) -> Tensor:
        """Flat positions of the chosen entries in a layout of whole parameters, ``(k,)`` of int64, increasing."""
        start, found = 0, dict(zip(self.names, self.index, strict=True))
        parts = []
        for name, size in zip(layout.names, layout.sizes, strict=True):
            parts.append(found[name] + start if name in found else torch.zeros(0, dtype=torch.int64))
            start += size
        return torch.cat(parts)

    def to_json(self) -> list[list[int]] | None:
        """The chosen entries of every parameter, as plain values."""
        return [list(entries) for entries in self.chosen]

    def whole(self, name: str) -> EntryBlock:
        """One block ``(1, k, 1)`` over all chosen entries, in flat order."""
        return EntryBlock(name, self.names, self.shapes, (1, self.size, 1), None, False, layout=self)


@dataclass(frozen=True)
class EntryBlock(Block):
    """All chosen entries of a layout as one vector block."""

    layout: EntryLayout | None = None

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped tensors ``(K, *shape)`` by name to the chosen entries ``(K, 1, k, 1)``."""
        assert self.layout is not None
        flat = self.layout.join(tensors)
        return flat.reshape(flat.shape[0], *self.shape)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Chosen entries ``(K, 1, k, 1)`` to parameter-shaped tensors, zero elsewhere."""
        assert self.layout is not None
        return self.layout.split(matrix.reshape(matrix.shape[0], -1))
