"""A finished run: its numbers, tables and pictures, and the three kinds of files they are written to.

``result.json`` for programs, PNG files for papers, ``report.html`` for people. The page holds everything itself:
pictures are inlined, there is no script and no reference to anything outside.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from laplace_kf.files import require_room, usable_path
from laplace_kf.reports import machine, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STYLE", "Picture", "Report", "Table"]

DPI = 150


@dataclass(frozen=True)
class Table:
    """A titled table of ready-to-print cells; columns but the first are right-aligned unless ``prose`` is set."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    prose: bool = False

    def text(self) -> str:
        """The table as aligned plain text, one line per row."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            sides = ["<" if self.prose or not i else ">" for i in range(len(cells))]
            padded = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True)]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        lines = [self.title, line(self.columns), rule, *map(line, self.rows)]
        return "\n".join([*lines, self.note] if self.note else lines)


@dataclass(frozen=True)
class Picture:
    """A figure and the sentence under it; ``name`` becomes the file name."""

    name: str
    figure: Figure
    caption: str

    def png(self) -> bytes:
        """The picture as PNG bytes (no time stamp or software version inside, so equal pictures are equal files)."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


@dataclass
class Report:
    """What an experiment hands back.

    Args:
        title: one line.
        summary: what was done and what came out, a paragraph of plain text.
        seed: the seed (the first one, if there are several).
        config: every setting, JSON-able.
        metrics: the numbers by method, JSON-able.
        tables: for people; the numbers in them are also in ``metrics``.
        pictures: written as PNG files and inlined in the page.
        details: further JSON-able entries of ``result.json`` (seeds, tuning tables, verdicts, stand-ins, ...).
        device: the torch device that was used.
    """

    title: str
    summary: str
    seed: int
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def result(self) -> dict[str, Any]:
        """The content of ``result.json``; numbers that are not finite become None (JSON has no NaN)."""
        result = {
            "title": self.title,
            "config": self.config,
            "seed": self.seed,
            "metrics": self.metrics,
            "versions": versions(),
            "machine": machine(self.device),
        }
        return _finite({**result, **self.details})

    def html(self) -> str:
        """The self-contained page; every text is escaped."""
        return self._with_pictures([picture.png() for picture in self.pictures])

    def _with_pictures(self, drawn: Sequence[bytes]) -> str:
        inlined = [base64.b64encode(png).decode("ascii") for png in drawn]
        pictures = [(picture.caption, png) for picture, png in zip(self.pictures, inlined, strict=True)]
        return _page().render(report=self, pictures=pictures, result=self.result(), style=STYLE)

    def save(self, out: Path) -> None:
        """Write the PNG files, ``report.html`` and, last, ``result.json`` into the folder ``out`` (made if needed).

        Raises:
            UnusableFile: if it is a file, or cannot be written into.
        """
        out = require_room(out)
        drawn = [picture.png() for picture in self.pictures]  # once, for the files and the page: seconds a picture
        page = self._with_pictures(drawn)
        text = json.dumps(self.result(), indent=2, allow_nan=False)
        with usable_path(out, "written into"):
            out.mkdir(parents=True, exist_ok=True)
            for picture, png in zip(self.pictures, drawn, strict=True):
                (out / f"{picture.name}.png").write_bytes(png)
            (out / "report.html").write_text(page, encoding="utf-8")
            (out / "result.json").write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE)


STYLE = """  :root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --back: #fff; --band: #f5f7fa; --mark: #0b62a3; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; color: var(--ink); background: var(--back);
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
  h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .75rem; }
  h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
  p { max-width: 46rem; margin: .5rem 0; }
  /* as wide as its table, from the text's width up to the window's, and centred: only beyond that it scrolls */
  .scroll { overflow-x: auto; width: max-content; min-width: 100%; max-width: calc(100vw - 3.5rem);
            margin-left: 50%; transform: translateX(-50%); }
  table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
  th, td { padding: .32rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
  th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; white-space: normal; }
  td:first-child { white-space: normal; min-width: 9rem; }
  th:first-child, td:first-child, .prose th, .prose td { text-align: left; }
  .prose td { white-space: normal; }
  tbody tr:nth-child(even) { background: var(--band); }
  .note, figcaption, footer { color: var(--soft); font-size: .875rem; }
  figure { margin: 1.2rem 0 2rem; }
  figure img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; background: #fff; }
  details { margin: .75rem 0; }
  summary { cursor: pointer; color: var(--mark); }
  pre { overflow-x: auto; background: var(--band); padding: .9rem 1rem; border-radius: 4px; font-size: .8rem; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; margin: .5rem 0; }
  dt { color: var(--soft); } dd { margin: 0; }
  footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; }
"""
"""The look of every page, as CSS."""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
{{ style|safe }}</style>
</head>
<body>
<h1>{{ report.title }}</h1>
<p>{{ report.summary }}</p>
{% for table in report.tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table{% if table.prose %} class="prose"{% endif %}>
<thead><tr>{% for cell in table.columns %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endfor %}
{% if pictures %}<h2>Pictures</h2>{% endif %}
{% for caption, data in pictures %}
<figure><img src="data:image/png;base64,{{ data }}" alt="{{ caption }}">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
<h2>How this was run</h2>
<dl>
{% for key, value in result.machine.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}
{% for key, value in result.versions.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}
<dt>seed</dt><dd>{{ report.seed }}</dd>
{% if result.wall_time_s is defined %}<dt>wall time</dt><dd>{{ "%.1f"|format(result.wall_time_s) }} s</dd>{% endif %}
</dl>
<details><summary>All settings</summary><pre>{{ result.config|tojson(indent=2) }}</pre></details>
<footer>The same numbers are in result.json beside this page.</footer>
</body>
</html>
"""
