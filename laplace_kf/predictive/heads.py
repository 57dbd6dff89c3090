"""Linearised outputs of a last layer by what they are made of: no ``C × C`` numbers for any input.

Outputs ``W [a; 1]`` under ``Λ⁻¹ = (D_G ⊗ D_A) diag(1/S) (D_G ⊗ D_A)ᵀ`` have covariance ``D_G diag(w) D_Gᵀ`` with
``w_o = Σ_i ã_i² / S_oi`` and ``ã = D_Aᵀ [a; 1]``, at every position of their own. ``D_G`` belongs to the posterior.
Where the output factor is low rank plus diagonal, it is a function of that (:mod:`laplace_kf.operators.poles`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf.models import autocasting
from laplace_kf.operators import Basis, Blockwise, Poles, Ridge, Spectral, WideSpectral
from laplace_kf.outputs.spread import SharedBasis, Spread, runs
from laplace_kf.outputs.wide_spread import WideSpread
from laplace_kf.predictive.quadratic import rotated_inputs
from laplace_kf.predictive.suffix import Suffix
from laplace_kf.tape import Block, Observation, OuterSignals

__all__ = ["MANY", "LinearHead", "head_spreads", "linear_head"]

MANY = 64  # outputs from which it pays; below, covariances of inputs are small

CACHED = 2**18  # numbers of a grid that are made at a time, so that they stay in the processor's cache

ToPositions = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A whole suffix that is one linear map: its outputs and its inputs say all, and nothing is run or checked.

    Attributes:
        names: of the weight and, if there is one, of the bias.
        inputs: ``(N, ..., H)``.
        outputs: ``(N, ..., C)``.
    """

    names: tuple[str, ...]
    inputs: Tensor
    outputs: Tensor

    def spreads(self, precisions: Sequence[Blockwise], to_positions: ToPositions) -> list[Spread] | None:
        """As :func:`head_spreads`."""
        probe = torch.empty(self.outputs.shape, device="meta")  # an arrangement is a view: its strides say it all
        mine, theirs = probe.reshape(len(probe), -1, probe.shape[-1]), to_positions(probe)
        same = zip(mine.shape, mine.stride(), theirs.stride(), strict=True)
        if mine.shape != theirs.shape or any(one != other for size, one, other in same if size > 1):
            return None
        rows = self.inputs.reshape(*mine.shape[:2], 1, -1)
        shape = (1, mine.shape[-1], rows.shape[-1] + len(self.names) - 1)

        def inputs(block: Block) -> OuterSignals | None:
            plain = block.factorises and not block.one_hot and block.turned is None and not any(block.pieces)
            if not plain or block.parameters != self.names or block.shape != shape:
                return None
            return OuterSignals(block, rows, rows.new_zeros(0))

        return _spreads(inputs, precisions)


def linear_head(model: nn.Module, mean: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> LinearHead | None:
    """The model at a posterior mean, if it is a suffix that is one linear map.

    Args:
        model: as :func:`laplace_kf.predictive.suffix.cut` returned it.
        mean: by parameter name, each of its parameter's shape.
        inputs: features ``(N, ..., H)``, as it returned them.
    """
    if not isinstance(model, Suffix) or model.linear is None or autocasting():
        return None
    weight, bias = model.linear
    if mean[weight].dim() != 2:
        return None
    with torch.no_grad():
        outputs = F.linear(inputs[0], mean[weight], None if bias is None else mean[bias])
    return LinearHead((weight,) if bias is None else (weight, bias), inputs[0], outputs)


def head_spreads(
    observation: Observation, precisions: Sequence[Blockwise], to_positions: ToPositions
) -> list[Spread] | None:
    """Covariances of the outputs for each of ``K`` precisions; ``None`` unless the posterior is that of a last layer.

    Args:
        observation: one forward pass, outputs ``(N, ...)``.
        precisions: of one structure, over the same parameters.
        to_positions: the likelihood's reading of outputs as ``(N, T, C)``.
    """
    found = observation.output_inputs(to_positions)

    def inputs(block: Block) -> OuterSignals | None:
        signals = found.get(block.name)
        return signals if signals is not None and signals.block == block else None

    return _spreads(inputs, precisions)


def _spreads(inputs: Callable[[Block], OuterSignals | None], precisions: Sequence[Blockwise]) -> list[Spread] | None:
    squares: dict[tuple[int, torch.dtype], tuple[Basis, Tensor]] = {}
    spreads: list[Spread] = []
    for precision in precisions:
        if len(precision.entries) != 1:
            return None
        ((block, matrix),) = precision.entries
        signals = inputs(block)
        if signals is None or not isinstance(matrix, (Spectral, WideSpectral)) or matrix.shape != block.shape:
            return None
        key = id(matrix.inputs.dual), matrix.like.dtype
        if key not in squares:
            rotated = rotated_inputs(signals, matrix.inputs, matrix.like).square()[:, :, 0]  # (N, T, I)
            squares[key] = matrix.inputs, rotated  # the basis is kept so that its identity stays its own
        spreads.append(_spread(squares[key][1], matrix))
    return spreads


def _spread(squares: Tensor, matrix: Spectral | WideSpectral) -> Spread:
    if isinstance(matrix, WideSpectral):
        poles = Poles.of(matrix)
        weights, roots = poles.weights(squares.flatten(0, 1))
        return WideSpread(weights.unflatten(0, squares.shape[:2]), roots.unflatten(0, squares.shape[:2]), poles)
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
    for part in runs(outs, ins, CACHED):
        grid = Ridge(ridge.outputs[:, part], ridge.inputs, ridge.shift).grid()[0]
        parts.append(squares @ (grid.reciprocal() if grid.requires_grad else grid.reciprocal_()).T)
    return torch.cat(parts, 1)
