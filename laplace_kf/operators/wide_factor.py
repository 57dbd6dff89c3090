"""A factor that is too wide for its matrix: its exact diagonal, and a low rank for what stands beside it (methods 4.8).

``G ≈ U diag(l) Uᵀ + diag(r)`` from sums that a minibatch only adds to: the diagonal ``d`` of ``G (O, O)``, and
``Y = G Ω`` for fixed directions ``Ω (O, K)`` of signs. The low rank is that of ``E = G − diag(d)``, whose products
``Y − d ∘ Ω`` are known, and not that of ``G``: the leading eigenvectors of a factor with a large diagonal are the
diagonal over again, and what they say of the other entries is worse than nothing. ``E`` is indefinite (that of a
softmax is mostly negative), so ``l`` has both signs. The diagonal of the sum is exact, and it is positive semi-definite
whatever the sketch was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["HELD_OUT", "WideFactor", "directions", "root_of_low_rank", "sketch_width", "wide_factor"]

HELD_OUT = 8  # directions that the low rank does not see: the error is measured along them
PER_RANK = 3  # directions for each vector of the low rank
REFITS = 4  # times that the diagonal of the low rank is given back to what it is fitted to
REPAIRS = 4  # times that eigenvalues below the bound are lifted to it
SLACK = 1e-3  # least eigenvalue of the sum in the metric of diag(r)
LEFT = 0.01  # share of every diagonal entry that stays in diag(r)


def sketch_width(rank: int) -> int:
    """Columns ``K`` of the sketch for a low rank: 0 for none."""
    return PER_RANK * rank + HELD_OUT if rank else 0


@functools.lru_cache(maxsize=8)
def _signs(width: int, count: int) -> np.ndarray:
    # raw bits of a generator are the same in every release of numpy
    words = np.random.PCG64(17).random_raw((width * count + 63) // 64).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8))[: width * count]
    return (2 * bits.astype(np.int8) - 1).reshape(width, count)


def directions(like: Tensor, width: int, count: int) -> Tensor:
    """``Ω (O, K)`` of signs, the same in every fit, in the type and on the device of ``like`` (any shape)."""
    return torch.from_numpy(_signs(width, count)).to(like)


@dataclass(frozen=True, eq=False)
class WideFactor:
    """``U diag(l) Uᵀ + diag(r)``, positive semi-definite, for every group ``R``.

    Attributes:
        vectors: ``U (R, O, k)``.
        values: ``l (R, k)``, of both signs.
        remainder: ``r (R, O)``, not negative.
        error: ``‖G − U diag(l) Uᵀ − diag(r)‖ / ‖G‖`` in Frobenius norm, both estimated along directions that the low
            rank did not see; the largest of all groups.
        of_diagonal: the same error of the diagonal alone.
    """

    vectors: Tensor
    values: Tensor
    remainder: Tensor
    error: float = 0.0
    of_diagonal: float = 0.0

    @property
    def rank(self) -> int:
        """``k``."""
        return self.values.shape[-1]

    def diagonal(self) -> Tensor:
        """``(R, O)``."""
        return (self.vectors.square() @ self.values[..., None])[..., 0] + self.remainder

    def dense(self) -> Tensor:
        """``(R, O, O)``."""
        low = torch.matmul(self.vectors * self.values[:, None], self.vectors.mT)
        return low + torch.diag_embed(self.remainder)

    def matvec(self, w: Tensor) -> Tensor:
        """``(U diag(l) Uᵀ + diag(r)) W`` for ``W (..., R, O, I)``."""
        low = torch.matmul(self.vectors, self.values[..., None] * torch.matmul(self.vectors.mT, w))
        return low + self.remainder[..., None] * w

    def root(self, w: Tensor) -> Tensor:
        """``L W`` for ``W (..., R, O, I)`` and a root ``L Lᵀ`` of the factor, which is not symmetric."""
        low, diagonal = self.values.double(), self.remainder.double().sqrt()
        inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 0)
        half = inverse[..., None] * self.vectors.double()
        middle = root_of_low_rank(_gram(half), low, 0.5).to(w)
        half = half.to(w)
        moved = w + torch.matmul(half, torch.matmul(middle, torch.matmul(half.mT, w)))
        return diagonal.to(w)[..., None] * moved

    def largest(self) -> float:
        """At least the largest eigenvalue of every group."""
        gram = torch.linalg.eigvalsh(_gram(self.vectors.double() * self.values.double().clamp_min(0).sqrt()[:, None]))
        low = gram[..., -1].clamp_min(0) if self.rank else self.remainder.new_zeros(len(self.remainder)).double()
        return float((self.remainder.double().amax(-1) + low).max())

    def scaled(self, factor: float | Tensor) -> WideFactor:
        """This factor times a number or 0-dim ``factor``."""
        return WideFactor(self.vectors, self.values * factor, self.remainder * factor, self.error, self.of_diagonal)


def _gram(columns: Tensor) -> Tensor:
    return torch.matmul(columns.mT, columns)


def root_of_low_rank(gram: Tensor, values: Tensor, power: float) -> Tensor:
    """``Z (..., k, k)`` with ``(1 + F diag(l) Fᵀ)^power = 1 + F Z Fᵀ``, in float64.

    Args:
        gram: ``Fᵀ F (..., k, k)``.
        values: ``l (..., k)`` of both signs; the matrix has to be positive semi-definite.
        power: of which.
    """
    half = values.abs().sqrt()
    sizes, vectors = torch.linalg.eigh(half[..., None] * gram * half[..., None, :])
    keep = sizes > 1e-13 * sizes[..., -1:].clamp_min(torch.finfo(sizes.dtype).tiny)
    size = sizes.clamp_min(0).sqrt()
    inverse = torch.where(keep, 1 / torch.where(keep, size, 1), 0)
    core = size[..., None] * (vectors.mT * values.sign()[..., None, :]) @ vectors * size[..., None, :]
    found, turn = torch.linalg.eigh((core + core.mT) / 2)
    left = half[..., None] * (vectors * inverse[..., None, :] @ turn)
    return (left * ((1 + found).clamp_min(0).pow(power) - 1)[..., None, :]) @ left.mT


def wide_factor(diagonal: Tensor, sketch: Tensor, rank: int) -> WideFactor:
    """The factor from its diagonal and its sketch.

    Of the ranks ``rank, rank/2, ..., 1, 0`` that one is taken which is nearest to the factor along the held-out
    directions, so that it is no worse than the diagonal alone as far as they can tell.

    Args:
        diagonal: ``d (R, O)``, not negative.
        sketch: ``G Ω (R, O, K)`` with the ``Ω`` of :func:`directions` and ``K`` of :func:`sketch_width`.
        rank: the largest rank.
    """
    groups, width, count = sketch.shape
    omega = directions(sketch.double(), width, count)
    found = [_best(d, y, omega, rank) for d, y in zip(diagonal.double(), sketch.double(), strict=True)]
    most = max(vectors.shape[1] for vectors, *_ in found)
    vectors, values = (sketch.new_zeros(groups, *shape) for shape in ((width, most), (most,)))
    for r, (own, low, *_) in enumerate(found):
        vectors[r, :, : own.shape[1]], values[r, : len(low)] = own.to(sketch), low.to(sketch)
    remainder = torch.stack([each[2] for each in found]).to(sketch)
    return WideFactor(vectors, values, remainder, max(each[3] for each in found), max(each[4] for each in found))


def _best(d: Tensor, y: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Vectors ``(O, k)``, values ``(k,)``, remainder ``(O,)``, and the errors with them and without, of one group."""
    beside = y - d[:, None] * omega  # E Ω
    seen, held = slice(0, len(y[0]) - HELD_OUT), slice(len(y[0]) - HELD_OUT, None)
    size = float(y[:, held].norm())

    def error(u: Tensor, low: Tensor) -> float:
        moved = (u * low) @ (u.T @ omega[:, held]) - (u.square() @ low)[:, None] * omega[:, held]
        return float((beside[:, held] - moved).norm()) / size if size > 0 else 0.0

    best = d.new_zeros(len(d), 0), d.new_zeros(0), d
    least = alone = error(*best[:2])
    trial = min(rank, len(d))
    while trial and alone > 0:
        u, low, r = _definite(d, *_low_rank(d, beside[:, seen], omega[:, seen], trial))
        this = error(u, low)
        if this < least:
            best, least = (u, low, r), this
        trial //= 2
    return *best, least, alone


def _low_rank(d: Tensor, beside: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Vectors and values of a low rank whose entries beside the diagonal are near those of ``E``, given ``E Ω``."""
    own = torch.zeros_like(d)  # the diagonal of the low rank, which E does not have
    for _ in range(REFITS):
        products = beside + own[:, None] * omega
        values, vectors = torch.linalg.eigh(_gram(products))
        keep = values[-rank:] > 1e-14 * values[-1]
        basis = torch.linalg.qr(products @ vectors[:, -rank:][:, keep])[0]
        # E ≈ Q C Qᵀ, and C from Qᵀ E Ω = C Qᵀ Ω
        core = (basis.T @ products) @ torch.linalg.pinv(basis.T @ omega, rtol=1e-8)
        low, turn = torch.linalg.eigh((core + core.T) / 2)
        u = basis @ turn
        own = torch.minimum(u.square() @ low, (1 - LEFT) * d)
    return u, low


def _definite(d: Tensor, u: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The low rank changed as far as is needed for a positive semi-definite sum with the diagonal ``d``."""
    u = torch.where(d[:, None] > 0, u, 0)
    for _ in range(REPAIRS):
        own = u.square() @ low
        short = (own > (1 - LEFT) * d).nonzero()[:, 0]  # more than the diagonal has
        shrunk = torch.ones_like(d)
        shrunk[short] = ((1 - LEFT) * d[short] / own[short]).sqrt()
        u = u * shrunk[:, None]
        vectors, values, root = _in_metric(d, u, low)
        if not len(values) or float(values[0]) >= SLACK - 1:
            break
        u, low = root[:, None] * vectors, values.clamp_min(SLACK - 1)
    _, values, _ = _in_metric(d, u, low)
    own = u.square() @ low
    excess = -1 - float(values[0]) if len(values) else 0.0  # H ⪰ −excess · diag(r) where it is not SLACK
    if excess > -SLACK:  # the mean of H and diag(d) that is definite; its diagonal is d, too
        live = d > 0
        largest = float(((d - own)[live] / d[live]).max()) if bool(live.any()) else 1.0
        low = low * ((1 - SLACK) / (1 + max(excess, 0.0) * largest))
    return u, low, (d - u.square() @ low).clamp_min(0)


def _in_metric(d: Tensor, u: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal vectors and values of ``R^{-1/2} U diag(l) Uᵀ R^{-1/2}``, smallest first, and ``√r``."""
    r = d - u.square() @ low
    root = r.clamp_min(0).sqrt()
    half = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(d.dtype).tiny), 0)[:, None] * u * low.abs().sqrt()
    values, vectors = torch.linalg.eigh(_gram(half))
    keep = values > 1e-13 * values[-1:].clamp_min(torch.finfo(d.dtype).tiny)
    values, vectors = values[keep].sqrt(), vectors[:, keep]
    core = values[:, None] * (vectors.T * low.sign()) @ vectors * values
    found, turn = torch.linalg.eigh((core + core.T) / 2)
    return (half @ (vectors / values)) @ turn, found, root
