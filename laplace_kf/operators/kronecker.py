"""Kronecker blocks: a pair of factors, their sums in closed form, and the ways to damp them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import eigh
from laplace_kf.operators.base import Matrix
from laplace_kf.operators.curvature import CurvatureBlock, ridged
from laplace_kf.operators.kronecker_factors import definite, diagonal, full, generalised_basis
from laplace_kf.operators.quadrature import nodes_of_products
from laplace_kf.operators.spectral import Basis, Ridge, Spectral
from laplace_kf.registry import Registry

__all__ = ["DAMPINGS", "Damping", "KroneckerBlock", "balance", "require_exact"]


def require_exact(damping: str, label: str) -> None:
    """Raises :class:`IncompatiblePair` for a damping that has no place for a prior that differs within a block."""
    if damping != "exact":
        raise IncompatiblePair(
            f'damping="{damping}" needs one prior precision for all parameters of block {label!r}; '
            'use damping="exact", or give its weight and bias the same value'
        )


class KroneckerBlock(CurvatureBlock):
    """``scale · (G ⊗ A)`` on row-major ``W (O, I)``, one pair for each of ``R`` groups (methods 4.1, 4.5).

    Args:
        inputs: ``A (R, I, I)``, or its diagonal ``(R, I)`` for one-hot inputs.
        outputs: ``G (R, O, O)``, or its diagonal ``(R, O)``.
        label: name of the block, for messages.
        scale: factor in front; where the two factors are damped one by one it belongs to ``G``.
    """

    def __init__(
        self,
        inputs: Tensor,
        outputs: Tensor,
        label: str,
        scale: float | Tensor = 1.0,
        eigen: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.inputs, self.outputs, self.label, self.scale = inputs, outputs, label, scale
        self.shape = (outputs.shape[0], outputs.shape[1], inputs.shape[1])
        self._eigen: dict[str, tuple[Tensor, Tensor]] = eigen if eigen is not None else {}

    # -- the two factors' spectra, each made once --------------------------------------------------------------------

    @property
    def kind(self) -> str:  # type: ignore[override]
        """What it is called in a summary."""
        return "kron" if self.shape[0] == 1 else f"kron ({self.shape[0]} groups)"

    def leading(self) -> tuple[Tensor, ...]:
        return self.input_spectrum()[0], self.output_spectrum()[0]

    def input_spectrum(self) -> tuple[Tensor, Basis]:
        """Eigenvalues ``(R, I)`` of ``A`` and their basis."""
        if self.inputs.dim() == 2:
            return self.inputs, Basis.identity()
        if "A" not in self._eigen:
            self._eigen["A"] = eigh(self.inputs, f"{self.label} (input factor A)")
        values, vectors = self._eigen["A"]
        return values, Basis.orthogonal(vectors)

    def output_spectrum(self) -> tuple[Tensor, Basis]:
        """Eigenvalues ``(R, O)`` of ``G`` and their basis."""
        if self.outputs.dim() == 2:
            return self.outputs, Basis.identity()
        if "G" not in self._eigen:
            self._eigen["G"] = eigh(self.outputs, f"{self.label} (output factor G)")
        values, vectors = self._eigen["G"]
        return values, Basis.orthogonal(vectors)

    def undecomposed(self, many: bool = True) -> dict[str, Tensor]:
        sides = {"A": self.inputs, "G": self.outputs}
        return {key: side for key, side in sides.items() if side.dim() == 3 and key not in self._eigen}

    def take_eigenbasis(self, key: str, values: Tensor, vectors: Tensor) -> None:
        self._eigen[key] = values, vectors

    def spectrum(self) -> Tensor:
        s_a, _ = self.input_spectrum()
        s_g, _ = self.output_spectrum()
        return self.scale * s_g[:, :, None] * s_a[:, None, :]

    # -- Matrix ------------------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        pairs = zip(full(self.outputs), full(self.inputs), strict=True)
        return torch.block_diag(*(self.scale * torch.kron(g, a) for g, a in pairs))

    def diag(self) -> Tensor:
        return (self.scale * diagonal(self.outputs)[:, :, None] * diagonal(self.inputs)[:, None, :]).reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        columns = self._checked(v)[:, None] if v.dim() == 1 else self._checked(v)
        w = self._by_outputs(columns.T.reshape(-1, *self.shape))
        w = w * self.inputs[:, None, :] if self.inputs.dim() == 2 else torch.matmul(w, self.inputs)
        return self.scale * w.reshape(-1, self.size).T.reshape(v.shape)

    def _by_outputs(self, w: Tensor) -> Tensor:
        """``G W`` for canonical ``W (..., R, O, I)``."""
        return w * self.outputs[:, :, None] if self.outputs.dim() == 2 else torch.matmul(self.outputs, w)

    def added_to(self, total: Tensor, v: Tensor) -> Tensor:
        if v.dim() == 2 or self.inputs.dim() == 2 or isinstance(self.scale, Tensor):
            return super().added_to(total, v)
        half = self._by_outputs(self._checked(v).reshape(self.shape))
        # the second product, the scale and the sum in one pass
        return total.reshape(self.shape).baddbmm_(half, self.inputs, alpha=self.scale).reshape(-1)

    def scaled(self, factor: float | Tensor) -> KroneckerBlock:
        return KroneckerBlock(self.inputs, self.outputs, self.label, self.scale * factor, self._eigen)

    def solve(self, v: Tensor) -> Tensor:
        return self._undamped().solve(v)

    def logdet(self) -> Tensor:
        return self._undamped().logdet()

    def colour(self, noise: Tensor) -> Tensor:
        return self._undamped().colour(noise)

    def _undamped(self) -> Spectral:
        return self._spectral(self.spectrum())

    def _spectral(self, grid: Tensor | Ridge) -> Spectral:
        return Spectral(self.input_spectrum()[1], self.output_spectrum()[1], grid, self.label)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        if prior.dim():
            return self._with_unequal_prior(n, prior, damping)
        return self._spectral(DAMPINGS[damping](self, n, prior))

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """Two products for ``(P_b,)`` where λ stands beside the factors; no eigenbasis."""
        exact = not DAMPINGS[damping].is_product
        return ridged(self.scaled(n), prior) if exact else self.precision(n, prior, damping)

    def _with_unequal_prior(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """A prior that differs between the weight and the bias of a layer is ``I ⊗ diag(λ_i)`` over the inputs."""
        require_exact(damping, self.label)
        column = prior[:, :1, :]
        if not torch.equal(prior, column.expand_as(prior)):
            return ridged(self.scaled(n), prior)
        ones = torch.ones_like(diagonal(self.outputs))
        return KroneckerBlock(self.inputs, self.outputs, self.label, n * self.scale).plus(
            KroneckerBlock(column[:, 0], ones, self.label)
        )

    def nodes(self) -> tuple[Tensor, Tensor]:
        if "nodes" not in self._eigen:  # of the factors alone, so that copies with another scale share them
            self._eigen["nodes"] = nodes_of_products(self.input_spectrum()[0], self.output_spectrum()[0])
        values, weights = self._eigen["nodes"]
        return self.scale * values, weights

    def sums_over_nodes(self, damping: str) -> bool:
        return damping == "exact"

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        if damping != "exact" and not prior.dim():
            ridge = DAMPINGS[damping](self.scaled(factor), n, prior)
            outputs, inputs = (part.log().sum(dtype=torch.float64).cpu() for part in (ridge.outputs, ridge.inputs))
            return self.shape[2] * outputs + self.shape[1] * inputs - self.size * prior.log().double().cpu()
        basis = self.input_spectrum()[1].matrix
        if damping == "exact" and prior.dim() and basis is not None and self.shape[2] > 1:
            weight, bias = prior[0, 0, 0], prior[0, 0, -1]
            if bool((prior[..., :-1] == weight).all()) and bool((prior[..., -1] == bias).all()):
                return self._with_other_bias(n * factor, weight.double().cpu(), bias.double().cpu(), basis)
        return super().log_det_ratio(n, factor, prior, damping)

    def _with_other_bias(self, n: float | Tensor, weight: Tensor, bias: Tensor, basis: Tensor) -> Tensor:
        """λ of the last input differs: a rank-one change of every output's matrix, so no new eigenbasis.

        ``|M + δ e eᵀ| = |M| (1 + δ eᵀ M⁻¹ e)`` with ``M = n g A + λ_w I`` and ``δ = λ_b − λ_w``.
        """
        curvature = n * self.spectrum().double().cpu()
        share = basis[:, -1, :].double().cpu().square()  # of the last input in every eigenvector
        change = 1 + (bias - weight) * (share[:, None, :] / (curvature + weight)).sum(-1)
        rows = self.shape[0] * self.shape[1]
        return (curvature / weight).log1p().sum() + change.log().sum() + rows * (weight.log() - bias.log())

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        if not isinstance(other, KroneckerBlock):
            return None
        if other.inputs is not self.inputs or other.outputs is not self.outputs:
            return None
        return KroneckerBlock(self.inputs, self.outputs, self.label, self.scale + other.scale, self._eigen)

    def plus(self, other: Matrix) -> Matrix:
        """With a Kronecker product whose factors are positive definite: exact, by methods 5.4."""
        if isinstance(other, KroneckerBlock) and other.shape == self.shape:
            same = self.absorbed(other)
            if same is not None:
                return same
            if other.is_definite():
                return self._generalised(other)
            if self.is_definite():
                return other._generalised(self)
        return super().plus(other)

    def is_definite(self) -> bool:
        """Whether both factors are positive definite beyond rounding."""
        return definite(self.inputs) and definite(self.outputs) and float(torch.as_tensor(self.scale)) > 0

    def _generalised(self, metric: KroneckerBlock) -> Spectral:
        """``self + metric`` with ``metric`` positive definite: two generalised eigenproblems."""
        s_a, inputs = generalised_basis(self.inputs, metric.inputs, self.label)
        s_g, outputs = generalised_basis(self.outputs, metric.outputs, self.label)
        grid = self.scale * s_g[:, :, None] * s_a[:, None, :] + metric.scale
        return Spectral(inputs, outputs, grid, self.label)


def _trace(factor: Tensor) -> Tensor:
    """Mean eigenvalue ``(R,)``: the trace norm of a factor next to an identity, up to what both have in common."""
    return diagonal(factor).mean(-1)


def frobenius(factor: Tensor) -> Tensor:
    """Frobenius norm ``(R,)`` of a factor next to an identity, up to what both have in common."""
    size = factor.norm(dim=-1) if factor.dim() == 2 else factor.norm(dim=(-2, -1))
    return size / factor.shape[-1] ** 0.5


def spectral(factor: Tensor) -> Tensor:
    """Largest eigenvalue ``(R,)`` of factors ``(R, d, d)`` or diagonals ``(R, d)``."""
    return factor.amax(-1) if factor.dim() == 2 else torch.linalg.eigvalsh(factor)[..., -1]


def balance(block: KroneckerBlock, norm: Callable[[Tensor], Tensor] = _trace) -> Tensor:
    """``ω (R,) = √(‖A ⊗ I‖ / ‖I ⊗ G‖)`` of methods 5.2; 1 for a dead factor.

    Args:
        block: factors.
        norm: of a factor ``(R, d, d)`` or its diagonal ``(R, d)``, next to an identity: the trace norm, the Frobenius
            or the spectral one, each without the factor that both sides share.
    """
    omega = (norm(block.inputs) / (block.scale * norm(block.outputs))).sqrt()
    usable = torch.isfinite(omega) & (omega > 0)
    return torch.where(usable, omega.clamp(1e-6, 1e6), torch.ones_like(omega))


class Damping:
    """How λ stands beside a pair of factors: on their product, or as ``√λ`` split between the two.

    Args:
        about: what it is, in a line.
        split: the share ω ``(R,)`` of ``A``; without, λ stands beside the product.
        of_diagonals: whether the share hangs on the diagonals of the factors alone.

    Attributes:
        is_product: whether a damped Kronecker product is one, too.
    """

    def __init__(
        self, about: str, split: Callable[[KroneckerBlock], Tensor] | None = None, of_diagonals: bool = True
    ) -> None:
        self.__doc__ = about
        self.split, self.of_diagonals = split, of_diagonals
        self.is_product = split is not None

    def __call__(self, block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
        """The spectrum ``(R, O, I)`` of ``n · C̄`` with the damping λ ``prior`` (0-dim)."""
        s_a, s_g = block.input_spectrum()[0], block.scale * block.output_spectrum()[0]
        if self.split is None:
            return Ridge(n * s_g, s_a, prior)
        root_n = torch.as_tensor(n, dtype=prior.dtype, device=prior.device).sqrt()
        root_prior, omega = prior.sqrt(), self.split(block)
        a = root_n * s_a + omega[:, None] * root_prior
        g = root_n * s_g + root_prior / omega[:, None]
        return Ridge(g, a)


def _evenly(block: KroneckerBlock) -> Tensor:
    return block.outputs.new_ones(block.shape[0])


DAMPINGS: Registry[Damping] = Registry("damping")
DAMPINGS.register("exact")(Damping("``N s_G s_Aᵀ + λ`` (methods 5.3)."))
DAMPINGS.register("factored")(
    Damping("``(√N s_G + √λ)(√N s_A + √λ)ᵀ`` (methods 9.2; always at least the exact one).", _evenly)
)
DAMPINGS.register("balanced")(Damping("As factored with the damping split by ω (methods 5.2).", balance))
DAMPINGS.register("balanced_frobenius")(
    Damping("As balanced, with ω in the Frobenius norm.", lambda block: balance(block, frobenius), False)
)
DAMPINGS.register("balanced_spectral")(
    Damping("As balanced, with ω in the spectral norm.", lambda block: balance(block, spectral), False)
)
