"""A Gaussian over flat weight vectors: mean and precision. Prior and posterior are both this."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.operators import Blockwise, Isotropic, Matrix, Spectral

__all__ = ["WeightGaussian"]


@dataclass(frozen=True)
class WeightGaussian:
    """``N(mean, precision⁻¹)`` over ``P`` weights.

    Attributes:
        mean: ``(P,)``.
        precision: Matrix of size ``P``.
    """

    mean: Tensor
    precision: Matrix

    def __post_init__(self) -> None:
        if self.mean.shape != (self.precision.size,):
            raise ShapeMismatch(f"mean {tuple(self.mean.shape)} does not fit a precision of size {self.precision.size}")

    @classmethod
    def isotropic(cls, mean: Tensor, precision: float | Tensor) -> WeightGaussian:
        """``N(mean (P,), I / precision)``."""
        value = torch.as_tensor(precision, dtype=mean.dtype, device=mean.device)
        return cls(mean, Isotropic(mean.shape[0], value))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, ``(n, P)``."""
        return self.mean + self.precision.sample(n, generator).to(self.mean.dtype)

    def energy(self, weights: Tensor) -> Tensor:
        """``½ (w − mean)ᵀ precision (w − mean)``, 0-dim and differentiable in ``weights (P,)``."""
        v = weights - self.mean
        if isinstance(self.precision, (Blockwise, Spectral)):
            return self.precision.energy(v) / 2
        return v @ self.precision.matvec(v) / 2

    def log_prob(self, weights: Tensor) -> Tensor:
        """Log density at ``weights (P,)``, 0-dim."""
        constant = self.precision.logdet() - self.mean.shape[0] * math.log(2 * math.pi)
        return constant / 2 - self.energy(weights)

    def kl(self, other: WeightGaussian) -> Tensor:
        """``KL(self ‖ other)`` in nats, 0-dim; forms dense matrices, so for small ``P``."""
        size = self.mean.shape[0]
        trace = self.precision.solve(other.precision.dense()).diagonal().sum()
        shift = 2 * other.energy(self.mean)
        return (trace + shift - size + self.precision.logdet() - other.precision.logdet()) / 2
