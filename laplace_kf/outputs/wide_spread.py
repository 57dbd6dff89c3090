"""Covariances of outputs that are functions of one low rank plus diagonal, ``f(U diag(l) Uᵀ + diag(r))``, by poles.

``f(G) = w_0 + Σ_q w_q t_q (G + t_q)⁻¹`` has weights that belong to the input and poles that belong to the posterior; so
has its root, which draws are made with. Nothing of ``C × C`` numbers, and ``C · Q · k`` multiply-adds for a draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from laplace_kf.outputs.spread import Spread, runs

__all__ = ["PoleMatrices", "WideSpread"]

CACHED = 2**18  # numbers of the columns of all poles that are read at a time
TOGETHER = 2**22  # numbers of draws that are made at a time


class PoleMatrices(Protocol):
    """``Q`` matrices ``t (G + t)⁻¹ = diag(share) − X inner Xᵀ`` over ``C`` outputs, and the identity before them."""

    inner: Tensor
    variances: Tensor

    def shares(self, rows: slice) -> Tensor:
        """The diagonal parts for some outputs, ``(o, 1 + Q)``."""

    def columns(self, rows: slice) -> Tensor:
        """``X`` for some outputs, ``(o, Q, k)``."""


@dataclass(frozen=True, eq=False)
class WideSpread(Spread):
    """``f(G)`` with one ``G`` for all inputs.

    Attributes:
        weights: of ``f``, ``(N, T, 1 + Q)``.
        roots: of ``√f``, ``(N, T, 1 + Q)``.
        poles: what they are weights of.
    """

    weights: Tensor
    roots: Tensor
    poles: PoleMatrices

    own = ("weights", "roots")

    @property
    def shape(self) -> tuple[int, int, int]:
        n, t, _ = self.weights.shape
        return n, t, len(self.poles.variances)

    @property
    def noise_size(self) -> int:
        return len(self.poles.variances)

    def variance(self) -> Tensor:
        return torch.matmul(self.weights, self.poles.variances.to(self.weights).T)

    def _runs(self) -> Iterator[slice]:
        count, rank = self.poles.inner.shape[:2]
        return runs(self.noise_size, count * rank, CACHED)

    def _applied(self, weights: Tensor, v: Tensor) -> Tensor:
        """``f(G) v`` for ``v (S, C)`` and the function with these weights at every position, ``(S, N, T, C)``."""
        v, inner = v.to(weights), self.poles.inner.to(weights)
        small = v.new_zeros(len(v), inner.shape[0] * inner.shape[1])
        for rows in self._runs():
            small.addmm_(v[:, rows], self.poles.columns(rows).to(v).flatten(1))
        small = torch.einsum("sqk,qkl->sql", small.unflatten(1, inner.shape[:2]), inner)
        moved = weights[None, ..., 1:, None] * small[:, None, None]  # (S, N, T, Q, k)
        flat = moved.flatten(0, 2).flatten(1)
        parts = []
        for rows in self._runs():
            own = torch.matmul(weights, self.poles.shares(rows).to(v).T) * v[:, None, None, rows]
            low = flat @ self.poles.columns(rows).to(v).flatten(1).T
            parts.append(own - low.reshape(own.shape))
        return torch.cat(parts, -1)

    def colour(self, noise: Tensor) -> Tensor:
        return self._applied(self.roots, noise)

    def coloured(self, noise: Tensor, count: int) -> Iterator[Tensor]:
        """Many draws at once, as they share the columns, and handed on a few at a time."""
        together = max(1, TOGETHER // (count * self.shape[0] * self.shape[1] * self.noise_size)) * count
        for part in noise.split(together):
            yield from self.colour(part).split(count)

    def product(self, v: Tensor) -> Tensor:
        return self._applied(self.weights, v[None])[0]

    def scaled(self, factor: float) -> WideSpread:
        return replace(self, weights=self.weights * factor, roots=self.roots * factor**0.5)

    def dense(self) -> Tensor:
        eye = torch.eye(self.noise_size, dtype=self.weights.dtype, device=self.weights.device)
        return self._applied(self.weights, eye).permute(1, 2, 3, 0)
