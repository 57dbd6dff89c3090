"""Checks of settings: one wording for what is not allowed."""

from __future__ import annotations

from laplace_kf.errors import LaplaceKFError

__all__ = ["BadSetting", "require"]


class BadSetting(LaplaceKFError, ValueError):
    """A setting whose value is not of its type or range; says what is allowed."""


def require(name: str, value: object, holds: object, allowed: str) -> None:
    """Refuses ``name=value`` unless it holds.

    Raises:
        BadSetting: with what is allowed, the end of "it must be ...".
    """
    if not holds:
        raise BadSetting(f"{name}={value} is not allowed; it must be {allowed}")
