"""Results whose entries are read by key or by attribute."""

from __future__ import annotations

from typing import Any

__all__ = ["Record"]


class Record(dict[str, Any]):
    """A dictionary whose entries are attributes, too: ``found["0"].relative`` or ``found["0"]["relative"]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}; there are {', '.join(map(repr, self))}") from None
