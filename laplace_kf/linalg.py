"""Factorisations that do not fail silently: retry in float64, then a reported jitter, then a typed error."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.errors import NonFinite, NotPositiveDefinite

__all__ = ["all_finite", "cholesky", "definite_cholesky", "eigh", "eigvalsh", "require_positive", "typed"]

P = ParamSpec("P")
T = TypeVar("T")

KNOB = "Increase prior_precision (λ > 0), or estimate the curvature from more data or in float64."


def all_finite(v: Tensor) -> bool:
    """Whether all entries of a tensor of any shape are finite; where they are, one cheap pass finds out."""
    return math.isfinite(v.detach().sum()) or bool(torch.isfinite(v).all())


def _require_finite(matrix: Tensor, block: str) -> None:
    if not all_finite(matrix):
        raise NonFinite(f"a curvature factor of block {block!r}, {tuple(matrix.shape)}, has NaN or infinite entries")


def eigh(matrix: Tensor, block: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors of positive semi-definite matrices ``(..., d, d)``.

    Raises:
        NonFinite: if the matrix has NaN or infinite entries.
        NotPositiveDefinite: if an eigenvalue is negative beyond rounding, or no decomposition converges.
    """
    values, vectors = _eigen(matrix, block, torch.linalg.eigh)
    return values, vectors


def eigvalsh(matrix: Tensor, block: str) -> Tensor:
    """The eigenvalues of :func:`eigh` alone, ``(..., d)``, at a fraction of the cost; its errors."""
    return _eigen(matrix, block, lambda candidate: (torch.linalg.eigvalsh(candidate),))[0]


def _eigen(matrix: Tensor, block: str, decompose: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``decompose`` gives, eigenvalues first, in the type of the matrix."""
    _require_finite(matrix, block)
    for attempt, candidate in enumerate(_attempts(matrix)):
        try:
            found = tuple(decompose(candidate))
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        values = found[0]
        if not bool(torch.isfinite(found[-1]).all()):  # float32 solvers can do this to a well-conditioned matrix
            continue
        if attempt == 2:
            _report(block)
        largest = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
        if bool((values < -1e-3 * largest).any()):
            raise NotPositiveDefinite(block, float(values.min()), "A curvature factor must not have this; " + KNOB)
        return tuple(part.to(matrix.dtype) for part in (values.clamp_min(0), *found[1:]))
    raise NotPositiveDefinite(block, float("nan"), "Its eigendecomposition does not converge. " + KNOB)


def cholesky(matrix: Tensor, block: str) -> Tensor:
    """Lower Cholesky factors of positive definite matrices ``(..., d, d)``.

    Raises:
        NonFinite: if the matrix has NaN or infinite entries.
        NotPositiveDefinite: if it is not positive definite even with a jitter of 1e-8 of its mean diagonal.
    """
    _require_finite(matrix, block)
    for attempt, candidate in enumerate(_attempts(matrix)):
        factor, info = torch.linalg.cholesky_ex(candidate)
        if not bool(info.any()):
            if attempt == 2:
                _report(block)
            return factor.to(matrix.dtype)
    smallest = float(torch.linalg.eigvalsh(matrix.double()).min())
    raise NotPositiveDefinite(block, smallest, KNOB)


def definite_cholesky(matrix: Tensor, block: str) -> Tensor | None:
    """The factor ``(d, d)`` of :func:`cholesky` without a jitter; ``None`` for a matrix that is not positive definite.

    Raises:
        NonFinite: if the matrix has NaN or infinite entries.
    """
    _require_finite(matrix, block)
    for _, candidate in zip(range(2), _attempts(matrix), strict=False):
        factor, info = torch.linalg.cholesky_ex(candidate)
        if not bool(info.any()):
            return factor.to(matrix.dtype)
    return None


def require_positive(values: Tensor, block: str) -> None:
    """Raises :class:`NotPositiveDefinite` unless all eigenvalues (of any shape) are finite and positive."""
    if not values.numel():
        return
    smallest, largest = torch.aminmax(values.detach())  # both NaN where one of them is
    if not (float(smallest) > 0 and float(largest) < math.inf):
        raise NotPositiveDefinite(block, float(smallest), KNOB)


def typed(call: Callable[P, T]) -> Callable[P, T]:
    """A public call in which a factorisation that fails inside torch comes out as a :class:`NotPositiveDefinite`.

    For those that have no second way; matrices that may be singular go through :func:`eigh` and :func:`cholesky`.
    """

    @functools.wraps(call)
    def typed_call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            what = f"A factorisation in {call.__name__!r} failed: {error} {KNOB}"
            raise NotPositiveDefinite("of this call", float("nan"), what) from error

    return typed_call


def _attempts(matrix: Tensor) -> Iterator[Tensor]:
    """Matrices ``(..., d, d)`` as they are, in float64, and with a jitter; each made when the one before has failed."""
    yield matrix
    yield matrix.double()
    yield matrix.double() + _jitter(matrix.double())


def _jitter(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return 1e-8 * mean[..., None, None] * eye


def _report(block: str) -> None:
    warnings.warn(
        f"block {block!r} needed a jitter of 1e-8 of its mean diagonal to be factorised",
        RuntimeWarning,
        stacklevel=users_line(),
    )
