"""Picture and table of the import ranks, made from the import contract in setup.cfg: ``python docs/ranks.py``.

A module imports only from ranks below its own. Modules of one rank stand side by side and do not import each other.
"""

from __future__ import annotations

import ast
import configparser
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "ranks.svg"
PAGE = ROOT / "docs" / "architecture.md"
TABLE = re.compile(r"(<!-- ranks: made by python docs/ranks.py -->\n).*?(<!-- end of ranks -->)", re.DOTALL)
WIDTH, ROW, BOX, GAP, MARGIN = 460, 34, 24, 12, 16


def ranks() -> list[list[str]]:
    """The modules of ``laplace_kf`` by rank, highest first."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["importlinter:contract:ranks"]["layers"].split("\n")
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def drawn(rows: list[list[str]]) -> str:
    """The picture as SVG text: one row a rank, folders in a darker shade than single files."""
    height = 2 * MARGIN + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="7" markerWidth="7" markerHeight="7">'
        '<path d="M0 0 L4 8 L8 0 Z" fill="#555555"/></marker></defs>',
        f'<line x1="{MARGIN + 8}" y1="{MARGIN}" x2="{MARGIN + 8}" y2="{height - MARGIN}" stroke="#555555" '
        'stroke-width="1.5" marker-end="url(#tip)"/>',
        f'<text x="{MARGIN + 18}" y="{height - MARGIN - 2}" fill="#555555" font-size="11">imports</text>',
    ]
    left = 90
    for number, names in enumerate(rows):
        top = MARGIN + number * ROW
        width = (WIDTH - left - MARGIN - GAP * (len(names) - 1)) / len(names)
        parts.append(
            f'<text x="{left - 14}" y="{top + 17}" text-anchor="end" fill="#777777" font-size="11">'
            f"{len(rows) - 1 - number}</text>"
        )
        for place, name in enumerate(names):
            x = left + place * (width + GAP)
            folder = (ROOT / "laplace_kf" / name).is_dir()
            shade, shown = ("#cfe0f3", f"{name}/") if folder else ("#eef2f6", f"{name}.py")
            parts.append(
                f'<rect x="{x:g}" y="{top}" width="{width:g}" height="{BOX}" rx="3" fill="{shade}" stroke="#8aa4c0"/>'
            )
            parts.append(f'<text x="{x + width / 2:g}" y="{top + 17}" text-anchor="middle">{escape(shown)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def described(name: str) -> str:
    """The first paragraph of a module's docstring, in one line."""
    path = ROOT / "laplace_kf" / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", lambda m: f"`{m[1] or m[2]}`", text).split()).replace(
        "|", "\\|"
    )


def table(rows: list[list[str]]) -> str:
    """What every module is about, highest rank first, as a markdown table."""
    lines = [
        f"| {len(rows) - 1 - k} | `{name}` | {described(name)} |" for k, names in enumerate(rows) for name in names
    ]
    return "\n".join(["| rank | module | what it is about |", "|---|---|---|", *lines, ""])


def with_table(page: str, rows: list[list[str]]) -> str:
    """The architecture page with a fresh table."""
    return TABLE.sub(lambda found: found[1] + table(rows) + found[2], page)


if __name__ == "__main__":
    PICTURE.write_text(drawn(ranks()), encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), ranks()), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)} and the table in {PAGE.relative_to(ROOT)}")
