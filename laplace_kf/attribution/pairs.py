"""``g_q^T Λ⁻¹ g_i`` for many pairs: one side is solved once, the other stays signals.

Two ways, block by block:

* *directions*: ``Λ⁻¹ g_q`` as a canonical ``(R, O, I)`` for every query, and the signals of the other side projected on
  them; exact for every structure and every kind of signals;
* *terms*, for a Kronecker block whose weights are used once an example on both sides: in the eigenbases the score is
  ``Σ_oi g_o g'_o a_i a'_i / S_oi``. Where ``1/S`` is the outer product ``u vᵀ`` (factored damping), that is the product
  of two small inner products; for ``S = N s_o s_i + λ`` the grid is a sum of a few such terms, as many as the
  floating-point type can tell (adaptive cross approximation; about 8 in float32 and 20 in float64). So ``O·I`` products
  a pair become ``terms · (O + I)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise, Matrix, Spectral
from laplace_kf.predictive.covariance_shares import Piece, like_of, simplest, solver_of
from laplace_kf.tape import Block, OuterSignals, Signals

__all__ = ["Queries", "Terms", "cross_terms"]

ACCURACY = 100  # roundings of the type, to which a grid is approximated (in the norm that scores are made of)
MOST_TERMS = 64
CACHED = 256  # examples at a time, so that products of 500 queries stay in a processor's cache


class Queries:
    """Query gradients with everything that does not depend on the other side.

    Args:
        piece: signals of the queries, ``V·n`` rows.
        precision: Λ.
        accuracy: relative error of the scores, where terms are summed; ``None`` for the type's rounding.
    """

    def __init__(self, piece: Piece, precision: Blockwise, accuracy: float | None = None) -> None:
        self.rows = piece.width * piece.count
        self.like = like_of(precision)
        tolerance = max(accuracy or 0.0, ACCURACY * torch.finfo(self.like.dtype).eps)
        self._shares = [
            _Share(block, simplest(matrix, block), piece, self.like, tolerance) for block, matrix in precision.entries
        ]

    def scores(self, piece: Piece) -> Tensor:
        """Products with another piece's gradients, ``(K, M)``: ``K = V·n`` queries, columns outermost on both sides."""
        total = self.like.new_zeros(self.rows, piece.width * piece.count)
        for share in self._shares:
            share.add(piece, total)
        return total


class _Share:
    """What one block of the precision adds."""

    def __init__(self, block: Block, matrix: Matrix, piece: Piece, like: Tensor, tolerance: float) -> None:
        self.tolerance = tolerance
        self.block, self.matrix, self.piece, self.like = block, matrix, piece, like
        self._directions: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._terms: Terms | None = None
        self.own = piece.blocks.get(block.name) == block and (
            not isinstance(matrix, Spectral) or matrix.shape == block.shape
        )

    def add(self, other: Piece, total: Tensor) -> None:
        """Adds to the scores ``(K, M)``."""
        if self.own and (self.block.name not in self.piece.signals or self.block.name not in other.signals):
            return
        if self.own and self._separable(other):
            signals = other.signals[self.block.name]
            assert isinstance(signals, OuterSignals)
            if self._terms is None:
                mine = self.piece.signals[self.block.name]
                assert isinstance(self.matrix, Spectral) and isinstance(mine, OuterSignals)
                self._terms = Terms.of(mine, signals, self.matrix, self.tolerance)
            if self._terms.cheaper:
                self._terms.add(signals, total)
                return
        for name, directions in self._solved(other).items():
            total += other.signals[name].project(directions).T.to(self.like)

    def _separable(self, other: Piece) -> bool:
        sides = (self.piece.signals[self.block.name], other.signals[self.block.name])
        return isinstance(self.matrix, Spectral) and all(map(_once, sides))

    def _solved(self, other: Piece) -> dict[str, Tensor]:
        """``Λ⁻¹ g_q`` as ``(K, R, O, I)`` over the blocks of the other side's signals."""
        key = tuple(other.signals)
        if key not in self._directions:
            solve = solver_of(self.matrix)
            if self.own:
                signals = self.piece.signals[self.block.name]
                rows = signals.gradients(slice(0, self.piece.count), self.like.dtype).reshape(-1, self.block.size)
                found = {self.block.name: solve(rows).reshape(-1, *self.block.shape)}
            else:
                rows = self.piece.rows(self.block, slice(0, self.piece.count), self.like.dtype)
                found = other.restricted(self.block, solve(rows))
            self._directions[key] = found
        return self._directions[key]


def _once(signals: Signals) -> bool:
    """Whether the weights are used once an example, in one group."""
    return (
        isinstance(signals, OuterSignals)
        and signals.example is None
        and not signals.rotated
        and signals.a.shape[1] == 1
        and signals.block.shape[0] == 1
        and signals.block.shape[2] > 1
    )


@dataclass(frozen=True)
class Terms:
    """A Kronecker block's scores as a sum of products of two inner products.

    Attributes:
        inputs: ``(k, n, I)`` against the other side's raw inputs; with the bias column last.
        outputs: ``(k, V*n, O)`` against its raw columns.
        cheaper: whether that is less work than directions.
    """

    inputs: Tensor
    outputs: Tensor
    cheaper: bool

    @classmethod
    def of(cls, mine: OuterSignals, other: OuterSignals, matrix: Spectral, tolerance: float) -> Terms:
        """Made for the queries ``mine``, accurate for other sides with about the energies of ``other``."""
        like = matrix.like
        a, g = _inputs(mine, like), _columns(mine, like)  # (n, I), (V·n, O)
        a_turned, g_turned = _turned(a, matrix.inputs.dual), _turned(g, matrix.outputs.dual)
        inverse = 1 / matrix.grid[0].double()
        found = _outer(inverse, 8 * torch.finfo(like.dtype).eps)
        if found is None:
            energies = []
            for own, theirs in (
                (g_turned, _turned(_columns(other, like), matrix.outputs.dual)),
                (a_turned, _turned(_inputs(other, like), matrix.inputs.dual)),
            ):
                energy = own.double().square().mean(0).sqrt() * theirs.double().square().mean(0).sqrt()
                energies.append(energy.clamp_min(float(energy.max()) * torch.finfo(like.dtype).eps ** 2))
            found = cross_terms(inverse, energies[0], energies[1], tolerance)
        width, outs = a.shape[1], g.shape[1]
        if found is None or len(found[0]) * (width + outs) >= width * outs:
            empty = like.new_zeros(0, 0, 0)
            return cls(empty, empty, False)
        u, v = (part.to(like) for part in found)
        inputs = torch.stack([_back(a_turned * row, matrix.inputs.dual) for row in v])  # (k, n, I)
        outputs = torch.stack([_back(g_turned * row, matrix.outputs.dual) for row in u])  # (k, V·n, O)
        return cls(inputs, outputs, True)

    @property
    def count(self) -> int:
        """k."""
        return len(self.inputs)

    def add(self, signals: OuterSignals, total: Tensor) -> None:
        """Adds the scores against ``M = V'·n'`` columns to ``total (K, M)``, term by term: nothing larger is made."""
        a, g = signals.a[:, 0, 0].to(self.inputs), _columns(signals, self.inputs)
        queries, examples = self.inputs.shape[1], a.shape[0]
        width = a.shape[1]
        whole = total.view(-1, queries, total.shape[1] // examples, examples)
        for inputs, outputs in zip(self.inputs, self.outputs, strict=True):
            for start in range(0, examples, CACHED):
                part = slice(start, start + CACHED)
                left = inputs[:, :width] @ a[part].T
                if signals.has_constant:
                    left += inputs[:, -1:]
                right = outputs @ _some(g, examples, part).T
                shape = (len(whole), queries, whole.shape[2], left.shape[1])
                whole[..., part].addcmul_(left[None, :, None], right.view(shape))


def _inputs(signals: OuterSignals, like: Tensor) -> Tensor:
    a = signals.a[:, 0, 0].to(like)
    return torch.cat([a, a.new_ones(a.shape[0], 1)], 1) if signals.has_constant else a


def _columns(signals: OuterSignals, like: Tensor) -> Tensor:
    return signals.g[:, :, 0, 0].to(like).flatten(0, 1)


def _some(columns: Tensor, examples: int, part: slice) -> Tensor:
    """Those of columns ``(V·n, O)`` that belong to a run of the examples."""
    return columns.reshape(-1, examples, columns.shape[1])[:, part].flatten(0, 1)


def _turned(rows: Tensor, dual: Tensor | None) -> Tensor:
    return rows if dual is None else rows @ dual[0]


def _back(rows: Tensor, dual: Tensor | None) -> Tensor:
    return rows if dual is None else rows @ dual[0].T


def _outer(grid: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """A positive grid ``(O, I)`` as one outer product ``u (1, O)``, ``v (1, I)``, if every entry is; else ``None``."""
    u, v = grid[:, :1].T / grid[0, 0], grid[:1]
    return (u, v) if MOST_TERMS and bool(((u.T * v - grid).abs() <= tolerance * grid).all()) else None


def cross_terms(grid: Tensor, outputs: Tensor, inputs: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """A positive grid as a sum of outer products, accurate where it matters (adaptive cross approximation).

    Args:
        grid: ``(O, I)``.
        outputs, inputs: how large the entries of rows ``(O,)`` and columns ``(I,)`` are that it will be between.
        tolerance: the error of ``outputs · grid · inputs`` over its size, both in Frobenius norm.

    Returns:
        ``u (k, O)`` and ``v (k, I)`` with ``grid ≈ uᵀ v``; ``None`` if 64 terms do not suffice.
    """
    rest = outputs[:, None] * grid * inputs[None, :]
    wanted = tolerance / 10 * rest.norm()  # the rest is for leaving out the smallest of the terms
    us: list[Tensor] = []
    vs: list[Tensor] = []
    while len(us) < MOST_TERMS:
        flat = int(rest.abs().argmax())
        row, column = divmod(flat, rest.shape[1])
        pivot = rest[row, column]
        if float(pivot) == 0:
            break
        u, v = rest[:, column] / pivot, rest[row].clone()
        us.append(u / outputs)
        vs.append(v / inputs)
        rest = rest - u[:, None] * v[None, :]
        if bool(rest.norm() <= wanted):
            break
    else:
        return None
    if not us:
        return None
    return _fewest(torch.stack(us) * outputs, torch.stack(vs) * inputs, outputs, inputs, tolerance)


def _fewest(u: Tensor, v: Tensor, outputs: Tensor, inputs: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Weighted terms ``(k, O)`` and ``(k, I)`` in fewest with the same sum up to ``tolerance``, weights divided out."""
    left, right = torch.linalg.qr(u.T), torch.linalg.qr(v.T)
    p, values, q = torch.linalg.svd(left.R @ right.R.T)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost from each on
    count = max(1, int((tail > 0.9 * tolerance * values.norm()).sum()))
    roots = values[:count].sqrt()
    return (left.Q @ p[:, :count] * roots).T / outputs, (right.Q @ q[:count].T * roots).T / inputs
