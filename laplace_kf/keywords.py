"""Keyword arguments that a public call does not have: refused with what other libraries' names for them are here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from laplace_kf.errors import InvalidType, UnknownOption

__all__ = ["explained"]

T = TypeVar("T", bound=Callable[..., Any])


def explained(what: T) -> T:
    """A function, or a class with all its public methods, whose unknown keyword arguments are explained.

    Those that take any keyword (``**options``) hand them on to somebody who refuses them.

    Args:
        what: a function or a class; of a class what it defines itself, not what it inherits.

    Raises:
        UnknownOption: by the calls that are returned; a ``TypeError``, as Python's own.
    """
    if not isinstance(what, type):
        return _explained(what, what.__name__)  # type: ignore[return-value]
    for name, entry in list(vars(what).items()):
        if name.startswith("_") and name != "__init__":
            continue
        called = what.__name__ if name == "__init__" else name
        if isinstance(entry, (classmethod, staticmethod)):
            setattr(what, name, type(entry)(_explained(entry.__func__, called)))
        elif inspect.isfunction(entry):
            setattr(what, name, _explained(entry, called))
    return what


def _explained(call: Callable[..., Any], called: str) -> Callable[..., Any]:
    parameters = inspect.signature(call).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return call
    taken = frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))

    @functools.wraps(call)
    def explained_call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= taken:
            name = next(n for n in kwargs if n not in taken)
            names = [p.name for p in parameters if p.name in taken and p.name not in ("self", "cls")]
            said = f"is not taken by {called} (arguments: {', '.join(names) or 'none'})"
            raise UnknownOption(name, said, names, kwargs[name])
        if isinstance(kwargs.get("generator"), int):
            raise InvalidType(
                f"generator must be a torch.Generator, and {called} was given {kwargs['generator']!r}: "
                f"generator=torch.Generator().manual_seed({int(kwargs['generator'])})"
            )
        return call(*args, **kwargs)

    return explained_call
