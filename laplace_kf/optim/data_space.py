"""Directions in the space of the data: inverses applied to the factors of a minibatch's gradient (methods 5.6).

The gradient of a layer is ``Σ_n g_n ⊗ a_n``. With fewer examples than units it costs less to solve for the ``g_n`` and
the ``a_n`` than for their sum. Weight decay is no such sum: its pull ``η P⁻¹ θ`` is refreshed occasionally, as Martens
(2016, 6.8) says it must be, and never lags by more than a stated part of the direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from laplace_kf.operators import Blockwise, KroneckerProduct, Matrix
from laplace_kf.tape import Block, Observation

__all__ = ["LAG", "DataSpace", "cheaper", "gradient_factors", "low_rank_solve"]

LAG = 1e-3  # by which part of its length a direction may miss what weight decay adds to it

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By block name, ``g (N, R, O)`` and ``a (N, R, I)`` with ``Σ_n g ⊗ a`` the block's gradient."""


def cheaper(observation: Observation) -> list[tuple[Block, GradientEdge]]:
    """The blocks whose gradient costs less to solve for in factors, with the place of their layer's result.

    That the gradient itself is known already counts.
    """
    found = []
    for block, edge in observation.plain_blocks().values():
        _, out, inp = block.shape
        if observation.count * (out**2 + inp**2 + out * inp) < out * inp * (out + inp):
            found.append((block, edge))
    return found


@torch.no_grad()
def gradient_factors(
    observation: Observation, blocks: Sequence[Block], grads: Sequence[Tensor | None]
) -> dict[str, tuple[Tensor, Tensor]]:
    """``g (N, R, O)`` and ``a (N, R, I)`` of the gradient of some blocks.

    Args:
        observation: the pass that the gradient is of.
        blocks: some of :func:`cheaper`.
        grads: gradients of the mean loss at their places, of those shapes.
    """
    found = {}
    for block, grad in zip(blocks, grads, strict=True):
        if grad is None:
            continue
        signal = observation.plain_signals(block, grad)
        a = signal.a[:, 0]
        if signal.has_constant:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
        found[block.name] = (signal.g[0, :, 0], a)
    return found


def low_rank_solve(
    matrix: Matrix, gradient: Tensor, outer: Factors, pulls: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``matrix⁻¹ gradient`` for ``gradient (P,)``, through the gradient's factors where they are known (methods 5.6).

    Args:
        matrix: block-diagonal, with Kronecker products.
        gradient: ``(P,)``.
        outer: the known factors.
        pulls: what is added for those blocks, ``(R, O, I)`` by name: ``matrix⁻¹`` times the part of the gradient that
            is not in the factors.
    """
    assert isinstance(matrix, Blockwise)
    parts = matrix.layout.split(gradient[None])
    out: dict[str, Tensor] = {}
    for block, part in matrix.entries:
        if block.name in outer and isinstance(part, KroneckerProduct):
            like = part.inverses()[0]
            g, a = (rows.to(like) for rows in outer[block.name])
            solved = part.solve_outer(g, a)
            solved = solved.add_(pulls[block.name]) if pulls else solved
        else:
            solved = part.solve(block.pack(parts).reshape(-1).to(part.device))
        out.update(block.unpack(solved.reshape(1, *block.shape).to(gradient)))
    return matrix.layout.join(out)[0]


class DataSpace:
    """Solves with the inverse kept by an optimiser, and what it has to remember of weight decay.

    Args:
        l2: η.
    """

    def __init__(self, l2: float) -> None:
        self.l2 = l2
        self.forget()

    def forget(self) -> None:
        """Another matrix is used from now on."""
        self._of: Matrix | None = None  # the matrix of the pulls
        self._at: dict[str, Tensor] = {}  # the weights that they are of, by parameter
        self._pulls: dict[str, Tensor] = {}  # η P⁻¹ θ by block, (R, O, I)

    def solve(
        self, matrix: Matrix, gradient: Tensor, outer: Factors, weights: Mapping[str, Tensor], damping: float
    ) -> Tensor:
        """``matrix⁻¹ gradient (P,)``.

        Args:
            matrix: block-diagonal; no eigenvalue is below ``damping``.
            gradient: ``(P,)``, that of weight decay included.
            outer: factors of the gradient without it.
            weights: parameters ``(*shape)`` by name.
            damping: ``ζ + η``.
        """
        if not outer:
            return matrix.solve(gradient)
        if not self.l2:
            return low_rank_solve(matrix, gradient, outer)
        assert isinstance(matrix, Blockwise)
        blocks = {b.name: b for b, part in matrix.entries if b.name in outer and isinstance(part, KroneckerProduct)}
        if self._of is None and self._at.keys() == _parameters(blocks):  # loaded: the pulls are made anew
            self._pull(matrix, blocks, self._at)
        if self._of is not matrix or self._pulls.keys() != blocks.keys():
            self._pull(matrix, blocks, weights)
            return low_rank_solve(matrix, gradient, outer, self._pulls)
        solved = low_rank_solve(matrix, gradient, outer, self._pulls)
        squares = [torch.dist(weights[name].detach(), at).double().square().cpu() for name, at in self._at.items()]
        moved = float(torch.stack(squares).sum().sqrt())
        if self.l2 * moved > LAG * damping * float(torch.linalg.vector_norm(solved)):
            self._pull(matrix, blocks, weights)
            return low_rank_solve(matrix, gradient, outer, self._pulls)
        return solved

    def _pull(self, matrix: Blockwise, blocks: Mapping[str, Block], weights: Mapping[str, Tensor]) -> None:
        """``η P⁻¹ θ`` of the blocks, by the products that :meth:`solve` avoids for the gradient."""
        at = {name: weights[name].detach().clone() for name in sorted(_parameters(blocks))}
        pulls = {}
        for block, part in matrix.entries:
            if block.name in blocks:
                like = part.inverses()[0] if isinstance(part, KroneckerProduct) else None
                packed = block.pack({name: at[name][None].to(like) for name in block.parameters})
                pulls[block.name] = part.solve(self.l2 * packed.reshape(-1)).reshape(block.shape)
        self._of, self._at, self._pulls = matrix, at, pulls

    def export(self) -> dict[str, Any]:
        """The weights that the pulls are of, plain; the rest follows from them and the matrix."""
        return {"pulled_at": dict(self._at)}

    def load(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`export`, for ``weights (*shape)`` by name; a state of an older version has none."""
        self.forget()
        self._at = {name: value.to(weights[name]) for name, value in state.get("pulled_at", {}).items()}


def _parameters(blocks: Mapping[str, Block]) -> set[str]:
    return {name for block in blocks.values() for name in block.parameters}
