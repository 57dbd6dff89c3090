"""Prior precision λ as users give it: one number, a 0-dim tensor, or numbers by parameter-name pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from laplace_kf.errors import ShapeMismatch, UnknownName
from laplace_kf.models import plain_name
from laplace_kf.tape import FlatLayout

__all__ = ["PriorPrecision", "by_parameter", "checked_prior", "positive", "prior_tensors"]

PriorPrecision = float | Tensor | Mapping[str, float]


def positive(what: str, value: float) -> float:
    """The value as a float.

    Raises:
        ValueError: unless it is positive and finite.
    """
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{what} must be positive and finite, got {value}")
    return number


def checked_prior(value: PriorPrecision) -> PriorPrecision:
    """The prior precision with its numbers as floats.

    Raises:
        ValueError: for a negative or non-finite number, or an empty mapping.
        ShapeMismatch: for a tensor that is not 0-dim.
    """
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("prior_precision is an empty mapping; give {name pattern: number} for all parameters")
        return {pattern: _number(entry) for pattern, entry in value.items()}
    if isinstance(value, Tensor):
        if value.dim():
            raise ShapeMismatch(f"prior_precision must be a number or 0-dim, got shape {tuple(value.shape)}")
        _number(float(value.detach()))
        return value
    return _number(value)


def by_parameter(prior: PriorPrecision, layout: FlatLayout) -> dict[str, float] | None:
    """The number of every parameter if the prior was given by patterns (the first match counts), else ``None``.

    Raises:
        UnknownName: for a pattern that matches no selected parameter.
        ValueError: for a parameter without a value.
    """
    if not isinstance(prior, Mapping):
        return None
    found: dict[str, float] = {}
    for pattern, value in prior.items():
        hits = [name for name in layout.names if fnmatchcase(name, pattern)]
        hits = hits or [name for name in layout.names if fnmatchcase(plain_name(name), plain_name(pattern))]
        if not hits:
            raise UnknownName("pattern in prior_precision", pattern, layout.names)
        for name in hits:
            found.setdefault(name, value)
    missing = [name for name in layout.names if name not in found]
    if missing:
        raise ValueError(
            f"prior_precision gives no value for {', '.join(missing)}; add a pattern (such as '*': 1.0, last)"
        )
    return found


def prior_tensors(prior: PriorPrecision, layout: FlatLayout, like: Tensor) -> Tensor | dict[str, Tensor]:
    """λ as a 0-dim tensor in the type and on the device of ``like``, or one for every parameter name."""
    named = by_parameter(prior, layout)
    if named is not None:
        return {name: like.new_tensor(value) for name, value in named.items()}
    return prior.to(like) if isinstance(prior, Tensor) else like.new_tensor(prior)


def _number(value: float) -> float:
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"prior_precision must be finite and not negative, got {value}")
    return number
