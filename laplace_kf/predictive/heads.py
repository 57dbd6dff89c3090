"""Linearised outputs of a last layer by what they are made of: no ``C × C`` numbers for any input.

Outputs ``W [a; 1]`` under ``Λ⁻¹ = (D_G ⊗ D_A) diag(1/S) (D_G ⊗ D_A)ᵀ`` have covariance ``D_G diag(w) D_Gᵀ`` with
``w_o = Σ_i ã_i² / S_oi`` and ``ã = D_Aᵀ [a; 1]``, at every position of their own. ``D_G`` belongs to the posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_kf.operators import Blockwise, Ridge, Spectral
from laplace_kf.outputs.spread import SharedBasis, runs
from laplace_kf.predictive.quadratic import rotated_inputs
from laplace_kf.tape import Observation, OuterSignals

__all__ = ["MANY", "head_spreads"]

MANY = 64  # outputs from which it pays; below, covariances of inputs are small


def head_spreads(
    observation: Observation, precisions: Sequence[Blockwise], to_positions: Callable[[Tensor], Tensor]
) -> list[SharedBasis] | None:
    """Covariances of the outputs for each of ``K`` precisions; ``None`` unless the posterior is that of a last layer.

    Args:
        observation: one forward pass, outputs ``(N, ...)``.
        precisions: of one structure, over the same parameters.
        to_positions: the likelihood's reading of outputs as ``(N, T, C)``.
    """
    entries = [precision.entries for precision in precisions]
    if any(len(each) != 1 for each in entries):
        return None
    found = observation.output_inputs(to_positions)
    spreads = []
    for ((block, matrix),) in entries:
        signals = found.get(block.name)
        own = signals is not None and signals.block == block
        if not own or not isinstance(matrix, Spectral) or matrix.shape != block.shape:
            return None
        assert signals is not None
        spreads.append(_spread(signals, matrix))
    return spreads


def _spread(signals: OuterSignals, matrix: Spectral) -> SharedBasis:
    squares = rotated_inputs(signals, matrix.inputs, matrix.like).square()[:, :, 0]  # (N, T, I)
    weights = _weights(squares.flatten(0, 1), matrix).unflatten(0, squares.shape[:2])
    dual = matrix.outputs.dual
    return SharedBasis(weights, None if dual is None else dual[0])


def _weights(squares: Tensor, matrix: Spectral) -> Tensor:
    """``Σ_i ã_i² / S_oi`` of ``(M, I)`` as ``(M, O)``, without the whole grid where it is made of few numbers."""
    ridge = matrix.ridge
    if ridge is None:
        return torch.cat([squares @ matrix.grid[0, part].reciprocal().T for part in runs(*matrix.grid.shape[1:])], 1)
    if ridge.shift is None:
        return (squares @ ridge.inputs[0].reciprocal())[:, None] / ridge.outputs[0]
    outs, ins = ridge.outputs.shape[1], ridge.inputs.shape[1]
    parts = []
    for part in runs(outs, ins):
        grid = Ridge(ridge.outputs[:, part], ridge.inputs, ridge.shift).grid()[0]
        parts.append(squares @ grid.reciprocal().T)
    return torch.cat(parts, 1)
