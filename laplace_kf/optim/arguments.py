"""Ranges of the numbers that optimisers are constructed with; refused early and all in one way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from laplace_kf.errors import IncompatiblePair

__all__ = ["check_arguments"]

NOT_NEGATIVE = {"l2", "lr", "tau", "zeta", "structural_damping", "kappa", "tolerance", "scale"}
POSITIVE = {"trust_radius", "power"}
SHARES = {"ema": (True, False), "averaging": (True, True), "curvature_fraction": (False, True)}  # is 0, is 1 allowed
SWITCHES = {"momentum", "rescale", "adapt_tau", "adapt_zeta", "low_rank", "search_start", "scale_sensitive"}
COUNTS = {"refresh", "factors_every", "nonzero", "samples", "columns", "steps"}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Checks numbers by argument name; ``None`` (a default) and names without a rule pass.

    Raises:
        IncompatiblePair: says the name, what was given and what is allowed.
    """
    for name, value in given.items():
        if value is None:
            continue
        wanted = _wanted(name, value)
        if wanted:
            raise IncompatiblePair(f"{name} must be {wanted}, got {value!r}")


def _wanted(name: str, value: Any) -> str:
    """What a value should have been, or nothing."""
    number = _number(value)
    if name in NOT_NEGATIVE:
        return "" if number >= 0 and math.isfinite(number) else "finite and not negative"
    if name in POSITIVE:
        return "" if number > 0 and math.isfinite(number) else "finite and positive"
    if name in SHARES:
        zero, one = SHARES[name]
        inside = 0 < number < 1 or (zero and number == 0) or (one and number == 1)
        return "" if inside else f"in {'[' if zero else '('}0, 1{']' if one else ')'}"
    if name in SWITCHES:
        return "" if isinstance(value, bool) else "True or False (how much is found at every step)"
    if name in COUNTS:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole and value >= 1 else "a whole number of at least 1"
    if name == "max_rise":
        return "" if number >= 0 else "not negative (infinity for no limit)"
    return ""


def _number(value: Any) -> float:
    """As a float; NaN, which is in no range, for what is no number."""
    if isinstance(value, (bool, str)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
