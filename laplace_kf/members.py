"""Attributes that an object does not have: refused with the line to write instead, where other libraries have them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from laplace_kf.errors import UnknownAttribute

__all__ = ["Members"]


class Members:
    """A class whose missing attributes are explained, by the names that other libraries have for them.

    Attributes:
        called: what kind of object it is, a table of :mod:`laplace_kf.neighbour_members`.
    """

    called: ClassVar[str] = ""

    if not TYPE_CHECKING:  # a type checker should go on knowing which attributes there are

        def __getattr__(self, name: str) -> Any:
            own = inspect.getattr_static(type(self), name, None)
            if hasattr(own, "__get__"):  # it failed inside: once more, for its own error
                return own.__get__(self, type(self))
            if name.startswith("_"):  # what Python itself looks for
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise UnknownAttribute(type(self), name, self.called)
