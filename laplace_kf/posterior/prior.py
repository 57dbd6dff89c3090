"""Prior precision λ as users give it: one number, a 0-dim tensor, or numbers by parameter-name pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from laplace_kf.errors import InvalidArgument, ShapeMismatch, UnknownName
from laplace_kf.models import plain_name
from laplace_kf.tape import FlatLayout

__all__ = ["PriorPrecision", "by_parameter", "checked_prior", "plain", "positive", "prior_tensors"]

PriorPrecision = float | Tensor | Mapping[str, float] | Mapping[str, Tensor] | Mapping[str, float | Tensor]


def positive(what: str, value: float) -> float:
    """The value as a float.

    Raises:
        ValueError: unless it is positive and finite.
    """
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise InvalidArgument(f"{what} must be positive and finite, got {value}")
    return number


def checked_prior(value: PriorPrecision) -> PriorPrecision:
    """The prior precision with its numbers as floats; 0-dim tensors stay tensors.

    Raises:
        ValueError: for a negative or non-finite number, or an empty mapping.
        ShapeMismatch: for a tensor that is not 0-dim.
    """
    if isinstance(value, Mapping):
        if not value:
            raise InvalidArgument("prior_precision is an empty mapping; give {name pattern: number} for all parameters")
        return {pattern: _checked(entry) for pattern, entry in value.items()}
    return _checked(value)


def _checked(value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _number(value)
    if value.dim():
        raise ShapeMismatch(f"prior_precision must be a number or 0-dim, got shape {tuple(value.shape)}")
    _number(value.item())
    return value


def plain(prior: PriorPrecision) -> float | dict[str, float]:
    """The prior precision with numbers in place of tensors."""
    if isinstance(prior, Mapping):
        return {pattern: _plain(value) for pattern, value in prior.items()}
    return _plain(prior)


def _plain(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def by_parameter(prior: PriorPrecision, layout: FlatLayout) -> dict[str, float | Tensor] | None:
    """λ of every parameter, as given (a number or 0-dim), if it was given by patterns (the first match counts).

    Returns:
        By parameter name; ``None`` for one λ for all.

    Raises:
        UnknownName: for a pattern that matches no selected parameter.
        ValueError: for a parameter without a value, or a pattern that comes too late to give one.
    """
    if not isinstance(prior, Mapping):
        return None
    found: dict[str, float | Tensor] = {}
    seen: list[str] = []
    for pattern, value in prior.items():
        hits = [name for name in layout.names if fnmatchcase(name, pattern)]
        hits = hits or [name for name in layout.names if fnmatchcase(plain_name(name), plain_name(pattern))]
        if not hits:
            raise UnknownName("pattern in prior_precision", pattern, layout.names)
        wider = any(fnmatchcase(earlier, pattern) for earlier in seen)  # "and all others", of which there may be none
        seen.append(pattern)
        if not wider and all(name in found for name in hits):
            raise InvalidArgument(
                f"prior_precision[{pattern!r}] would have no effect: its parameters ({', '.join(hits[:5])}) have a "
                "value from an earlier pattern, and the first that matches counts; put the widest pattern last"
            )
        for name in hits:
            found.setdefault(name, value)
    missing = [name for name in layout.names if name not in found]
    if missing:
        raise InvalidArgument(
            f"prior_precision gives no value for {', '.join(missing)}; add a pattern (such as '*': 1.0, last)"
        )
    return found


def prior_tensors(prior: PriorPrecision, layout: FlatLayout, like: Tensor) -> Tensor | dict[str, Tensor]:
    """λ as a 0-dim tensor in the type and on the device of ``like``, or one for every parameter name.

    Parameters that share a value given share one tensor, so that a block can tell that its λ is one number.
    """
    named = by_parameter(prior, layout)
    if named is None:
        assert not isinstance(prior, Mapping)
        return _like(prior, like)
    shared = {id(value): _like(value, like) for value in named.values()}
    return {name: shared[id(value)] for name, value in named.items()}


def _like(value: float | Tensor, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)


def _number(value: float) -> float:
    try:
        number = float(value)
    except TypeError as error:
        raise InvalidArgument(
            f"prior_precision must be a number, a 0-dim tensor or {{name pattern: number}}, got {value!r}; the default "
            "is 1.0, and posterior.tune(val) finds it"
        ) from error
    if not (math.isfinite(number) and number >= 0):
        raise InvalidArgument(f"prior_precision must be finite and not negative, got {value}")
    return number
