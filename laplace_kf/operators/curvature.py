"""Curvature blocks as estimated: Kronecker, diagonal and dense, each able to become a precision for any (N, λ).

``block.precision(n, prior, damping)`` is ``n · C̄ + prior`` as a :class:`Spectral`; its eigendecomposition is made once
per block and shared by every ``(n, prior)``, so that changing them costs one grid of size ``O · I``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import cholesky, eigh
from laplace_kf.operators.base import Isotropic, Matrix, Sum
from laplace_kf.operators.quadrature import nodes_of_products
from laplace_kf.operators.spectral import Basis, Ridge, Spectral
from laplace_kf.registry import Registry

__all__ = ["DAMPINGS", "CurvatureBlock", "DenseBlock", "DiagonalBlock", "KroneckerBlock", "SpectralBlock", "balance"]


class CurvatureBlock(Matrix):
    """A positive semi-definite block of curvature in canonical order ``(R, O, I)``."""

    shape: tuple[int, int, int]
    kind: str = "dense"
    _nodes: tuple[Tensor, Tensor] | None = None

    def leading(self) -> tuple[Tensor, ...]:
        """The spectra whose condition numbers tell something: of both factors, or of the whole (any shapes)."""
        return (self.spectrum(),)

    def effective(self, n: float, prior: Tensor) -> float:
        """Effective number of parameters ``tr(N C̄ (N C̄ + λ)⁻¹)`` for a prior of 0-dim or ``(R, O, I)`` (its mean)."""
        grid = n * self.spectrum().double()
        total = grid + prior.detach().double().mean()
        return float((grid / total.where(total > 0, 1.0)).sum())

    @property
    def terms(self) -> tuple[CurvatureBlock, ...]:
        """The blocks whose sum this is: itself, unless several are kept side by side."""
        return (self,)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        """The exact sum with a block of the same size as one block of the same kind, where there is one."""
        return None

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Eigenvalues as a grid ``(R, O, I)``."""

    @abstractmethod
    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """``n · C̄ + diag(prior)``, damped as asked where there is a choice.

        Args:
            n: data count ``N``.
            prior: λ, 0-dim, or one value for every parameter ``(R, O, I)``.
            damping: a name of :data:`DAMPINGS`; only Kronecker blocks have a choice.
        """

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """The matrix of :meth:`precision`, its arguments, in the form that is cheapest to multiply ``(P_b,)`` with."""
        return self.precision(n, prior, damping)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights ``(M,)`` that stand for the spectrum (:mod:`laplace_kf.operators.quadrature`); kept."""
        if self._nodes is None:
            self._nodes = nodes_of_products(self.spectrum().reshape(1, -1))
        return self._nodes

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        """``log|n f C̄ + prior| − log|prior|``, 0-dim in float64, differentiable in ``f`` and ``prior`` (methods 9.4).

        With one λ for the block it is ``Σ log(1 + n s / λ)``, a sum over a few nodes: neither its cost nor that of its
        gradient grows with the block, and the eigenbasis is made once.

        Args:
            n: data count.
            factor: f on the curvature, a number or 0-dim (see :meth:`scaled`).
            prior: λ, 0-dim, or one value for every parameter ``(R, O, I)``.
            damping: a name of :data:`DAMPINGS`.
        """
        if prior.dim():
            scaled = self.scaled(factor)
            assert isinstance(scaled, CurvatureBlock)
            precision = scaled.precision(n, prior, damping)
            return precision.logdet().double().cpu() - prior.log().sum().double().cpu()
        values, weights = self.nodes()
        return (weights * (n * factor * values / prior).log1p()).sum()

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def plus(self, other: Matrix) -> Matrix:
        """Adding a multiple of the identity is damping: closed form."""
        if isinstance(other, Isotropic):
            self._same_size(other)
            return self.precision(1.0, other.value, "exact")
        return super().plus(other)


class DiagonalBlock(CurvatureBlock):
    """A diagonal, ``(R, O, I)``."""

    kind = "diag"

    def __init__(self, values: Tensor, label: str) -> None:
        self.values, self.label = values, label
        self.shape = tuple(values.shape)  # type: ignore[assignment]

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diag())

    def diag(self) -> Tensor:
        return self.values.reshape(-1)

    def matvec(self, v: Tensor) -> Tensor:
        return self._spectral(self.values).matvec(v)

    def spectrum(self) -> Tensor:
        return self.values

    def scaled(self, factor: float | Tensor) -> DiagonalBlock:
        return DiagonalBlock(self.values * factor, self.label)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Spectral:
        return self._spectral(n * self.values + prior)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        return DiagonalBlock(self.values + other.values, self.label) if isinstance(other, DiagonalBlock) else None

    def plus(self, other: Matrix) -> Matrix:
        if isinstance(other, DiagonalBlock):
            self._same_size(other)
            return DiagonalBlock(self.values + other.values, self.label)
        return super().plus(other)

    def solve(self, v: Tensor) -> Tensor:
        return self._spectral(self.values).solve(v)

    def logdet(self) -> Tensor:
        return self._spectral(self.values).logdet()

    def colour(self, noise: Tensor) -> Tensor:
        return self._spectral(self.values).colour(noise)

    def _spectral(self, values: Tensor) -> Spectral:
        return Spectral(Basis.identity(), Basis.identity(), values, self.label)


class DenseBlock(CurvatureBlock):
    """A dense block ``(P_b, P_b)``; the eigenbasis is made on first need and kept."""

    kind = "full"

    def __init__(self, matrix: Tensor, label: str, eigen: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.matrix, self.label = matrix, label
        self.shape = (1, matrix.shape[0], 1)
        self._eigen: list[tuple[Tensor, Tensor]] = eigen if eigen is not None else []

    def dense(self) -> Tensor:
        return self.matrix

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ self._checked(v)

    def spectrum(self) -> Tensor:
        return self._decomposed()[0].reshape(self.shape)

    def scaled(self, factor: float | Tensor) -> DenseBlock:
        return DenseBlock(self.matrix * factor, self.label)

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        if prior.dim():
            return DenseBlock(n * self.matrix + torch.diag_embed(prior.reshape(-1)), self.label)
        values, vectors = self._decomposed()
        return Spectral(
            Basis.identity(), Basis.orthogonal(vectors[None]), (n * values + prior).reshape(self.shape), self.label
        )

    def products(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """One product with the dense matrix for ``(P_b,)``; no eigenbasis."""
        return _ridged(self.scaled(n), prior)

    def absorbed(self, other: CurvatureBlock) -> CurvatureBlock | None:
        return DenseBlock(self.matrix + other.matrix, self.label) if isinstance(other, DenseBlock) else None

    def plus(self, other: Matrix) -> Matrix:
        if isinstance(other, (DenseBlock, DiagonalBlock)):
            self._same_size(other)
            return DenseBlock(self.matrix + other.dense(), self.label)
        return super().plus(other)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        if not self._eigen:
            self._eigen.append(eigh(self.matrix, self.label))
        return self._eigen[0]


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

    def spectrum(self) -> Tensor:
        s_a, _ = self.input_spectrum()
        s_g, _ = self.output_spectrum()
        return self.scale * s_g[:, :, None] * s_a[:, None, :]

    # -- Matrix ------------------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        pairs = zip(_full(self.outputs), _full(self.inputs), strict=True)
        return torch.block_diag(*(self.scale * torch.kron(g, a) for g, a in pairs))

    def diag(self) -> Tensor:
        return (self.scale * _diagonal(self.outputs)[:, :, None] * _diagonal(self.inputs)[:, None, :]).reshape(-1)

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
        exact = DAMPINGS[damping] is DAMPINGS["exact"]
        return _ridged(self.scaled(n), prior) if exact else self.precision(n, prior, damping)

    def _with_unequal_prior(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        """A prior that differs between the weight and the bias of a layer is ``I ⊗ diag(λ_i)`` over the inputs."""
        if damping != "exact":
            raise IncompatiblePair(
                f'damping="{damping}" needs one prior precision for all parameters of block {self.label!r}; '
                'use damping="exact", or give its weight and bias the same value'
            )
        column = prior[:, :1, :]
        if not torch.equal(prior, column.expand_as(prior)):
            return super().plus(DiagonalBlock(prior, self.label))
        ones = torch.ones_like(_diagonal(self.outputs))
        return KroneckerBlock(self.inputs, self.outputs, self.label, n * self.scale).plus(
            KroneckerBlock(column[:, 0], ones, self.label)
        )

    def nodes(self) -> tuple[Tensor, Tensor]:
        if "nodes" not in self._eigen:  # of the factors alone, so that copies with another scale share them
            self._eigen["nodes"] = nodes_of_products(self.input_spectrum()[0], self.output_spectrum()[0])
        values, weights = self._eigen["nodes"]
        return self.scale * values, weights

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
        return _definite(self.inputs) and _definite(self.outputs) and float(torch.as_tensor(self.scale)) > 0

    def _generalised(self, metric: KroneckerBlock) -> Spectral:
        """``self + metric`` with ``metric`` positive definite: two generalised eigenproblems."""
        s_a, inputs = _generalised_basis(self.inputs, metric.inputs, self.label)
        s_g, outputs = _generalised_basis(self.outputs, metric.outputs, self.label)
        grid = self.scale * s_g[:, :, None] * s_a[:, None, :] + metric.scale
        return Spectral(inputs, outputs, grid, self.label)


class SpectralBlock(CurvatureBlock):
    """``(B_G ⊗ B_A) diag(S) (B_G ⊗ B_A)ᵀ`` with orthogonal bases: curvature that is known in an eigenbasis.

    Args:
        inputs: basis ``B_A`` of the input side.
        outputs: basis ``B_G`` of the output side.
        grid: ``S (R, O, I)``, not negative.
        label: name of the block, for messages.
    """

    kind = "eigenbasis"

    def __init__(self, inputs: Basis, outputs: Basis, grid: Tensor, label: str) -> None:
        self.inputs, self.outputs, self.grid, self.label = inputs, outputs, grid, label
        self.shape = tuple(grid.shape)  # type: ignore[assignment]

    @classmethod
    def of_sum(cls, terms: Sequence[tuple[Tensor, Tensor]], label: str) -> SpectralBlock:
        """``Σ_k G_k ⊗ A_k`` (factors ``(R, d, d)`` or diagonals ``(R, d)``) in the eigenbases of its two marginals.

        Keeps the diagonal there, hence the trace; the nearest matrix of this form in Frobenius norm for these bases,
        and exact for one term or terms that commute.
        """

        def marginal(factors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Basis, list[Tensor]]:
            weights = [_diagonal(other).sum(-1) for other in others]
            if all(factor.dim() == 2 for factor in factors):
                return Basis.identity(), list(factors)
            total = torch.stack([_full(f) * w[:, None, None] for f, w in zip(factors, weights, strict=True)]).sum(0)
            vectors = eigh(total, label)[1]
            rotated = [
                torch.einsum("rdk,rd->rk", vectors.square(), f) if f.dim() == 2
                else torch.einsum("rdk,rdk->rk", vectors, torch.matmul(f, vectors))
                for f in factors
            ]  # fmt: skip
            return Basis.orthogonal(vectors), [values.clamp_min(0) for values in rotated]

        outs, ins = [g for g, _ in terms], [a for _, a in terms]
        inputs, in_values = marginal(ins, outs)
        outputs, out_values = marginal(outs, ins)
        grid = torch.stack([g[:, :, None] * a[:, None, :] for g, a in zip(out_values, in_values, strict=True)]).sum(0)
        return cls(inputs, outputs, grid, label)

    def spectrum(self) -> Tensor:
        return self.grid

    def _spectral(self, grid: Tensor) -> Spectral:
        return Spectral(self.inputs, self.outputs, grid, self.label)

    def dense(self) -> Tensor:
        return self._spectral(self.grid).dense()

    def diag(self) -> Tensor:
        return self._spectral(self.grid).diag()

    def matvec(self, v: Tensor) -> Tensor:
        return self._spectral(self.grid).matvec(v)

    def solve(self, v: Tensor) -> Tensor:
        return self._spectral(self.grid).solve(v)

    def logdet(self) -> Tensor:
        return self._spectral(self.grid).logdet()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self._spectral(self.grid).sample(n, generator)

    def scaled(self, factor: float | Tensor) -> SpectralBlock:
        return SpectralBlock(self.inputs, self.outputs, self.grid * factor, self.label)

    def log_det_ratio(self, n: float, factor: float | Tensor, prior: Tensor, damping: str) -> Tensor:
        self._check(damping)
        return super().log_det_ratio(n, factor, prior, damping)

    def _check(self, damping: str) -> None:
        if DAMPINGS[damping] is not _exact:
            raise IncompatiblePair(
                f"block {self.label!r} has no single pair of Kronecker factors, which damping={damping!r} needs; use "
                'damping="exact"'
            )

    def precision(self, n: float | Tensor, prior: Tensor, damping: str) -> Matrix:
        self._check(damping)
        if prior.dim():
            return Sum((self.scaled(n), DiagonalBlock(prior, self.label)))
        return self._spectral(n * self.grid + prior)


def _ridged(block: CurvatureBlock, prior: Tensor) -> Sum:
    """With ``diag(prior)`` beside it."""
    return Sum((DiagonalBlock(prior, block.label) if prior.dim() else Isotropic(block.size, prior), block))


def _full(factor: Tensor) -> Tensor:
    """A factor as matrices ``(R, d, d)``."""
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def _diagonal(factor: Tensor) -> Tensor:
    """Diagonals ``(R, d)`` of a factor."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)


def _definite(factor: Tensor) -> bool:
    """Whether matrices ``(R, d, d)`` or diagonals ``(R, d)`` have no eigenvalue that is zero up to rounding."""
    values = factor if factor.dim() == 2 else torch.linalg.eigvalsh(factor)
    limit = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1)
    return bool((values.amin(-1) > limit).all())


def _generalised_basis(matrix: Tensor, metric: Tensor, label: str) -> tuple[Tensor, Basis]:
    """``B`` with ``B Bᵀ = metric`` and ``B diag(s) Bᵀ = matrix``; returns ``s (R, d)`` and the basis."""
    if matrix.dim() == 2 and metric.dim() == 2:
        root = metric.sqrt()
        basis = Basis(torch.diag_embed(root), torch.diag_embed(1 / root), root.log().sum(-1))
        return matrix / metric, basis
    matrix, metric = _full(matrix), _full(metric)
    lower = cholesky(metric, label)
    half = torch.linalg.solve_triangular(lower, matrix, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.transpose(-1, -2), upper=False)
    values, vectors = eigh((whitened + whitened.transpose(-1, -2)) / 2, label)
    dual = torch.linalg.solve_triangular(lower.transpose(-1, -2), vectors, upper=True)
    logdet = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return values, Basis(torch.matmul(lower, vectors), dual, logdet)


def _trace(factor: Tensor) -> Tensor:
    """Mean eigenvalue ``(R,)``: the trace norm of a factor next to an identity, up to what both have in common."""
    return _diagonal(factor).mean(-1)


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


Damping = Callable[[KroneckerBlock, "float | Tensor", Tensor], Ridge]
DAMPINGS: Registry[Damping] = Registry("damping")


@DAMPINGS.register("exact")
def _exact(block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
    """``N s_G s_Aᵀ + λ`` (methods 5.3)."""
    inputs, _ = block.input_spectrum()
    outputs, _ = block.output_spectrum()
    return Ridge(n * block.scale * outputs, inputs, prior)


def _factored_grid(block: KroneckerBlock, n: float | Tensor, prior: Tensor, omega: Tensor) -> Ridge:
    root_n = torch.as_tensor(n, dtype=prior.dtype, device=prior.device).sqrt()
    root_prior = prior.sqrt()
    s_a, s_g = block.input_spectrum()[0], block.scale * block.output_spectrum()[0]
    a = root_n * s_a + omega[:, None] * root_prior
    g = root_n * s_g + root_prior / omega[:, None]
    return Ridge(g, a)


@DAMPINGS.register("factored")
def _factored(block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
    """``(√N s_G + √λ)(√N s_A + √λ)ᵀ`` (methods 9.2; always at least the exact one)."""
    return _factored_grid(block, n, prior, block.outputs.new_ones(block.shape[0]))


@DAMPINGS.register("balanced")
def _balanced(block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
    """As factored with the damping split by ω (methods 5.2)."""
    return _factored_grid(block, n, prior, balance(block))


@DAMPINGS.register("balanced_frobenius")
def _balanced_frobenius(block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
    """As balanced, with ω in the Frobenius norm."""
    return _factored_grid(block, n, prior, balance(block, frobenius))


@DAMPINGS.register("balanced_spectral")
def _balanced_spectral(block: KroneckerBlock, n: float | Tensor, prior: Tensor) -> Ridge:
    """As balanced, with ω in the spectral norm."""
    return _factored_grid(block, n, prior, balance(block, spectral))
