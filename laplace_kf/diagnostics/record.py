"""Results whose entries are read by key or by attribute."""

from __future__ import annotations

from typing import Any

from laplace_kf.errors import UnknownAttribute

__all__ = ["Record"]


class Record(dict[str, Any]):
    """A dictionary whose entries are attributes, too: ``found["0"].relative`` or ``found["0"]["relative"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            why = f"no entry {name!r}; there are {', '.join(map(repr, self))}"
            raise UnknownAttribute(type(self), name, why=why) from None
