"""Kronecker blocks whose output factor is low rank plus diagonal, and their precisions: no ``O × O`` matrix anywhere.

With ``A = B diag(s) Bᵀ`` the outputs of ``N G ⊗ A + λ`` decouple into one system ``M_j = c_j G + σ_j`` for each column
``j`` of ``B``, and with ``G = U diag(l) Uᵀ + diag(r)`` every one of them is a diagonal ``d_j = c_j r + σ_j`` and a low
rank (methods 4.8, 5.9)::

    M_j⁻¹ = D_j⁻¹ − c_j D_j⁻¹ U T_j Uᵀ D_j⁻¹        T_j = diag(l) (1 + c_j Uᵀ D_j⁻¹ U diag(l))⁻¹

The ``k × k`` matrices ``T_j`` cost ``I O k²/2`` multiply-adds once; all else is ``O I k`` for a vector.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import require_positive
from laplace_kf.operators.base import DENSE_WARNING, Isotropic, Matrix, standard_normal
from laplace_kf.operators.curvature import CurvatureBlock, ridged
from laplace_kf.operators.kronecker import DAMPINGS, KroneckerBlock, require_exact
from laplace_kf.operators.kronecker_factors import full, generalised_basis
from laplace_kf.operators.quadrature import nodes_of_products
from laplace_kf.operators.spectral import Basis
from laplace_kf.operators.wide_factor import WideFactor, root_of_low_rank

__all__ = ["WideBlock", "WideSpectral", "inner_products"]

RUN = 2**18  # numbers in a temporary of inner_products, so that it stays in the processor's cache


def inner_products(factor: WideFactor, scale: Tensor, shift: Tensor) -> Tensor:
    """``c_j Uᵀ diag(1 / (c_j r + σ_j)) U`` in float64, ``(R, J, k, k)``.

    Args:
        factor: ``U`` and ``r``.
        scale: ``c (R, J)``.
        shift: ``σ (R, J)``.
    """
    groups, width, rank = factor.vectors.shape
    count = scale.shape[1]
    one, two = torch.tril_indices(rank, rank, device=scale.device)
    total = scale.new_zeros(groups, count, len(one), dtype=torch.float64)
    step = max(1, RUN // max(1, count, len(one)))
    for start in range(0, width, step):
        part = slice(start, start + step)
        u, r = factor.vectors[:, part], factor.remainder[:, None, part]
        ratio = scale[..., None] / (scale[..., None] * r + shift[..., None])  # (R, J, o)
        total = total + torch.matmul(ratio, u[..., one] * u[..., two]).double()
    whole = total.new_zeros(groups, count, rank, rank)
    whole[..., one, two] = total
    whole[..., two, one] = total
    return whole


class WideSpectral(Matrix):
    """``(1 ⊗ B) diag_j(c_j G + σ_j) (1 ⊗ B)ᵀ`` with ``G = U diag(l) Uᵀ + diag(r)`` over the outputs, positive definite.

    Args:
        inputs: basis ``B`` of the input side.
        factor: ``G``.
        scale: ``c (R, I)``, not negative.
        shift: ``σ (R, I)``, positive.
        label: name of the block, for messages.
    """

    def __init__(self, inputs: Basis, factor: WideFactor, scale: Tensor, shift: Tensor, label: str) -> None:
        self.inputs, self.factor, self.scale, self.shift, self.label = inputs, factor, scale, shift, label
        self.shape = (scale.shape[0], factor.remainder.shape[1], scale.shape[1])
        self._made: dict[str, Tensor] = {}
        self.poles: Any = None  # what :class:`laplace_kf.operators.poles.Poles` keeps here

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def like(self) -> Tensor:
        """An empty tensor ``(0,)`` in the type and on the device of the numbers."""
        return self.scale.new_empty(0)

    @property
    def differentiable(self) -> bool:
        """Whether some of its numbers ask for gradients; what is computed from them is not kept then."""
        return any(v.requires_grad for v in (self.scale, self.shift, self.factor.values, self.factor.remainder))

    def _kept(self, name: str, found: Tensor) -> Tensor:
        if not self.differentiable:
            self._made[name] = found
        return found

    def require_positive(self) -> None:
        """Raises :class:`NotPositiveDefinite` unless every diagonal system is finite and positive."""
        low = self.scale * self.factor.remainder.amin(-1, keepdim=True) + self.shift
        high = self.scale * self.factor.remainder.amax(-1, keepdim=True) + self.shift
        require_positive(torch.where(torch.isfinite(high), low, high), self.label)

    # -- what the systems have in common -----------------------------------------------------------------------------

    def _diagonals(self) -> Tensor:
        """``d_j`` as ``(R, O, I)``."""
        return self.factor.remainder[..., None] * self.scale[:, None] + self.shift[:, None]

    def _inner(self) -> Tensor:
        """``c_j Uᵀ D_j⁻¹ U``, ``(R, I, k, k)`` in float64."""
        if "inner" in self._made:
            return self._made["inner"]
        self.require_positive()
        return self._kept("inner", inner_products(self.factor, self.scale, self.shift))

    def _bordered(self) -> Tensor:
        """``1 + c_j Uᵀ D_j⁻¹ U diag(l)``, ``(R, I, k, k)``: as large a determinant as the low rank adds."""
        eye = torch.eye(self.factor.rank, dtype=torch.float64, device=self.scale.device)
        return eye + self._inner() * self.factor.values.double()[:, None, None]

    def _correction(self) -> Tensor:
        """``c_j T_j``, ``(R, I, k, k)``."""
        if "correction" in self._made:
            return self._made["correction"]
        low = torch.diag_embed(self.factor.values.double())[:, None]
        found = torch.linalg.solve(self._bordered().mT, low.expand_as(self._inner())).mT  # diag(l) (...)⁻¹
        found = (found + found.mT) / 2 * self.scale.double()[..., None, None]
        return self._kept("correction", found.to(self.scale.dtype))

    def _root_correction(self) -> Tensor:
        """``c_j Z_j (R, I, k, k)`` of a root ``D_j^{-1/2} + c_j D_j⁻¹ U Z_j Uᵀ D_j^{-1/2}`` of ``M_j⁻¹``."""
        if "root" in self._made:
            return self._made["root"]
        middle = root_of_low_rank(self._inner(), self.factor.values.double()[:, None], -0.5)
        return self._kept("root", (middle * self.scale.double()[..., None, None]).to(self.scale.dtype))

    def _between(self, inner: Tensor, w: Tensor) -> Tensor:
        """``U K_j Uᵀ w_j`` for every column ``j`` of ``W (n, R, O, I)`` and ``K (R, I, k, k)``."""
        u = self.factor.vectors
        small = torch.einsum("rjkl,nrlj->nrkj", inner, torch.matmul(u.mT, w))
        return torch.matmul(u, small)

    # -- Matrix ------------------------------------------------------------------------------------------------------

    def _canonical(self, v: Tensor) -> Tensor:
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        return columns.T.reshape(-1, *self.shape)

    def _turned(self, w: Tensor, matrix: Tensor | None, transpose: bool = False) -> Tensor:
        return w if matrix is None else torch.matmul(w, matrix.mT if transpose else matrix)

    def matvec(self, v: Tensor) -> Tensor:
        w = self._turned(self._canonical(v), self.inputs.matrix)
        out = self.factor.matvec(w) * self.scale[:, None] + self.shift[:, None] * w
        return self._turned(out, self.inputs.matrix, True).reshape(-1, self.size).T.reshape(v.shape)

    def solve(self, v: Tensor) -> Tensor:
        self.require_positive()
        inverse = self._diagonals().reciprocal()
        w = self._turned(self._canonical(v), self.inputs.dual) * inverse
        out = w - inverse * self._between(self._correction(), w)
        return self._turned(out, self.inputs.dual, True).reshape(-1, self.size).T.reshape(v.shape)

    def logdet(self) -> Tensor:
        self.require_positive()
        total = self._diagonals().log().sum()
        sign, inner = torch.linalg.slogdet(self._bordered())
        require_positive(sign, self.label)
        total = total + inner.sum().to(total.dtype)
        if self.inputs.logdet is not None:
            total = total + 2 * self.shape[1] * self.inputs.logdet.sum()
        return total

    def variances(self) -> Tensor:
        """The diagonal of the inverse, ``(P,)``."""
        self.require_positive()
        inverse = self._diagonals().reciprocal()
        found = []
        for r, u in enumerate(self.factor.vectors):
            low = torch.einsum("ok,jkl,ol->oj", u, self._correction()[r], u)
            found.append(inverse[r] - inverse[r].square() * low)
        grid = torch.stack(found)
        return self._turned(grid, _squared(self.inputs.dual), True).reshape(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.colour(standard_normal((n, self.size), self.scale, generator))

    def colour(self, noise: Tensor) -> Tensor:
        self.require_positive()
        inverse = self._diagonals().reciprocal()
        w = noise.reshape(-1, *self.shape).to(inverse.dtype) * inverse.sqrt()
        out = w + inverse * self._between(self._root_correction(), w)
        return self._turned(out, self.inputs.dual, True).reshape(-1, self.size)

    def diag(self) -> Tensor:
        grid = self.factor.diagonal()[..., None] * self.scale[:, None] + self.shift[:, None]
        return self._turned(grid, _squared(self.inputs.matrix), True).reshape(-1)

    def dense(self) -> Tensor:
        return self.matvec(torch.eye(self.size, dtype=self.scale.dtype, device=self.scale.device))

    def scaled(self, factor: float | Tensor) -> WideSpectral:
        return WideSpectral(self.inputs, self.factor, self.scale * factor, self.shift * factor, self.label)

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic) and self.inputs.is_orthogonal:
            return WideSpectral(self.inputs, self.factor, self.scale, self.shift + other.value, self.label)
        return super().plus(other)

    @property
    def device(self) -> torch.device:
        return self.scale.device


def _squared(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.square()


class WideBlock(CurvatureBlock):
    """``scale · (G ⊗ A)`` with ``G = U diag(l) Uᵀ + diag(r)``, one pair for each of ``R`` groups (methods 4.8).

    Args:
        inputs: ``A (R, I, I)``, or its diagonal ``(R, I)``.
        outputs: ``G``.
        label: name of the block, for messages.
        scale: factor in front; where the two factors are damped one by one it belongs to ``G``.

    Attributes:
        diagonal: the same with the diagonal of ``G`` alone: what is left of it where a low rank has no place.
    """

    def __init__(
        self,
        inputs: Tensor,
        outputs: WideFactor,
        label: str,
        scale: float | Tensor = 1.0,
        diagonal: KroneckerBlock | None = None,
    ) -> None:
        self.outputs, self.label, self.scale = outputs, label, scale
        self.diagonal = KroneckerBlock(inputs, outputs.diagonal(), label) if diagonal is None else diagonal
        self.shape = self.diagonal.shape

    @property
    def inputs(self) -> Tensor:
        """``A (R, I, I)``, or its diagonal ``(R, I)``."""
        return self.diagonal.inputs

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def kind(self) -> str:  # type: ignore[override]
        """What it is called in a summary."""
        return f"{self.diagonal.kind}, G: rank {self.outputs.rank} + diag"

    def narrowed(self) -> KroneckerBlock:
        """The block with the diagonal of ``G`` alone, which is exact."""
        found = self.diagonal.scaled(self.scale)
        assert isinstance(found, KroneckerBlock)
        return found

    def leading(self) -> tuple[Tensor, ...]:
        """The spectrum of ``A``, and the diagonal of ``G`` in place of its own."""
        return self.diagonal.leading()

    def undecomposed(self, many: bool = True) -> dict[str, Tensor]:
        return self.diagonal.undecomposed(many)

    def take_eigenbasis(self, key: str, values: Tensor, vectors: Tensor) -> None:
        self.diagonal.take_eigenbasis(key, values, vectors)

    def spectrum(self) -> Tensor:
        """Eigenvalues ``(R, O, I)``.

        Raises:
            IncompatiblePair: for more than 4096 outputs, where they would need a dense ``G``.
        """
        if self.shape[1] > DENSE_WARNING:
            raise IncompatiblePair(
                f"the eigenvalues of block {self.label!r} need its output factor of {self.shape[1]} rows as a dense "
                "matrix; fit with wide_rank=0 for those of its diagonal"
            )
        values = torch.linalg.eigvalsh(self.outputs.dense()).clamp_min(0)
        return self.scale * values[:, :, None] * self.diagonal.input_spectrum()[0][:, None, :]

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Those of the diagonal of ``G``, since the eigenvalues need a dense matrix; only their trace is exact."""
        if self._nodes is None:
            parts = self.diagonal.input_spectrum()[0], self.outputs.diagonal()
            self._nodes = nodes_of_products(*parts)
        values, weights = self._nodes
        return self.scale * values, weights

    def sums_over_nodes(self, damping: str) -> bool:
        return not self.outputs.rank and self.diagonal.sums_over_nodes(damping)

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        """By the ``k``-sized systems."""
        if not self.outputs.rank:
            return self.narrowed().log_det_ratio(n, factor, prior, damping)
        ratio = self.scaled(factor).precision(n, prior, damping).logdet().double().cpu()
        logs = prior.log().double().cpu()
        return ratio - (logs.sum() if prior.dim() else self.size * logs)

    def effective(self, n: float, prior: Tensor) -> float:
        """Without the spectrum: ``P − tr(λ Λ⁻¹)``."""
        value = prior.detach().double().mean()
        precision = self.precision(n, value.to(self.inputs.dtype), "exact")
        if not isinstance(precision, WideSpectral) or not float(value) > 0:
            return super().effective(n, prior)
        return self.size - float(value * precision.variances().double().sum())

    # -- Matrix ------------------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        pairs = zip(self.outputs.dense(), full(self.inputs), strict=True)
        return torch.block_diag(*(self.scale * torch.kron(g, a) for g, a in pairs))

    def diag(self) -> Tensor:
        return self.narrowed().diag()

    def matvec(self, v: Tensor) -> Tensor:
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        w = self.outputs.matvec(columns.T.reshape(-1, *self.shape))
        w = w * self.inputs[:, None, :] if self.inputs.dim() == 2 else torch.matmul(w, self.inputs)
        return self.scale * w.reshape(-1, self.size).T.reshape(v.shape)

    def root(self, w: Tensor) -> Tensor:
        """``L W`` for ``W (n, R, O, I)`` and a root ``L Lᵀ`` of the block."""
        values, basis = self.diagonal.input_spectrum()
        out = self.outputs.root(w * (self.scale * values).sqrt()[:, None])
        return out if basis.matrix is None else torch.matmul(out, basis.matrix.mT)

    def scaled(self, factor: float | Tensor) -> WideBlock:
        return WideBlock(self.inputs, self.outputs, self.label, self.scale * factor, self.diagonal)

    def solve(self, v: Tensor) -> Tensor:
        return self._undamped().solve(v)

    def logdet(self) -> Tensor:
        return self._undamped().logdet()

    def colour(self, noise: Tensor) -> Tensor:
        return self._undamped().colour(noise)

    def _undamped(self) -> Matrix:
        return self.precision(1.0, self.inputs.new_zeros(()), "exact")

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        if not self.outputs.rank:
            return self.narrowed().precision(n, prior, damping)
        if prior.dim():
            return self._with_unequal_prior(n, prior, damping)
        values, basis = self.diagonal.input_spectrum()
        rule = DAMPINGS[damping]
        if rule.split is None:
            scale = n * self.scale * values
            return WideSpectral(basis, self.outputs, scale, prior.to(scale).expand_as(scale), self.label)
        if not rule.of_diagonals:
            raise IncompatiblePair(
                f"damping={damping!r} needs a norm of the whole output factor of block {self.label!r}, which is kept "
                'as low rank plus diagonal; use damping="exact", "factored" or "balanced", or wide_rank=0'
            )
        # (√N s_j + ω √λ) (√N G + √λ / ω)
        root_n = torch.as_tensor(n, dtype=prior.dtype, device=prior.device).sqrt()
        omega = rule.split(self.narrowed())[:, None]
        side = root_n * values + omega * prior.sqrt()
        return WideSpectral(basis, self.outputs, side * root_n * self.scale, side * prior.sqrt() / omega, self.label)

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """Products with the two factors for ``(P_b,)`` where λ stands beside them; no eigenbasis."""
        exact = not DAMPINGS[damping].is_product
        return ridged(self.scaled(n), prior) if exact else self.precision(n, prior, damping)

    def _with_unequal_prior(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """A prior that differs between the weight and the bias of a layer is ``1 ⊗ diag(λ_i)``: another basis ``B``."""
        require_exact(damping, self.label)
        column = prior[:, :1, :]
        if not torch.equal(prior, column.expand_as(prior)):
            return ridged(self.scaled(n), prior)
        values, basis = generalised_basis(self.inputs, column[:, 0].to(self.inputs).expand_as(self._rows()), self.label)
        scale = n * self.scale * values
        return WideSpectral(basis, self.outputs, scale, torch.ones_like(scale), self.label)

    def _rows(self) -> Tensor:
        """A tensor ``(R, I)``."""
        return self.inputs if self.inputs.dim() == 2 else self.inputs[..., 0]

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        if not isinstance(other, WideBlock) or other.outputs is not self.outputs or other.inputs is not self.inputs:
            return None
        return WideBlock(self.inputs, self.outputs, self.label, self.scale + other.scale, self.diagonal)
