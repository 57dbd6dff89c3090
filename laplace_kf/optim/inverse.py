"""Which damped inverse turns a gradient into a direction: rows of two registries.

:data:`laplace_kf.operators.DAMPINGS` says how one block takes its damping ``k = ζ + η`` (methods 5.2, 5.3),
``INVERSES`` how blocks are put together: on their own, or linked with the next layer (methods 5.5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators import (
    BlockTridiagonal,
    Blockwise,
    CurvatureBlock,
    Damping,
    KroneckerBlock,
    KroneckerProduct,
    Matrix,
    Spectral,
)
from laplace_kf.optim.links import Linked
from laplace_kf.registry import Registry
from laplace_kf.structures import Structure
from laplace_kf.structures.base import Statistics
from laplace_kf.tape import Block

__all__ = ["INVERSES", "Inverse", "damped_block", "damped_power"]


def damped_block(block: CurvatureBlock, k: Tensor, damping: Damping, powers: bool = False) -> Matrix:
    """A block plus ``k`` (0-dim) times the identity, exactly or approximately, as something that solves.

    Exactly in the eigenbasis (methods 5.3); approximately as ``(A + ω√k I) ⊗ (G + √k/ω I)`` (methods 5.2), for which no
    eigenbasis is needed. Blocks that are no Kronecker product take ``k`` exactly; by their eigenbasis if ``powers`` of
    the matrix are to be taken.
    """
    if damping.split is None or not isinstance(block, KroneckerBlock):
        return block.one_of_many(1.0, k, "exact") if powers else block.precision(1.0, k, "exact")
    root, omega = k.sqrt(), damping.split(block)[:, None]
    a = _shifted(block.inputs, omega * root)
    return KroneckerProduct(a, _shifted(block.scale * block.outputs, root / omega), block.label)


def _shifted(factor: Tensor, amount: Tensor) -> Tensor:
    """Factors ``(R, d, d)``, or diagonals ``(R, d)``, plus ``amount (R, 1)`` times the identity."""
    if factor.dim() == 2:
        return factor + amount
    out = factor.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(amount)
    return out


class Inverse(ABC):
    """How damped blocks are put together."""

    def check(self, damping: Damping) -> None:
        """Raises :class:`IncompatiblePair` for a damping that this inverse cannot use."""
        return

    @abstractmethod
    def structure(self, inner: Structure) -> Structure:
        """The structure that keeps the factors this inverse needs."""

    @abstractmethod
    def build(self, statistics: Statistics, k: float, damping: Damping, powers: bool = False) -> Matrix:
        """The damped curvature as a Matrix of size ``P`` that solves; with an eigenbasis for ``powers`` of it.

        Raises:
            NotPositiveDefinite: if a block is singular even with the damping.
        """


INVERSES: Registry[Inverse] = Registry("inverse")


class _BlockDiagonal(Inverse):
    def structure(self, inner: Structure) -> Structure:
        return inner

    def build(self, statistics: Statistics, k: float, damping: Damping, powers: bool = False) -> Matrix:
        return _damped(statistics, k, damping, powers)


class _BlockTridiagonal(Inverse):
    def structure(self, inner: Structure) -> Structure:
        if not inner.takes_damping:
            raise IncompatiblePair(
                f'inverse="block_tridiagonal" links Kronecker blocks, which structure {inner.name!r} does not have; '
                'use structure="kron", or inverse="block_diagonal"'
            )
        return Linked(inner)

    def check(self, damping: Damping) -> None:
        if not damping.is_product:
            raise IncompatiblePair(
                'inverse="block_tridiagonal" needs factors that are damped one by one; use damping="balanced" or '
                '"factored", or inverse="block_diagonal"'
            )

    def build(self, statistics: Statistics, k: float, damping: Damping, powers: bool = False) -> Matrix:
        damped = _damped(statistics, k, damping, powers)
        assert isinstance(statistics.structure, Linked)
        return BlockTridiagonal(damped.layout, damped.entries, statistics.structure.links(statistics))


INVERSES.register("block_diagonal")(_BlockDiagonal())
INVERSES.register("block_tridiagonal")(_BlockTridiagonal())


def _damped(statistics: Statistics, k: float, damping: Damping, powers: bool) -> Blockwise:
    mean = statistics.mean()
    like = next(iter(statistics.sums.values()))[0]
    entries: list[tuple[Block, Matrix]] = []
    for block, matrix in mean.entries:
        if not isinstance(matrix, CurvatureBlock):
            raise IncompatiblePair(
                f"block {block.name!r} is a {type(matrix).__name__}, which cannot be damped; keep it as a matrix"
            )
        entries.append((block, damped_block(matrix, like.new_tensor(k), damping, powers)))
    return Blockwise(mean.layout, entries)


def damped_power(matrix: Matrix, power: float) -> Matrix:
    """``matrix^power`` block by block in the eigenbasis (methods 8.2: ``(diag F + λ)^ξ``), of the same size ``P``.

    Raises:
        IncompatiblePair: for a block without an orthogonal eigenbasis.
    """
    if power == 1.0:
        return matrix
    assert isinstance(matrix, Blockwise)
    entries = []
    for block, part in matrix.entries:
        if not isinstance(part, Spectral) or not (part.inputs.is_orthogonal and part.outputs.is_orthogonal):
            raise IncompatiblePair(f'power={power} needs damping="exact" (block {block.name!r} has no eigenbasis)')
        entries.append((block, Spectral(part.inputs, part.outputs, part.grid.pow(power), part.label)))
    return Blockwise(matrix.layout, entries)
