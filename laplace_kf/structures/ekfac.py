"""Eigenvalue-corrected Kronecker: Kronecker eigenbases, exact second moments along them (George et al. 2018).

A first pass over the data gathers the factors ``A`` and ``G``; a second one gathers
``S = Σ_vn (B_Gᵀ (Σ_t g ⊗ a) B_A)²`` in their eigenbases, positions added before squaring. Of all matrices that are
diagonal in these bases the result is nearest to the exact layer block, and it has its exact trace. A grouped
convolution has one pair of bases per group; one-hot inputs and factors that are kept as diagonals keep their own basis;
a weight that is used as itself and as its transpose has the bases of its two marginals. Vector blocks are as in the
Kronecker structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_kf.linalg import eigh
from laplace_kf.operators import Basis, Blockwise, Matrix, SpectralBlock
from laplace_kf.structures.base import STRUCTURES, Results, Statistics, Structure, Sums, Work, added, pairs, zeros
from laplace_kf.tape import Block, FlatLayout, MatrixSignals, Signals


@STRUCTURES.register("ekfac")
class EigenvalueCorrected(Structure):
    """The first pass: Kronecker factors.

    Args:
        vector_blocks, sharing, max_side: of the factors, as in the Kronecker structure.

    Raises:
        UnknownName, ValueError: as there.
    """

    name = "ekfac"
    several_passes = True
    counts_positions = True

    def __init__(self, vector_blocks: str = "diag", sharing: str = "expand", max_side: int = 8192) -> None:
        kron: Callable[..., Structure] = STRUCTURES["kron"]
        self.kron = kron(vector_blocks=vector_blocks, sharing=sharing, max_side=max_side)

    def options(self) -> dict[str, Any]:
        return self.kron.options()

    def with_fixed(self, fixed: Sums) -> Structure:
        return InBases(self, fixed, {})

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        grids = sum(block.size for block in blocks.values() if block.factorises)
        return self.kron.memory(blocks, layout, itemsize) + grids * itemsize

    def sides(self, blocks: Mapping[str, Block], layout: FlatLayout) -> list[int]:
        return self.kron.sides(blocks, layout)

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        return self.kron.poorer(blocks)

    def takes_output_signals(self, blocks: Mapping[str, Block], layout: FlatLayout) -> bool:
        return self.kron.takes_output_signals(blocks, layout)

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return self.kron.column_bytes(blocks, count, itemsize)

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        self.kron.prepare(sums, blocks, layout, like)

    def add_inputs(self, sums: Sums, signals: Mapping[str, MatrixSignals]) -> None:
        self.kron.add_inputs(sums, signals)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        factors = {n: s for n, s in signals.items() if blocks[n].factorises}
        self.kron.add_columns(sums, factors, blocks)  # the rest is gathered in the second pass

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        return self.kron.finished(sums, blocks, layout)

    def refinement(self, statistics: Statistics) -> dict[str, Work]:
        return {
            name: Work(
                sum(float(part.shape[-1]) ** 3 * part.shape[0] for part in parts if part.dim() == 3),
                partial(_bases, name, parts),
                partial(_like_bases, statistics.blocks[name], parts),
            )
            for name, parts in _factors(statistics).items()
        }

    def refined(self, statistics: Statistics, results: Results | None = None) -> Structure:
        factors = _factors(statistics)
        if results is not None:
            return InBases(self, dict(results), factors)
        return InBases(self, {n: _bases(n, parts) for n, parts in factors.items()}, factors)

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        return self.kron.matrix(means, blocks, layout)


class InBases(Structure):
    """The second pass: squares in bases that are given.

    Args:
        rule: the structure of the first pass.
        bases: by block name, ``B_A (R, I, I)`` and ``B_G (R, O, O)``; an empty tensor for the identity.
        factors: the sums that they came from; kept with the squares so that two statistics can be
            brought into common bases.
    """

    name = "ekfac"
    several_passes = True

    def __init__(self, rule: EigenvalueCorrected, bases: Sums, factors: Sums) -> None:
        self.rule, self.bases, self.factors = rule, bases, factors

    @property
    def fixed(self) -> Sums:
        return self.bases

    def options(self) -> dict[str, Any]:
        return self.rule.options()

    def first(self) -> Structure:
        return self.rule

    def memory(self, blocks: Mapping[str, Block], layout: FlatLayout, itemsize: int) -> int:
        return self.rule.memory(blocks, layout, itemsize)

    def column_bytes(self, blocks: Mapping[str, Block], count: int, itemsize: int) -> int:
        return self.rule.column_bytes(blocks, count, itemsize)

    def prepare(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout, like: Tensor) -> None:
        for name, block in blocks.items():
            if block.factorises and name not in sums:
                sums[name] = (zeros(like, *block.shape),)
        self.rule.kron.prepare(sums, _vectors(blocks), layout, like)

    def add_columns(self, sums: Sums, signals: Mapping[str, Signals], blocks: Mapping[str, Block]) -> None:
        for name, signal in signals.items():
            if blocks[name].factorises:
                inputs, outputs = (basis if basis.numel() else None for basis in self.bases[name])
                signal.add_rotated_squares(sums[name][0], inputs, outputs)
            else:
                self.rule.kron.add_columns(sums, {name: signal}, blocks)

    def known(self, name: str) -> int:
        return len(self.factors.get(name, ()))

    def finished(self, sums: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Sums:
        out = {n: (*self.factors[n], *sums[n]) for n, block in blocks.items() if block.factorises}
        return {**out, **self.rule.kron.finished(sums, _vectors(blocks), layout)}

    def poorer(self, blocks: Mapping[str, Block]) -> dict[str, str]:
        return self.rule.poorer(blocks)

    def again(self, statistics: Statistics) -> Structure:
        factors = _factors(statistics)
        added = {name: _bases(name, parts) for name, parts in factors.items() if name not in self.bases}
        return InBases(self.rule, {**self.bases, **added} if added else self.bases, factors)

    def turned(self, statistics: Statistics) -> Statistics:
        """The squares move into the eigenbases of the factors beside them, with their trace."""
        sums, fixed = dict(statistics.sums), dict(self.bases)
        for name in self.bases:
            *factors, grid = sums[name]
            fixed[name] = _bases(name, factors)
            sums[name] = (*factors, _moved(grid, self.bases[name], fixed[name]))
        return replace(statistics, structure=InBases(self.rule, fixed, {}), sums=sums)

    def merged(self, mine: Sums, other: Structure, theirs: Sums) -> tuple[Structure, Sums]:
        """Equal bases: the sum. Else the squares go into the eigenbases of the summed factors, with their trace."""
        sums, fixed = added(mine, theirs), {**other.fixed, **self.bases}
        for name in set(self.bases) & set(other.fixed):
            old = self.bases[name], other.fixed[name]
            if all(torch.equal(a, b) for a, b in zip(*old, strict=True)):
                continue
            *factors, _ = sums[name]
            fixed[name] = _bases(name, factors)
            grids = [_moved(p[name][-1], b, fixed[name]) for p, b in zip((mine, theirs), old, strict=True)]
            sums[name] = (*factors, grids[0] + grids[1])
        return InBases(self.rule, fixed, {}), sums

    def matrix(self, means: Sums, blocks: Mapping[str, Block], layout: FlatLayout) -> Blockwise:
        vectors = {b.name: m for b, m in self.rule.kron.matrix(means, _vectors(blocks), layout).entries}
        entries: list[tuple[Block, Matrix]] = []
        for name, block in blocks.items():
            if not block.factorises:
                entries.append((block, vectors[name]))
                continue
            inputs, outputs = (Basis.orthogonal(b) if b.numel() else Basis.identity() for b in self.bases[name])
            entries.append((block, SpectralBlock(inputs, outputs, means[name][-1], name)))
        return Blockwise(layout, entries)


def _factors(statistics: Statistics) -> Sums:
    return {n: statistics.sums[n] for n, block in statistics.blocks.items() if block.factorises}


def _vectors(blocks: Mapping[str, Block]) -> dict[str, Block]:
    return {name: block for name, block in blocks.items() if not block.factorises}


def _bases(name: str, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bases from the factors ``A, G`` of a weight and those of its uses as a transpose, if there are any."""
    (inputs, outputs), *turned = pairs(factors)
    if not turned:  # the factors' own
        return _own(inputs, name), _own(outputs, name)
    terms = [(outputs, inputs), *turned]
    block = SpectralBlock.of_sum(terms, name)
    empty = block.grid.new_zeros(0)
    found = []
    for side, basis in ((1, block.inputs.matrix), (0, block.outputs.matrix)):
        if basis is None:
            found.append(empty)
            continue
        along = torch.stack([_along(basis, term[side]) for term in terms])
        found.append(_settled(basis, along).contiguous())
    return found[0], found[1]


def _own(factor: Tensor, name: str) -> Tensor:
    """The settled eigenvectors of one factor ``(R, d, d)``; empty for a diagonal ``(R, d)``."""
    if factor.dim() == 2:
        return factor.new_zeros(0)
    values, vectors = eigh(factor, name)
    return _settled(vectors, values[None]).contiguous()


def _along(basis: Tensor, factor: Tensor) -> Tensor:
    """What a factor ``(R, d, d)``, or a diagonal ``(R, d)``, has along the vectors of a basis, ``(R, d)``."""
    if factor.dim() == 2:
        return torch.einsum("rdk,rd->rk", basis.square(), factor)
    return (basis * torch.matmul(factor, basis)).sum(-2)


def _like_bases(block: Block, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that :func:`_bases` gives: of sides that are kept as diagonals, empty ones."""
    (inputs, outputs), *turned = pairs(factors)
    terms = [(inputs, outputs), *((theirs, mine) for mine, theirs in turned)]
    groups, out, inp = block.shape
    empty = inputs.new_zeros(0)
    found = []
    for place, side in enumerate((inp, out)):
        whole = any(term[place].dim() == 3 for term in terms)
        found.append(inputs.new_empty(groups, side, side) if whole else empty)
    return found[0], found[1]


def _settled(basis: Tensor, along: Tensor) -> Tensor:
    """The eigenvectors ``(R, d, d)`` with a basis of the null space that does not hang on rounding.

    The ``K`` factors have ``along (K, R, d)`` along them; the null space is that of all.

    What a solver returns there is any basis of it, and the squares of later columns along it would differ from one run
    to the next by as much as they are. The basis taken is the one that the projection on the null space makes of fixed
    directions.
    """
    scale = along.amax(-1, keepdim=True).clamp_min(torch.finfo(along.dtype).tiny)
    empty = (along <= 100 * basis.shape[-1] * torch.finfo(along.dtype).eps * scale).all(0)  # (R, d)
    out = basis
    for r in range(basis.shape[0]):
        count = int(empty[r].sum())
        if count > 1:
            out = out.clone() if out is basis else out
            null = basis[r][:, empty[r]]
            generator = torch.Generator().manual_seed(count)
            fixed = torch.randn(null.shape, generator=generator, dtype=torch.float64).to(null)
            out[r][:, empty[r]] = torch.linalg.qr(null @ (null.T @ fixed))[0]
    return out


def _moved(grid: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
    """The diagonal in new bases of what is diagonal in old ones, ``(R, O, I)``: the trace stays."""
    inputs, outputs = (torch.matmul(b.mT, a).square() if b.numel() else b for a, b in zip(old, new, strict=True))
    grid = torch.matmul(outputs, grid) if outputs.numel() else grid
    return torch.matmul(grid, inputs.mT) if inputs.numel() else grid
