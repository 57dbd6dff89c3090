"""Names → rules. One registry per kind of thing; a new likelihood, estimator or structure is one decorated file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from laplace_kf.errors import UnknownName

T = TypeVar("T")

AUTO = "auto"
"""What an option is set to where the package chooses."""

__all__ = ["AUTO", "Registry"]


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping from registered names to rules, filled by the :meth:`register` decorator.

    Args:
        kind: what the entries are, in the singular; used in messages ("likelihood", "estimator", ...).

    Raises:
        UnknownName: on a look-up of a name that is not registered (lists the names and the nearest).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores what it decorates under ``name`` and returns it unchanged."""

        def store(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice; give the second one another name")
            self._entries[name] = entry
            return entry

        return store

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
