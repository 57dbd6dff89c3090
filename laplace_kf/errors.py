"""Typed errors: every refusal says what was given, what is allowed and what to do.

All derive from :class:`LaplaceKFError`, so ``except lk.errors.LaplaceKFError`` catches everything the package
raises on purpose.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from laplace_kf.neighbour_members import member
from laplace_kf.neighbours import ELSEWHERE, instead, meanings, number_instead

__all__ = [
    "CorruptFile",
    "DistributedFailure",
    "IncompatiblePair",
    "InvalidArgument",
    "InvalidTarget",
    "InvalidType",
    "LaplaceKFError",
    "MissingFile",
    "MissingPackage",
    "NonFinite",
    "NotFitted",
    "NotPositiveDefinite",
    "ShapeMismatch",
    "UnknownAttribute",
    "UnknownName",
    "UnknownOption",
    "UnsupportedLayer",
    "UnusableFile",
]


def nearest(name: object, allowed: Iterable[str]) -> str | None:
    """The allowed name that is meant by another one: what neighbours call so, else the most similar."""
    allowed = tuple(allowed)
    word = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    for known in meanings(word):
        if known in allowed:
            return known
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.4)
    return near[0] if near else None


class LaplaceKFError(Exception):
    """Base class of every error that this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are of the finished message, so that errors come back from worker processes whole."""
        kept = {name: value for name, value in vars(self).items() if isinstance(value, (str, int, float, tuple))}
        return _again, (type(self), self.args), kept


def _again(kind: type[LaplaceKFError], args: tuple[Any, ...]) -> LaplaceKFError:
    made = kind.__new__(kind, *args)
    made.args = args
    return made


class UnsupportedLayer(LaplaceKFError):
    """A selected parameter, or the way a module uses it, that no rule covers; names the module path and a way out."""


class UnknownName(LaplaceKFError, ValueError):
    """A name that is not registered; lists the registered names and the nearest one, or says what to write instead."""

    def __init__(self, kind: str, name: object, allowed: Iterable[str], instead: str = "") -> None:
        self.kind, self.name, self.allowed = kind, name, tuple(sorted(allowed))
        here = isinstance(name, str) and any(known in self.allowed for known in meanings(name))
        other = ELSEWHERE.get(name.lower()) if isinstance(name, str) and not here else None
        near = None if other else nearest(name, self.allowed)
        hint = f" Did you mean {other or repr(near)}?" if other or near else ""
        line = instead or number_instead(kind, name)
        hint = f" Use {line}." if line else hint
        super().__init__(f"Unknown {kind} {name!r}; registered: {', '.join(map(repr, self.allowed))}.{hint}")


class UnknownAttribute(LaplaceKFError, AttributeError):
    """An attribute that an object does not have; says what to write instead, if that is known, else the nearest one.

    Args:
        owner: the object's class, or a module.
        name: the attribute's.
        kind: which table of :mod:`laplace_kf.neighbour_members` knows what it is called elsewhere.
        why: all that there is to say, where that is known better.
    """

    def __init__(self, owner: type | ModuleType, name: str, kind: str = "", why: str | None = None) -> None:
        self.owner, self.attribute = owner.__name__, name
        line = member(kind, name)
        near = None if line else nearest(name, (other for other in dir(owner) if not other.startswith("_")))
        hint = f". Use {line}" if line else f". Did you mean .{near}?" if near else ""
        super().__init__(why or f"{owner.__name__} has no attribute {name!r}{hint}")


class UnknownOption(LaplaceKFError, TypeError):
    """An argument that nothing takes; says what takes what is meant by it, if that is known, else the nearest one.

    Args:
        name: the argument's.
        taken: by whom it is not taken, in words: the rest of "option 'x' ...".
        allowed: names of the arguments that are.
        value: what was given for it.
        meant: what to use instead, where that is known better than by :func:`laplace_kf.neighbours.instead`.
    """

    def __init__(
        self, name: str, taken: str, allowed: Iterable[str], value: object = None, meant: str | None = None
    ) -> None:
        self.name, self.taken, self.value, self.allowed = name, taken, value, tuple(sorted(allowed))
        line = meant or instead(name, value, self.allowed)
        near = nearest(name, self.allowed) if line is None else None
        hint = f" Use {line}." if line else f" Did you mean {near}=?" if near else ""
        super().__init__(f"option {name!r} {taken}.{hint}")


class InvalidArgument(LaplaceKFError, ValueError):
    """A number or choice that cannot be; says which argument, what was given and what is allowed."""


class InvalidType(LaplaceKFError, TypeError):
    """An argument of another kind than is needed; says which one, what was given and what is allowed."""


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


class InvalidTarget(LaplaceKFError, ValueError):
    """A target, a class probability or a weight of an example that cannot be: says which one, and what is allowed."""


class DistributedFailure(LaplaceKFError, RuntimeError):
    """Another process of the group failed, died or did something else; says which one, at what, and what it said."""


class MissingPackage(LaplaceKFError, ImportError):
    """An optional package that is not installed; names it and the command that installs it."""


class UnusableFile(LaplaceKFError, OSError):
    """A path that cannot be read or written: a folder, no permission, a full disk; names it, and what to do."""


class MissingFile(UnusableFile, FileNotFoundError):
    """No such file, or no folder to write into; names the path, and the line that makes it."""


class CorruptFile(LaplaceKFError, OSError):
    """A file that is truncated, altered or not one of ours."""
