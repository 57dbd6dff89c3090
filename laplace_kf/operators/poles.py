"""Functions of a wide factor by few poles: ``f(G) = Σ_j a_j (c_j G + σ_j)⁻¹`` and its root, without eigenvectors.

The outputs of a last layer at an input have a covariance of this form, with as many terms as the layer has inputs
(methods 5.9). As functions of one number, ``f`` and ``√f`` are sums of ``1 / (h + t)`` with ``t ≥ min σ_j / c_j``, and
so smooth in ``log h`` that poles at equal distances in ``log t`` reproduce them::

    f(h) ≈ w_0 + Σ_q w_q t_q / (h + t_q)            √f(h) ≈ v_0 + Σ_q v_q t_q / (h + t_q)

The weights are those of least relative error over all ``h`` between 0 and the largest eigenvalue. What is small for
numbers is small for matrices: with ``|ρ(h)² − f(h)| ≤ ε f(h)`` the covariance ``ρ(G)²`` of the draws is between
``(1 − ε) f(G)`` and ``(1 + ε) f(G)``. Each pole is one system of low rank plus diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laplace_kf.operators.wide import WideSpectral, inner_products

__all__ = ["Poles"]

STEPS = {torch.float64: 0.4}  # distance of the poles in log t, by type
STEP = 1.0  # of other types
BEYOND = 10.0  # the last pole over the largest eigenvalue: beyond, functions are constants
KEPT = 2**24  # numbers of the columns of all poles, up to which they are kept
SAMPLES = 6  # numbers at which the error is measured, between two poles


class Poles:
    """The poles of one precision, and what every one of them needs.

    Args:
        matrix: of one group.

    Attributes:
        places: ``t (Q,)`` in float64.
        inner: ``t_q T_q (Q, k, k)`` with ``t (G + t)⁻¹ = t R_t − R_t U (t T) Uᵀ R_t``, ``R_t = diag(1 / (r + t))``.
        variances: diagonals of ``1`` and ``t_q (G + t_q)⁻¹``, ``(O, 1 + Q)``.
    """

    def __init__(self, matrix: WideSpectral) -> None:
        matrix.require_positive()
        self.matrix, factor = matrix, matrix.factor
        self._shares: Tensor | None = None
        self._columns: Tensor | None = None
        like = factor.remainder
        self.largest = max(factor.largest(), torch.finfo(torch.float64).tiny)
        with torch.no_grad():
            scale, shift = (part[0].detach().double() for part in (matrix.scale, matrix.shift))
            first = float((shift / scale.clamp_min(torch.finfo(torch.float64).tiny)).min())
            last = BEYOND * self.largest
            step = STEPS.get(like.dtype, STEP)
            count = 1 + (math.ceil(math.log(last / first) / step) if first < last else 0)
            self.places = min(first, last) * (step * torch.arange(count, dtype=torch.float64, device=like.device)).exp()
            ones = torch.ones(1, count, dtype=like.dtype, device=like.device)
            gram = inner_products(factor, ones, self.places.to(like)[None])[0]  # Uᵀ R_t U
            low = factor.values[0].double()
            bordered = torch.eye(len(low), dtype=torch.float64, device=like.device) + gram * low
            inner = torch.linalg.solve(bordered.mT, torch.diag(low).expand_as(gram)).mT
            self.inner = ((inner + inner.mT) / 2 * self.places[:, None, None]).to(like)
            self.variances = self._diagonals()
            most = max(self.largest, float(self.places[0]))
            grid = torch.linspace(
                math.log(float(self.places[0]) / 30), math.log(most), SAMPLES * (count + 4), dtype=torch.float64
            )
            self.samples = torch.cat([torch.zeros(1, dtype=torch.float64), grid.exp()]).to(like.device)

    @classmethod
    def of(cls, matrix: WideSpectral) -> Poles:
        """Those of a matrix, made once."""
        if matrix.poles is None:
            matrix.poles = cls(matrix)
        return matrix.poles

    def shares(self, rows: slice) -> Tensor:
        """``1`` and ``t_q / (r_o + t_q)`` of some outputs, ``(o, 1 + Q)``."""
        if self._shares is None:
            self._shares = self._made_shares(slice(None))
        return self._shares[rows]

    def _made_shares(self, rows: slice) -> Tensor:
        r = self.matrix.factor.remainder[0, rows]
        places = self.places.to(r)
        return torch.cat([torch.ones_like(r)[:, None], places / (r[:, None] + places)], 1)

    def columns(self, rows: slice) -> Tensor:
        """``R_t U`` of some outputs, ``(o, Q, k)``; kept unless they are very many."""
        if self.matrix.shape[1] * self.inner.shape[0] * self.inner.shape[1] > KEPT:
            return self._made_columns(rows)
        if self._columns is None:
            self._columns = self._made_columns(slice(None))
        return self._columns[rows]

    def _made_columns(self, rows: slice) -> Tensor:
        factor = self.matrix.factor
        places = self.places.to(factor.remainder)
        return factor.vectors[0, rows, None] / (factor.remainder[0, rows, None] + places)[..., None]

    def _diagonals(self) -> Tensor:
        parts = []
        for start in range(0, self.matrix.shape[1], 1024):
            rows = slice(start, start + 1024)
            columns = self._made_columns(rows).transpose(0, 1)  # (Q, o, k)
            found = self._made_shares(rows)
            found[:, 1:] -= (torch.matmul(columns, self.inner) * columns).sum(-1).T
            parts.append(found)
        return torch.cat(parts)

    def basis(self, h: Tensor) -> Tensor:
        """``1`` and ``t_q / (h + t_q)`` for numbers ``h (S,)`` in float64, ``(S, 1 + Q)``."""
        return torch.cat([torch.ones_like(h)[:, None], self.places / (h[:, None] + self.places)], 1)

    def values(self, squares: Tensor, h: Tensor) -> Tensor:
        """``f`` at numbers ``h (S,)`` for ``M`` functions of weights ``a (M, I)``, ``(M, S)`` in float64."""
        scale, shift = self.matrix.scale[0].double(), self.matrix.shift[0].double()
        return squares.double() @ (scale[:, None] * h + shift[:, None]).reciprocal()

    def weights(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """``w`` and ``v`` of functions with the weights ``a (M, I)``, each ``(M, 1 + Q)``; differentiable."""
        values = self.values(squares, self.samples)
        positive = torch.where(values > 0, values, 1)  # an input of zeros has no variance
        found = [self._fitted(positive), self._fitted(positive.sqrt())]
        live = (values > 0).all(1, keepdim=True)
        like = self.matrix.factor.remainder
        return (torch.where(live, found[0], 0).to(like), torch.where(live, found[1], 0).to(like))

    def _fitted(self, values: Tensor) -> Tensor:
        """Weights ``(M, 1 + Q)`` of least relative error, by normal equations in float64."""
        rows = self.basis(self.samples) / values[..., None]  # (M, S, 1 + Q)
        size = rows.square().sum(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        rows = rows / size[:, None]
        gram = torch.matmul(rows.mT, rows)
        ridge = 1e-13 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram + ridge, rows.sum(1)) / size
