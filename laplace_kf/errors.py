"""Typed errors: every refusal says what was given, what is allowed and what to do.

All derive from :class:`LaplaceKFError`, so ``except lk.errors.LaplaceKFError`` catches everything the package
raises on purpose.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CorruptFile",
    "IncompatiblePair",
    "LaplaceKFError",
    "NonFinite",
    "NotFitted",
    "NotPositiveDefinite",
    "ShapeMismatch",
    "UnknownName",
    "UnsupportedLayer",
]


class LaplaceKFError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnsupportedLayer(LaplaceKFError):
    """A selected parameter, or the way a module uses it, that no rule covers; names the module path and a way out."""


class UnknownName(LaplaceKFError, ValueError):
    """A name that is not registered; lists the registered names and the nearest one."""

    def __init__(self, kind: str, name: object, allowed: Iterable[str]) -> None:
        self.kind, self.name, self.allowed = kind, name, tuple(sorted(allowed))
        near = difflib.get_close_matches(str(name), self.allowed, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"Unknown {kind} {name!r}; registered: {', '.join(map(repr, self.allowed))}.{hint}")


class IncompatiblePair(LaplaceKFError, ValueError):
    """Two choices that are each valid but do not work together; says which pair and what to use instead."""


class NotFitted(LaplaceKFError, RuntimeError):
    """Something that needs a fitted posterior was called before ``fit``."""


class NotPositiveDefinite(LaplaceKFError, ArithmeticError):
    """A matrix that has to be positive definite is not; names the block, its smallest eigenvalue and the knob."""

    def __init__(self, block: str, smallest: float, advice: str) -> None:
        self.block, self.smallest = block, smallest
        super().__init__(
            f"The precision of block {block!r} is not positive definite (smallest eigenvalue {smallest:.3g}). {advice}"
        )


class NonFinite(LaplaceKFError, ArithmeticError):
    """NaN or infinity in data, outputs, curvature or factors; says which batch (by index) and which tensor."""


class ShapeMismatch(LaplaceKFError, ValueError):
    """Shapes that do not fit each other; gives both shapes and what was expected."""


class CorruptFile(LaplaceKFError, OSError):
    """A file that is truncated, altered or not one of ours."""
