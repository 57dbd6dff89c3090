"""Signals of a layer whose output is the network's output: no column has to be sent back.

The Jacobian between such a layer's output and the network's is the identity, so that with the output curvature
``H_nt (C, C)`` of every position all sums are closed forms (methods 9.2, last layer of a classifier)::

    G ∝ Σ_nt H_nt      diag = Σ_nt diag(H_nt) ⊗ a²      full = Σ_nt H_nt ⊗ [a;1][a;1]ᵀ

For a softmax over C classes that is C times cheaper than its C−1 columns, and nothing of size C×C per example exists.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.tape.signals import OuterSignals

__all__ = ["OutputCurvature", "OutputSignals"]


class OutputCurvature(Protocol):
    """The curvature ``H_nt (C, C)`` of one minibatch's outputs; zero at positions that are left out."""

    def total(self, directions: Tensor | None = None) -> Tensor:
        """``Σ_n Σ_t H_nt``, ``(C, C)``; or its product with ``directions (C, K)``."""

    def diagonal(self) -> Tensor:
        """``diag(H_nt)``, ``(N, T, C)``."""

    def rows(self, output: int) -> Tensor:
        """Row ``output`` of every ``H_nt``, ``(N, T, C)``."""


class OutputSignals(OuterSignals):
    """As :class:`OuterSignals`, summed over all columns of the root at once.

    Args:
        signals: the block's signals without columns; inputs ``a (N, T, 1, I)``.
        curvature: the output curvature.
    """

    def __init__(self, signals: OuterSignals, curvature: OutputCurvature) -> None:
        self.block, self.a, self.example, self.rotated = signals.block, signals.a, None, False
        self.counted = signals.counted
        self.curvature = curvature

    @property
    def g(self) -> Tensor:  # type: ignore[override]
        """There are no columns ``(V, N, T, R, O)``; whatever of the base class wants them must not go unnoticed."""
        raise IncompatiblePair(
            f"block {self.block.name!r} has only sums over all columns here, no single columns; a structure that needs "
            "them must not say takes_output_signals"
        )

    def __repr__(self) -> str:
        return f"OutputSignals({self.block.name!r}, inputs {tuple(self.a.shape)})"

    def reduced(self) -> OutputSignals:
        return self  # its columns touch one position each, so that adding them up over positions changes nothing

    def add_column_gram(self, total: Tensor) -> None:
        found = self.curvature.diagonal().sum((0, 1)) if total.dim() == 2 else self.curvature.total()
        total[0] += found.to(total)

    def add_column_sketch(self, total: Tensor, directions: Tensor) -> None:
        total[0] += self.curvature.total(directions).to(total)

    def add_squares(self, total: Tensor) -> None:
        width = self.a.shape[-1]
        weights = self.curvature.diagonal().flatten(0, 1).to(total)
        total[0, :, :width].addmm_(weights.T, self.a[:, :, 0].flatten(0, 1).to(total).square())
        if self.block.has_bias_column:
            total[0, :, width] += weights.sum(0)

    def add_outer(self, total: Tensor) -> None:
        """Adds ``Σ_nt H_nt ⊗ [a;1][a;1]ᵀ`` to the lower triangle of ``total (P_b, P_b)``."""
        a = self.a[:, :, 0].flatten(0, 1).to(total)
        if self.block.has_bias_column:
            a = torch.cat([a, a.new_ones(a.shape[0], 1)], 1)
        width = a.shape[1]
        for o in range(self.block.shape[1]):
            weights = self.curvature.rows(o).flatten(0, 1).to(total)
            for p in range(o + 1):
                part = total[o * width : (o + 1) * width, p * width : (p + 1) * width]
                part.addmm_(a.T, a * weights[:, p, None])
