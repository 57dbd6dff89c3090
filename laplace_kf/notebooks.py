"""How objects show themselves: a call that reads like the one that made them, and tables for notebooks.

The HTML holds everything itself and takes the page's own fonts and colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["as_call", "html_table"]

LEFT = ' style="text-align:left"'


def as_call(one: object, options: Mapping[str, Any]) -> str:
    """An object as a call of its class with these arguments by name."""
    return f"{type(one).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), last: bool = False
) -> str:
    """A table for ``_repr_html_``; all text is escaped.

    Args:
        title: above it.
        columns: heads.
        rows: cells as text, as many as heads in each.
        notes: lines below it.
        last: whether the last row is a total, which is set off.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{LEFT}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [line(row, "th" if last and row is rows[-1] else "td") for row in rows]
    below = "".join(f"<br><small>{escape(note)}</small>" for note in notes)
    return (
        f"<div><strong>{escape(title)}</strong><table><thead>{line(columns, 'th')}</thead>"
        f"<tbody>{''.join(body)}</tbody></table>{below}</div>"
    )
