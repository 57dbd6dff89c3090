"""Covariances of a network's outputs at every position, kept as what they are made of.

``C × C`` numbers for every input are too many for thousands of outputs, and draws, variances and products need none
of them: a linearised last layer has outputs with covariance ``B diag(w) Bᵀ`` whose ``B`` belongs to the posterior and
whose ``w (C,)`` belongs to the input. ``N`` counts examples, ``T`` positions, ``C`` outputs, ``S`` samples, ``M`` the
standard normal numbers of a draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair

__all__ = [
    "SharedBasis",
    "Spread",
    "covariance_root",
    "runs",
    "scaled",
    "together",
]

RUN = 2**22  # numbers in the largest temporary that is made on the way
RESULT_BYTES = 4 * 2**30  # larger covariances are refused

S = TypeVar("S", bound="Spread")


def runs(count: int, each: int, numbers: int = RUN) -> Iterator[slice]:
    """Runs of ``count`` things of ``each`` numbers, at least one thing a run."""
    step = max(1, numbers // max(1, each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def covariance_root(covariance: Tensor) -> Tensor:
    """``L (..., C, C)`` with ``L Lᵀ`` the covariance: Cholesky, or of a singular matrix from its eigenvectors.

    The root of a matrix does not depend on the others.
    """
    if covariance.dim() == 2:
        return covariance_root(covariance[None])[0]
    lower, failed = torch.linalg.cholesky_ex(covariance)
    singular = failed != 0
    if not bool(singular.any()):
        return lower
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    lower = torch.linalg.cholesky(torch.where(singular[..., None, None], eye, covariance))
    few = covariance[singular]
    values, vectors = torch.linalg.eigh((few + few.transpose(-1, -2)) / 2)
    return lower.index_put((singular,), vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2))


class Spread(ABC):
    """Covariances ``Σ (C, C)`` at each of ``(N, T)`` positions. Subclasses are dataclasses of tensors.

    The names in ``own`` are of tensors with a leading axis of examples; all others belong to every example.
    """

    own: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(N, T, C)``."""

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """``M``."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Diagonals, ``(N, T, C)``."""

    @abstractmethod
    def colour(self, noise: Tensor) -> Tensor:
        """Standard normal ``(S, M)``, the same for every position, to draws ``(S, N, T, C)`` around 0."""

    def coloured(self, noise: Tensor, count: int) -> Iterator[Tensor]:
        """:meth:`colour` of noise ``(S, M)``, ``count`` draws at a time and fewer at the end."""
        for part in noise.split(count):
            yield self.colour(part)

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """``Σ v`` for one vector ``(C,)``, as ``(N, T, C)``."""

    @abstractmethod
    def scaled(self: S, factor: float) -> S:
        """These covariances times a number."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The covariances themselves, ``(N, T, C, C)``, of any size."""

    def covariance(self) -> Tensor:
        """The covariances themselves, ``(N, T, C, C)``.

        Raises:
            IncompatiblePair: if they are larger than 4 GiB.
        """
        examples, positions, width = self.shape
        needed = examples * positions * width**2 * self.variance().element_size()
        if needed > RESULT_BYTES:
            raise IncompatiblePair(
                f"covariances of {width} outputs at {examples * positions} positions need {needed / 2**30:.1f} GiB; "
                "ask for fewer inputs at a time, or for what needs the variances alone"
            )
        return self.dense()

    @property
    def differentiable(self) -> bool:
        """Whether some of its tensors ask for gradients."""
        values = (getattr(self, field.name) for field in fields(cast(Any, self)))
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)

    def _mapped(self: S, change: Callable[[str, Tensor], Tensor]) -> S:
        found: dict[str, Any] = {}
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = change(field.name, value)
        return replace(cast(Any, self), **found)

    def part(self: S, examples: slice) -> S:
        """Those of some examples."""
        return self._mapped(lambda name, value: value[examples] if name in self.own else value)

    def to(self: S, like: Tensor) -> S:
        """In the type and on the device of a tensor of any shape."""
        return self._mapped(lambda name, value: value.to(like))

    def joined(self: S, others: Sequence[S]) -> S:
        """Those of this one's examples and then those of others, which have to share everything else."""
        return self._mapped(
            lambda name, value: torch.cat([value, *(getattr(o, name) for o in others)]) if name in self.own else value
        )


def together(parts: Sequence[Tensor | Spread]) -> Tensor | Spread:
    """Covariances ``(N, T, C, C)``, or what they are made of, of the examples of all parts."""
    spreads = [part for part in parts if isinstance(part, Spread)]
    if len(spreads) == len(parts) and len({type(part) for part in parts}) == 1:
        return spreads[0].joined(spreads[1:])
    return torch.cat([part.covariance() if isinstance(part, Spread) else part for part in parts])


def scaled(covariance: Tensor | Spread, factor: float) -> Tensor | Spread:
    """Covariances ``(N, T, C, C)``, or what they are made of, times a number."""
    return covariance.scaled(factor) if isinstance(covariance, Spread) else covariance * factor


@dataclass(frozen=True, eq=False)
class SharedBasis(Spread):
    """``B diag(w) Bᵀ``: one basis for all inputs.

    Attributes:
        weights: ``w (N, T, M)``, not negative.
        basis: ``B (C, M)``, or ``None`` for the identity.
    """

    weights: Tensor
    basis: Tensor | None

    own = ("weights",)

    @property
    def shape(self) -> tuple[int, int, int]:
        n, t, m = self.weights.shape
        return n, t, m if self.basis is None else self.basis.shape[0]

    @property
    def noise_size(self) -> int:
        return self.weights.shape[-1]

    def variance(self) -> Tensor:
        if self.basis is None:
            return self.weights
        parts = runs(*self.basis.shape)
        return torch.cat([torch.matmul(self.weights, self.basis[rows].square().T) for rows in parts], -1)

    def _out(self, inner: Tensor) -> Tensor:
        return inner if self.basis is None else torch.matmul(inner, self.basis.T)

    def colour(self, noise: Tensor) -> Tensor:
        return self._out(noise[:, None, None, :] * self.weights.clamp_min(0.0).sqrt())

    def product(self, v: Tensor) -> Tensor:
        return self._out(self.weights * (v if self.basis is None else v @ self.basis))

    def scaled(self, factor: float) -> SharedBasis:
        return SharedBasis(self.weights * factor, self.basis)

    def dense(self) -> Tensor:
        if self.basis is None:
            return torch.diag_embed(self.weights)
        return torch.matmul(self.basis * self.weights.unsqueeze(-2), self.basis.T)
