"""Matrix: an immutable symmetric positive semi-definite operator on flat parameter vectors.

A subclass needs only :meth:`Matrix.dense`; every other operation has a default through it (slow, with a warning for
large matrices), against which the fast paths are checked.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.errors import ShapeMismatch
from laplace_kf.linalg import cholesky, require_positive
from laplace_kf.members import Members

__all__ = ["Isotropic", "Matrix", "Sum", "fresh_generator", "product_of_sum", "standard_normal"]

DENSE_WARNING = 4096  # parameters above which going through a dense matrix is worth a warning


def fresh_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator seeded by the operating system; the global one is left alone."""
    return torch.Generator(device).manual_seed(int.from_bytes(os.urandom(7), "little"))


def standard_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws of a shape in the type and on the device of ``like``.

    Drawn on the generator's device and in float32 at least, so that one generator gives one sequence everywhere.
    """
    generator = generator if generator is not None else fresh_generator(like.device)
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype)
    return noise.to(device=like.device, dtype=like.dtype)


SHOWN = 60  # letters of a label in a representation


class Matrix(Members, ABC):
    """A symmetric operator of size ``P``; vectors are ``(P,)`` or ``(P, K)``."""

    called = "matrix"
    label: str = ""

    def __repr__(self) -> str:
        label = self.label if len(self.label) <= SHOWN else f"{self.label[:SHOWN]}..."
        return f"{type(self).__name__}({self.size} x {self.size}{', ' if label else ''}{label})"

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of rows ``P``."""

    @property
    def device(self) -> torch.device | None:
        """Where its numbers are (blocks of a model spread by hand differ); None if it does not matter."""
        return next((value.device for value in vars(self).values() if isinstance(value, Tensor)), None)

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself, ``(P, P)``."""

    @abstractmethod
    def scaled(self, factor: float | Tensor) -> Matrix:
        """This matrix times a number or 0-dim ``factor``."""

    def _cholesky(self) -> Tensor:
        if self.size > DENSE_WARNING:
            warnings.warn(
                f"{type(self).__name__} of size {self.size} has no fast path here and goes through a dense matrix",
                RuntimeWarning,
                stacklevel=users_line(),
            )
        return cholesky(self.dense(), self.label)

    def diag(self) -> Tensor:
        """The diagonal, ``(P,)``."""
        return self.dense().diagonal()

    def matvec(self, v: Tensor) -> Tensor:
        """The product with ``v``, ``(P,)`` or ``(P, K)``."""
        return self.dense() @ self._checked(v)

    def added_to(self, total: Tensor, v: Tensor) -> Tensor:
        """``total + matrix v``, both ``(P,)`` or ``(P, K)``; ``total`` may be overwritten."""
        return total.add_(self.matvec(v))

    def solve(self, v: Tensor) -> Tensor:
        """``matrix⁻¹ v`` for ``v`` ``(P,)`` or ``(P, K)``.

        Raises:
            NotPositiveDefinite: if the matrix is singular.
        """
        v = self._checked(v)
        columns = v[:, None] if v.dim() == 1 else v
        return torch.cholesky_solve(columns, self._cholesky()).reshape(v.shape)

    def logdet(self) -> Tensor:
        """Log-determinant, 0-dim."""
        return 2 * self._cholesky().diagonal().log().sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws from ``N(0, matrix⁻¹)``, ``(n, P)``."""
        return self.colour(standard_normal((n, self.noise_size), self.diag(), generator))

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers a draw is made of: ``P``, unless a subclass needs more."""
        return self.size

    def colour(self, noise: Tensor) -> Tensor:
        """Turns standard normal ``(n, noise_size)`` into draws from ``N(0, matrix⁻¹)``, ``(n, P)``."""
        factor = self._cholesky()
        return torch.linalg.solve_triangular(factor.T, noise.to(factor.dtype).T, upper=True).T

    def quadratic(self, v: Tensor) -> Tensor:
        """``Vᵀ matrix⁻¹ V``: ``(K, K)`` for ``V (P, K)``, 0-dim for ``(P,)``."""
        v = self._checked(v)
        return v.T @ self.solve(v) if v.dim() == 2 else v @ self.solve(v)

    def plus(self, other: Matrix) -> Matrix:
        """The sum with another matrix of the same size; exact, lazily if there is no closed form.

        Raises:
            ShapeMismatch: if the sizes differ.
        """
        self._same_size(other)
        if isinstance(other, Isotropic) and other.is_zero():
            return self
        return Sum((self, other))

    def _checked(self, v: Tensor) -> Tensor:
        if v.dim() not in (1, 2) or v.shape[0] != self.size:
            raise ShapeMismatch(f"expected (P,) or (P, K) with P = {self.size}, got {tuple(v.shape)}")
        return v

    def _same_size(self, other: Matrix) -> None:
        if self.size != other.size:
            raise ShapeMismatch(f"cannot add matrices of sizes {self.size} and {other.size}")


class Isotropic(Matrix):
    """``value · I``: a prior, or Tikhonov damping.

    Args:
        size: ``P``.
        value: 0-dim tensor; its type and device are those of every result.
    """

    def __init__(self, size: int, value: Tensor) -> None:
        self._size, self.value = size, value

    @property
    def size(self) -> int:
        return self._size

    def is_zero(self) -> bool:
        """Whether the value is exactly 0 (and no gradient is asked for)."""
        return not self.value.requires_grad and float(self.value) == 0.0

    def dense(self) -> Tensor:
        return torch.diag_embed(self.diag())

    def scaled(self, factor: float | Tensor) -> Isotropic:
        return Isotropic(self._size, self.value * factor)

    def diag(self) -> Tensor:
        return self.value.expand(self._size)

    def matvec(self, v: Tensor) -> Tensor:
        return self.value * self._checked(v)

    def added_to(self, total: Tensor, v: Tensor) -> Tensor:
        return total.addcmul_(self.value, v)

    def solve(self, v: Tensor) -> Tensor:
        require_positive(self.value, self.label)
        return self._checked(v) / self.value

    def logdet(self) -> Tensor:
        require_positive(self.value, self.label)
        return self._size * self.value.log()

    def colour(self, noise: Tensor) -> Tensor:
        require_positive(self.value, self.label)
        return noise / self.value.sqrt()

    def plus(self, other: Matrix) -> Matrix:
        self._same_size(other)
        if isinstance(other, Isotropic):
            return Isotropic(self._size, self.value + other.value)
        return other.plus(self)


class Sum(Matrix):
    """A sum kept as its terms: products are exact and cheap, everything else goes through the dense matrix."""

    def __init__(self, terms: Sequence[Matrix]) -> None:
        flat: list[Matrix] = []
        for term in terms:
            flat.extend(term.terms if isinstance(term, Sum) else (term,))
        self.terms: tuple[Matrix, ...] = tuple(flat)
        self.label = next((term.label for term in flat if term.label), "")

    @property
    def size(self) -> int:
        return self.terms[0].size

    def dense(self) -> Tensor:
        return torch.stack([term.dense() for term in self.terms]).sum(0)

    def scaled(self, factor: float | Tensor) -> Sum:
        return Sum([term.scaled(factor) for term in self.terms])

    def diag(self) -> Tensor:
        return torch.stack([term.diag() for term in self.terms]).sum(0)

    def matvec(self, v: Tensor) -> Tensor:
        return product_of_sum(self.terms, v)


def product_of_sum(terms: Sequence[Matrix], v: Tensor) -> Tensor:
    """``Σ_k terms_k v`` for ``v`` ``(P,)`` or ``(P, K)``, one after another into one result."""
    total = terms[0].matvec(v)
    for term in terms[1:]:
        total = term.added_to(total, v)
    return total
