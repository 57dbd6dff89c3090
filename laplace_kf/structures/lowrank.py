"""Low rank plus diagonal: the leading eigenvectors of the whole ``C̄``, and what they leave of its diagonal.

Randomised subspace iteration over passes of the data (Halko et al. 2011): every pass multiplies ``C̄`` with ``rank +
oversample`` vectors at once, ``Y = Σ_vn j (jᵀ Q)``, through the layers' inputs and columns; no per-example gradient and
no ``(P, P)`` matrix is formed. The last product gives the Nyström form ``Y (QᵀY)⁺ Yᵀ`` (Tropp et al. 2017), which is
exact if the rank suffices and never exceeds ``C̄``, so that the remaining diagonal is not negative.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import InvalidArgument, NotPositiveDefinite
from laplace_kf.operators import Blockwise, LowRankBlock
from laplace_kf.structures.base import STRUCTURES, Results, Statistics, Structure, Sums, Work, added, zeros
from laplace_kf.tape import Block, FlatLayout, Signals
from laplace_kf.tape.blocks import merged


@STRUCTURES.register("lowrank")
class LowRankPlusDiagonal(Structure):
    """``Q diag(s) Qᵀ + diag(d)``: ``rank`` eigenvectors of the whole matrix, and the diagonal that they leave.

    Args:
        rank: number of eigenvectors that are kept.
        iterations: passes over the data; 1 is a plain sketch, 2 or 3 give nearly the leading eigenvectors.
        diagonal: keep the exact diagonal of what the low rank leaves over.
        oversample: vectors carried along beyond ``rank``.

    Raises:
        ValueError: for a rank or a number of iterations below 1, or a negative ``oversample``.
    """

    name = "lowrank"
    KEY = "all"

    def __init__(self, rank: int = 20, iterations: int = 2, diagonal: bool = True, oversample: int = 10) -> None:
        if rank < 1 or iterations < 1 or oversample < 0:
            raise InvalidArgument(
                "rank and iterations must be at least 1 and oversample not negative, got "
                f"{rank}, {iterations} and {oversample}"
            )
        self.rank, self.iterations, self.diagonal, self.oversample = rank, iterations, diagonal, oversample
        self.several_passes = iterations > 1
        self._left = iterations - 1  # passes after this one
        self._sketch: dict[str, Tensor] = {}  # Q by block (K, R, O, I)

    def options(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "iterations": self.iterations,
            "diagonal": self.diagonal,
            "oversample": self.oversample,
        }

    @property
    def fixed(self) -> Sums:
        return {name: (part,) for name, part in self._sketch.items()}

    def with_fixed(self, fixed: Sums) -> Structure:
        return self._with({name: part for name, (part,) in fixed.items()}, 0)

    def first(self) -> Structure:
        return self._with({}, self.iterations - 1)

    def _with(self, sketch: dict[str, Tensor], left: int) -> LowRankPlusDiagonal:
        other = copy.copy(self)
        other._sketch, other._left = sketch, left
        return other

    def settled(self, blocks: Mapping[str, Block], layout: FlatLayout, outputs: Tensor, like: Tensor) -> Structure:
        return self._with(dict(self._sketch), self._left)

    def _width(self, size: int) -> int:
        return min(size, self.rank + self.oversample)

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return 4 * layout.size * (self._width(layout.size) + 1) * itemsize  # vectors, products, and their factorisation

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        vectors = sum(b.size for b in blocks.values() if not b.factorises)
        return (vectors + self.rank + self.oversample) * count * itemsize

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if name not in self._sketch:
                # the same directions for the same block in every fit, so that statistics have them in common
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                shape = (self._width(layout.size), *block.shape)
                self._sketch[name] = torch.randn(shape, generator=generator).to(like)
            if name not in sums:
                squares = (zeros(like, *block.shape),) if self.diagonal else ()
                sums[name] = (torch.zeros_like(self._sketch[name]), *squares)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        if not signals:
            return
        weights = torch.stack([signal.project(self._sketch[name]) for name, signal in signals.items()]).sum(0)
        for name, signal in signals.items():
            signal.add_combined(sums[name][0], weights)
            if self.diagonal and not self._left:
                signal.add_squares(sums[name][1])

    def refinement(self, statistics: Statistics) -> dict[str, Work]:
        if not self._left:
            return {}
        columns = _columns(statistics.sums, self._sketch)
        return {self.KEY: Work(1.0, lambda: (torch.linalg.qr(columns)[0],), lambda: (columns,))}

    def refined(self, statistics: Statistics, results: Results | None = None) -> Structure | None:
        if not self._left:
            return None
        work = self.refinement(statistics)[self.KEY]
        (basis,) = work.run() if results is None else results[self.KEY]
        return self._with(_by_block(basis, self._sketch), self._left - 1)

    def merged(self, mine: Sums, other: Structure, theirs: Sums) -> tuple[Structure, Sums]:
        """Equal directions: the sum. Else the two low-rank forms are added exactly, over both their ranges."""
        fixed = other.fixed
        if self._sketch.keys() == fixed.keys() and all(torch.equal(q, fixed[n][0]) for n, q in self._sketch.items()):
            return self, added(mine, theirs)
        like = {n: p[0] for n, p in {**self.fixed, **fixed}.items()}
        parts = [nystrom(_columns(own, like), _columns(q, like)) for own, q in ((mine, self.fixed), (theirs, fixed))]
        basis = torch.linalg.qr(torch.cat([vectors for vectors, _ in parts], 1))[0]
        products = torch.stack([u @ (values[:, None] * (u.T @ basis)) for u, values in parts]).sum(0)
        squares = added({n: p[1:] for n, p in mine.items()}, {n: p[1:] for n, p in theirs.items()})
        by_block = _by_block(products, like)
        return self._with(_by_block(basis, like), 0), {n: (by_block[n], *squares[n]) for n in like}

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        flat = []
        for parts in (means, self.fixed):
            flat.append(layout.join(merged(b.unpack(parts[n][0]) for n, b in blocks.items())).T)
        vectors, values = nystrom(*flat)
        vectors, values = vectors[:, : self.rank], values[: self.rank]
        remainder = values.new_zeros(())
        if self.diagonal:
            exact = layout.join(merged(b.unpack(means[n][1][None]) for n, b in blocks.items()))[0]
            left = exact - vectors.square() @ values
            # within rounding of the entry itself there is nothing left
            remainder = torch.where(left > 100 * torch.finfo(exact.dtype).eps * exact, left, torch.zeros_like(left))
        block = layout.whole(self.KEY)
        return Blockwise(layout, [(block, LowRankBlock(vectors, values, remainder, self.KEY))])


def _columns(parts: Sums, like: Mapping[str, Tensor]) -> Tensor:
    """The first tensor ``(K, R, O, I)`` of the blocks of ``like`` as columns ``(Σ P_b, K)``; absent ones are zero."""
    count = next(iter(parts.values()))[0].shape[0]
    rows = [parts[n][0].flatten(1) if n in parts else one.new_zeros(count, one[0].numel()) for n, one in like.items()]
    return torch.cat(rows, 1).T


def _by_block(columns: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Columns ``(Σ P_b, K)`` as ``(K, R, O, I)`` for the blocks of ``like``."""
    parts = columns.T.split([one[0].numel() for one in like.values()], 1)
    return {n: part.reshape(-1, *one.shape[1:]) for (n, one), part in zip(like.items(), parts, strict=True)}


def nystrom(products: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``(P, K)`` and values ``(K,)``, largest first, of ``Y (QᵀY)⁺ Yᵀ``.

    Args:
        products: ``Y = C Q (P, K)`` for a positive semi-definite ``C``.
        directions: ``Q (P, K)`` of full rank.

    Raises:
        NotPositiveDefinite: if ``QᵀY`` is indefinite beyond rounding: the products are not those of one matrix.
    """
    basis, triangle = torch.linalg.qr(directions)
    y = torch.linalg.solve_triangular(triangle.T, products.T, upper=False).T  # the products with an orthonormal Q
    inner = (basis.T @ y).double()
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    if bool(values[0] < -1e-3 * largest):
        raise NotPositiveDefinite("all", float(values[0]), "Fit with more iterations=, or in float64.")
    keep = values > 10 * len(values) * torch.finfo(y.dtype).eps * largest
    half = y @ (vectors[:, keep] / values[keep].sqrt()).to(y.dtype)  # C ≈ half halfᵀ
    left, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return left, singular.square()
