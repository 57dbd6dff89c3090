"""Blocks and the flat parameter order. The one place that knows where a parameter sits in a flat vector.

Flat vectors follow ``model.named_parameters()`` restricted to the selected parameters, each flattened row-major. A
*block* is a set of whole parameters with a canonical shape ``(R, O, I)``: ``[W|b]`` of a layer (``R`` groups), or a
vector ``(1, P_b, 1)`` for parameters that have no matrix form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.layers.base import MatrixView

__all__ = ["Block", "FlatLayout", "flat_layout", "merged", "unused_blocks"]


@dataclass(frozen=True)
class Block:
    """A group of whole parameters that share one curvature block.

    Attributes:
        name: module path (or parameter name) shown to users.
        parameters: parameter names; for a matrix block the weight (if selected) comes first, then the bias.
        shapes: their shapes.
        shape: canonical shape ``(R, O, I)``; ``I`` includes the bias column.
        view: how the weight reads as ``(R, O, I)``; ``None`` for a vector block or a bias on its own.
        factorises: inputs and columns are known (a matrix block); otherwise only per-example gradients (a vector).
        one_hot: the inputs are tokens, so the input factor is diagonal.
        pieces: for each parameter the range of entries that belong to the block, ``None`` for all of them.
        turned: the weight is also used as its transpose (tied embedding and output matrix, tied autoencoder); says
            whether the inputs there are tokens.
        note: why the parameters have no matrix form, where a rule could not be taken; says nothing about equality.
        unused: one parameter that took no part in any forward pass; its curvature is 0.
        failed: name of the layer rule that failed its check against autograd here, so that per-example gradients take
            its place; says nothing about equality.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, int, int]
    view: MatrixView | None
    factorises: bool
    one_hot: bool = False
    pieces: tuple[tuple[int, int] | None, ...] = ()
    turned: bool | None = None
    note: str = field(default="", compare=False)
    unused: bool = False
    failed: str = field(default="", compare=False, kw_only=True)

    @property
    def size(self) -> int:
        """Number of parameters ``P_b``."""
        return math.prod(self.shape)

    @property
    def has_bias_column(self) -> bool:
        """Whether the last input column is the constant 1 of a bias."""
        return self.factorises and (self.view is None or len(self.parameters) == 2)

    def as_turned(self) -> Block:
        """The block of the uses as ``Wᵀ``, with canonical shape ``(1, I, O)``."""
        assert self.view is not None and self.turned is not None
        view = self.view.turned()
        return replace(
            self, name=f"{self.name} (transposed)", shape=view.shape, view=view, one_hot=self.turned, turned=None
        )

    def covers(self, parameter: str, start: int, stop: int) -> bool:
        """Whether entries ``start`` to ``stop`` of a parameter belong to this block."""
        if parameter not in self.parameters:
            return False
        piece = self.pieces[self.parameters.index(parameter)] if self.pieces else None
        return piece is None or (piece[0] <= start and stop <= piece[1])

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped tensors ``(K, *shape)`` by name to canonical ``(K, R, O, I)``."""
        count = tensors[self.parameters[0]].shape[0]
        parts = [tensors[name] for name in self.parameters]
        for k, piece in enumerate(self.pieces):
            if piece is not None:
                parts[k] = parts[k].reshape(count, -1)[:, piece[0] : piece[1]]
        if not self.factorises:
            return torch.cat([part.reshape(count, -1) for part in parts], 1).reshape(count, *self.shape)
        columns = []
        if self.view is not None:
            columns.append(self.view.to_matrix(parts[0]))
        if self.has_bias_column:
            columns.append(parts[-1].reshape(count, *self.shape[:2], 1))
        return torch.cat(columns, -1) if len(columns) > 1 else columns[0]

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Canonical ``(K, R, O, I)`` to parameter-shaped tensors ``(K, *shape)`` by name.

        Entries that do not belong to the block are 0; :func:`merged` puts the blocks of one parameter together.
        """
        count = matrix.shape[0]
        if not self.factorises:
            sizes = [math.prod(shape) for shape in self.shapes]
            parts = matrix.reshape(count, -1).split(sizes, 1)
            return {
                name: part.reshape(count, *shape)
                for name, part, shape in zip(self.parameters, parts, self.shapes, strict=True)
            }
        out: dict[str, Tensor] = {}
        if self.view is not None:
            weight = matrix[..., :-1] if self.has_bias_column else matrix
            out[self.parameters[0]] = self._placed(self.view.from_matrix(weight, (-1,)), 0)
        if self.has_bias_column:
            out[self.parameters[-1]] = self._placed(matrix[..., -1].reshape(count, -1), len(self.parameters) - 1)
        return out

    def _placed(self, flat: Tensor, index: int) -> Tensor:
        """Entries ``(K, n)`` of a parameter's piece as the whole parameter, zero elsewhere."""
        shape = self.shapes[index]
        piece = self.pieces[index] if self.pieces else None
        if piece is None:
            return flat.reshape(flat.shape[0], *shape)
        out = flat.new_zeros(flat.shape[0], math.prod(shape))
        out[:, piece[0] : piece[1]] = flat
        return out.reshape(flat.shape[0], *shape)

    def to_json(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_json` rebuilds the block."""
        view = self.view
        return {
            "name": self.name,
            "parameters": list(self.parameters),
            "shapes": [list(shape) for shape in self.shapes],
            "shape": list(self.shape),
            "view": None if view is None else [list(view.split), list(view.permutation), list(view.shape)],
            "factorises": self.factorises,
            "one_hot": self.one_hot,
            "pieces": [None if piece is None else list(piece) for piece in self.pieces],
            "turned": self.turned,
            "note": self.note,
            "unused": self.unused,
            "failed": self.failed,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Block:
        """The inverse of :meth:`to_json`."""
        view = data["view"]
        return cls(
            name=data["name"],
            parameters=tuple(data["parameters"]),
            shapes=tuple(tuple(shape) for shape in data["shapes"]),
            shape=tuple(data["shape"]),
            view=None if view is None else MatrixView(tuple(view[0]), tuple(view[1]), tuple(view[2])),
            factorises=data["factorises"],
            one_hot=data["one_hot"],
            pieces=tuple(None if piece is None else (piece[0], piece[1]) for piece in data.get("pieces", ())),
            turned=data.get("turned"),
            note=data.get("note", ""),
            unused=data.get("unused", False),
            failed=data.get("failed", ""),
        )


def merged(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors ``(K, *shape)`` of several blocks by name; what blocks say about one parameter is added up."""
    out: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            out[name] = out[name] + tensor if name in out else tensor
    return out


@dataclass(frozen=True)
class FlatLayout:
    """Names and shapes of the selected parameters in flat order.

    Attributes:
        names: parameter names.
        shapes: their shapes.
        held: entries that are constants, not parameters (the padding row of an embedding), as a name with the first
            entry and one past the last. They have curvature 0, and no draw moves them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    held: tuple[tuple[str, int, int], ...] = field(default=(), kw_only=True)

    @property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """Total number of selected parameters ``P``."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """``(K, P)`` to ``{name: (K, *shape)}`` (views).

        Raises:
            ShapeMismatch: if the last axis is not ``P`` long.
        """
        if flat.shape[-1] != self.size:
            raise ShapeMismatch(f"expected vectors of {self.size} parameters, got shape {tuple(flat.shape)}")
        parts = flat.split(self.sizes, -1)
        return {
            name: part.reshape(flat.shape[0], *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``{name: (K, *shape)}`` to ``(K, P)``."""
        return torch.cat([tensors[name].reshape(tensors[name].shape[0], -1) for name in self.names], 1)

    def positions(self, block: Block) -> Tensor:
        """Flat positions of a block's entries in canonical order, ``(P_b,)`` of int64."""
        offsets, start = {}, 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            offsets[name] = torch.arange(start, start + size).reshape(1, *shape)
            start += size
        return block.pack({name: offsets[name] for name in block.parameters}).reshape(-1)

    def common(self, other: FlatLayout) -> FlatLayout | None:
        """The layout of two data sets together: held is what is in both. ``None`` if they cover other parameters."""
        held = tuple(place for place in self.held if place in other.held)
        mine, theirs = replace(self, held=held), replace(other, held=held)
        return mine if mine == theirs else None

    def hold(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Changes ``{name: (K, *shape)}`` of the parameters, with zeros where entries are held."""
        out = dict(parts)
        for name, start, stop in self.held:
            if name in out:
                out[name] = out[name].clone()
                out[name].view(len(out[name]), -1)[:, start:stop] = 0
        return out

    def free(self, block: Block) -> Tensor:
        """1 at the entries of a block that are parameters, 0 where they are held or unused, ``(R, O, I)``."""
        if block.unused:
            return torch.zeros(block.shape)
        pairs = zip(block.parameters, block.shapes, strict=True)
        return block.pack(self.hold({name: torch.ones(1, *shape) for name, shape in pairs}))[0]

    def held_in(self, block: Block) -> list[int]:
        """How many entries of a block are held, range by range (a range belongs to one block whole)."""
        return [stop - start for name, start, stop in self.held if block.covers(name, start, stop)]

    def held_positions(self) -> Tensor:
        """Flat positions of the held entries, ``(k,)`` of int64."""
        starts = dict(zip(self.names, torch.tensor([0, *self.sizes[:-1]]).cumsum(0).tolist(), strict=True))
        found = [torch.arange(starts[name] + start, starts[name] + stop) for name, start, stop in self.held]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def to_json(self) -> list[list[int]] | None:
        """Which entries it covers, as plain values: ``None`` for whole parameters."""
        return None

    def whole(self, name: str) -> Block:
        """One vector block ``(1, P, 1)`` over all of it, in flat order."""
        return Block(name, self.names, self.shapes, (1, self.size, 1), None, False)


def unused_blocks(layout: FlatLayout, names: Sequence[str]) -> dict[str, Block]:
    """Blocks of parameters that took no part: one for each, so that another data set may use them as it likes."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return {n: Block(n, (n,), (shapes[n],), (1, math.prod(shapes[n]), 1), None, False, unused=True) for n in names}


def flat_layout(parameters: Mapping[str, Tensor], names: Sequence[str]) -> FlatLayout:
    """The layout of ``names`` (already in model order) with the shapes of ``parameters``."""
    return FlatLayout(tuple(names), tuple(tuple(parameters[name].shape) for name in names))
