"""A positive definite matrix whose inverse is block-tridiagonal over consecutive layers (methods 5.5).

It agrees with the matrix of blocks ``G_ij ⊗ A_ij`` on the three block diagonals and reads the layers as a Gaussian
graphical model with edges from layer ``i+1`` to layer ``i``. Only solves are cheap, and they are what is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.operators.base import Matrix
from laplace_kf.operators.kronecker_factors import generalised_basis
from laplace_kf.operators.product import KroneckerProduct
from laplace_kf.operators.spectral import Spectral
from laplace_kf.tape.blocks import Block, FlatLayout

__all__ = ["BlockTridiagonal", "CrossFactors"]


@dataclass(frozen=True)
class CrossFactors:
    """Factors between a layer and the next one, ``(I, I')`` and ``(O, O')``.

    Attributes:
        first: name of block ``i``.
        second: name of block ``i+1``.
        inputs: ``A_{i,i+1} = E[â_{i-1} â_iᵀ]``, ``(I_i, I_{i+1})``.
        outputs: ``G_{i,i+1} = E[g_i g_{i+1}ᵀ]``, ``(O_i, O_{i+1})``.
    """

    first: str
    second: str
    inputs: Tensor
    outputs: Tensor


class BlockTridiagonal(Matrix):
    """Solves with a matrix whose inverse links every block to its neighbours; blocks without a link stand alone.

    Shapes of factors as in :class:`CrossFactors`.

    Args:
        layout: the flat order.
        entries: blocks with their damped matrices; a linked block's is a :class:`KroneckerProduct` of one group.
        links: at most one to and one from every block.

    Raises:
        IncompatiblePair: if a linked block is not one Kronecker product.
        NotPositiveDefinite: if a damped factor is singular.
    """

    def __init__(
        self, layout: FlatLayout, entries: Sequence[tuple[Block, Matrix]], links: Sequence[CrossFactors]
    ) -> None:
        self.layout, self.entries = layout, tuple(entries)
        self.label = ", ".join(block.name for block, _ in self.entries)
        self._psi: dict[str, tuple[str, Tensor, Tensor]] = {}  # first -> (second, Ψ^A, Ψ^G)
        own = {block.name: matrix for block, matrix in self.entries}
        self._conditional = dict(own)
        for link in links:
            first, second = own[link.first], own[link.second]
            if not isinstance(first, KroneckerProduct) or not isinstance(second, KroneckerProduct):
                raise IncompatiblePair(
                    f"blocks {link.first!r} and {link.second!r} can only be linked as damped Kronecker products; use "
                    'damping="balanced" or "factored" with inverse="block_tridiagonal"'
                )
            inverse_a, inverse_g = second.inverses()
            psi_a, psi_g = link.inputs @ inverse_a[0], link.outputs @ inverse_g[0]
            self._psi[link.first] = (link.second, psi_a, psi_g)
            # Σ_{i|i+1} = G_i ⊗ A_i − (Ψ^G G_{i+1} Ψ^Gᵀ) ⊗ (Ψ^A A_{i+1} Ψ^Aᵀ), by methods 5.4 with the minus sign
            known_a, known_g = psi_a @ link.inputs.T, psi_g @ link.outputs.T
            s_a, inputs = generalised_basis(_even(known_a)[None], first.inputs, link.first)
            s_g, outputs = generalised_basis(_even(known_g)[None], first.outputs, link.first)
            floor = 100 * torch.finfo(s_a.dtype).eps
            grid = (1 - s_g[:, :, None] * s_a[:, None, :]).clamp_min(floor)
            self._conditional[link.first] = Spectral(inputs, outputs, grid, link.first)

    @property
    def size(self) -> int:
        return self.layout.size

    def dense(self) -> Tensor:
        like = next(part for _, part in self.entries).dense()
        return torch.linalg.inv(self.solve(torch.eye(self.size, dtype=like.dtype, device=like.device)))

    def scaled(self, factor: float | Tensor) -> Matrix:
        raise IncompatiblePair("a block-tridiagonal inverse cannot be scaled; scale the factors and build it anew")

    def solve(self, v: Tensor) -> Tensor:
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        count = columns.shape[1]
        parts = self.layout.split(columns.T)
        u = {block.name: block.pack(parts) for block, _ in self.entries}  # (K, R, O, I)
        first = dict(u)
        for name, (second, psi_a, psi_g) in self._psi.items():
            first[name] = u[name] - psi_g @ u[second] @ psi_a.T
        for block, _ in self.entries:
            packed = first[block.name].reshape(count, -1)
            solved = self._conditional[block.name].solve(packed.T).T
            first[block.name] = solved.reshape(-1, *block.shape)
        last = dict(first)
        for name, (second, psi_a, psi_g) in self._psi.items():
            last[second] = first[second] - psi_g.T @ first[name] @ psi_a
        out: dict[str, Tensor] = {}
        for block, _ in self.entries:
            out.update(block.unpack(last[block.name]))
        return self.layout.join(out).T.reshape(v.shape)


def _even(matrix: Tensor) -> Tensor:
    """The symmetric part of ``(d, d)``: rounding must not reach the eigensolver."""
    return (matrix + matrix.T) / 2
