"""Which damped inverse turns a gradient into a direction: rows of two registries.

``BLOCK_SOLVERS`` says how one block takes its damping ``k = ζ + η`` (methods 5.2, 5.3), ``INVERSES`` how blocks are
put together: on their own, or linked with the next layer (methods 5.5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators import (
    BlockTridiagonal,
    Blockwise,
    CurvatureBlock,
    KroneckerBlock,
    KroneckerProduct,
    Matrix,
    Spectral,
)
from laplace_kf.operators.kronecker import balance, frobenius, spectral
from laplace_kf.optim.links import Linked
from laplace_kf.registry import Registry
from laplace_kf.structures import Structure
from laplace_kf.structures.base import Statistics
from laplace_kf.tape import Block

__all__ = ["BLOCK_SOLVERS", "INVERSES", "BlockSolver", "Inverse", "damped_power", "low_rank_solve"]


class BlockSolver(ABC):
    """How one block of curvature takes the damping ``k``.

    Attributes:
        is_product: whether a Kronecker block stays one Kronecker product.
    """

    is_product: ClassVar[bool] = False

    @abstractmethod
    def damped(self, block: CurvatureBlock, k: Tensor) -> Matrix:
        """The block plus ``k`` (0-dim) times the identity, exactly or approximately, as something that solves."""


BLOCK_SOLVERS: Registry[BlockSolver] = Registry("damping of the direction")


class _Exact(BlockSolver):
    """In the eigenbasis (methods 5.3)."""

    def damped(self, block: CurvatureBlock, k: Tensor) -> Matrix:
        return block.precision(1.0, k, "exact")


@dataclass(frozen=True)
class _Product(BlockSolver):
    """``(A + ω√k I) ⊗ (G + √k/ω I)`` (methods 5.2); blocks that are no Kronecker product take ``k`` exactly."""

    is_product: ClassVar[bool] = True
    omega: Callable[[KroneckerBlock], Tensor]

    def damped(self, block: CurvatureBlock, k: Tensor) -> Matrix:
        if not isinstance(block, KroneckerBlock):
            return block.precision(1.0, k, "exact")
        root, omega = k.sqrt(), self.omega(block)[:, None]
        a = _shifted(block.inputs, omega * root)
        return KroneckerProduct(a, _shifted(block.scale * block.outputs, root / omega), block.label)


def _shifted(factor: Tensor, amount: Tensor) -> Tensor:
    """Factors ``(R, d, d)``, or diagonals ``(R, d)``, plus ``amount (R, 1)`` times the identity."""
    if factor.dim() == 2:
        return factor + amount
    out = factor.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(amount)
    return out


def _even_split(block: KroneckerBlock) -> Tensor:
    return block.outputs.new_ones(block.shape[0])


BLOCK_SOLVERS.register("exact")(_Exact())
BLOCK_SOLVERS.register("factored")(_Product(_even_split))
BLOCK_SOLVERS.register("balanced")(_Product(balance))
BLOCK_SOLVERS.register("balanced_frobenius")(_Product(lambda block: balance(block, frobenius)))
BLOCK_SOLVERS.register("balanced_spectral")(_Product(lambda block: balance(block, spectral)))


class Inverse(ABC):
    """How damped blocks are put together."""

    def check(self, solver: BlockSolver) -> None:
        """Raises :class:`IncompatiblePair` for a damping that this inverse cannot use."""
        return

    @abstractmethod
    def structure(self, inner: Structure) -> Structure:
        """The structure that keeps the factors this inverse needs."""

    @abstractmethod
    def build(self, statistics: Statistics, k: float, solver: BlockSolver) -> Matrix:
        """The damped curvature as a Matrix of size ``P`` that solves.

        Raises:
            NotPositiveDefinite: if a block is singular even with the damping.
        """


INVERSES: Registry[Inverse] = Registry("inverse")


class _BlockDiagonal(Inverse):
    def structure(self, inner: Structure) -> Structure:
        return inner

    def build(self, statistics: Statistics, k: float, solver: BlockSolver) -> Matrix:
        return _damped(statistics, k, solver)


class _BlockTridiagonal(Inverse):
    def structure(self, inner: Structure) -> Structure:
        if not inner.takes_damping:
            raise IncompatiblePair(
                f'inverse="block_tridiagonal" links Kronecker blocks, which structure {inner.name!r} does not have; '
                'use structure="kron", or inverse="block_diagonal"'
            )
        return Linked(inner)

    def check(self, solver: BlockSolver) -> None:
        if not solver.is_product:
            raise IncompatiblePair(
                'inverse="block_tridiagonal" needs factors that are damped one by one; use damping="balanced" or '
                '"factored", or inverse="block_diagonal"'
            )

    def build(self, statistics: Statistics, k: float, solver: BlockSolver) -> Matrix:
        damped = _damped(statistics, k, solver)
        assert isinstance(statistics.structure, Linked)
        return BlockTridiagonal(damped.layout, damped.entries, statistics.structure.links(statistics))


INVERSES.register("block_diagonal")(_BlockDiagonal())
INVERSES.register("block_tridiagonal")(_BlockTridiagonal())


def _damped(statistics: Statistics, k: float, solver: BlockSolver) -> Blockwise:
    mean = statistics.mean()
    like = next(iter(statistics.sums.values()))[0]
    entries: list[tuple[Block, Matrix]] = []
    for block, matrix in mean.entries:
        if not isinstance(matrix, CurvatureBlock):
            raise IncompatiblePair(f"block {block.name!r} is a {type(matrix).__name__}, which cannot be damped")
        entries.append((block, solver.damped(matrix, like.new_tensor(k))))
    return Blockwise(mean.layout, entries)


def low_rank_solve(matrix: Matrix, gradient: Tensor, outer: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """``matrix⁻¹ gradient`` for ``gradient (P,)``, through the gradient's factors where they are known (methods 5.6).

    Args:
        matrix: block-diagonal, with Kronecker products.
        gradient: ``(P,)``.
        outer: by block name, ``g (N, R, O)`` and ``a (N, R, I)`` with ``Σ_n g ⊗ a`` the block's gradient.
    """
    assert isinstance(matrix, Blockwise)
    parts = matrix.layout.split(gradient[None])
    out: dict[str, Tensor] = {}
    for block, part in matrix.entries:
        if block.name in outer and isinstance(part, KroneckerProduct):
            solved = part.solve_outer(*outer[block.name])[None]
        else:
            solved = part.solve(block.pack(parts).reshape(-1)).reshape(1, *block.shape)
        out.update(block.unpack(solved))
    return matrix.layout.join(out)[0]


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
