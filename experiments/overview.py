"""All claims of the papers on one page: our number, the published one, the verdict, and the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from experiments.verdicts import FOLDED, VIEWS, counts, entries
from laplace_kf.reports.html import STYLE

__all__ = ["page", "write"]


def write(folder: Path, pictures: Mapping[str, Sequence[str]]) -> Path:
    """Writes ``index.html`` into the folder of result files and returns its path; see :func:`page`."""
    target = folder / "index.html"
    target.write_text(page(folder, pictures), encoding="utf-8")
    return target


def page(folder: Path, pictures: Mapping[str, Sequence[str]]) -> str:
    """The page as HTML; every text is escaped, pictures are those of ``docs/pictures``.

    Args:
        folder: that holds the result files.
        pictures: by name of a result file, addresses of its pictures as seen from ``folder``.
    """
    found = list(entries(folder))
    total = counts([verdict for entry in found for verdict in entry.verdicts if entry.id not in VIEWS])
    drawn = {entry.id: pictures.get(FOLDED.get(entry.id, entry.id), ()) for entry in found}
    files = {entry.id: f"{FOLDED.get(entry.id, entry.id)}.json" for entry in found}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE)
    return template.render(
        entries=found, total=total, counts=counts, pictures=drawn, files=files, views=VIEWS, style=STYLE
    )


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The claims of the papers, run and judged</title>
<style>
{{ style|safe }}
  .confirmed { color: #14724f; font-weight: 600; } .refuted { color: #b3261e; font-weight: 600; }
  .not { color: var(--soft); font-weight: 600; }
  h2 small { font-weight: 400; color: var(--soft); }
  code { background: var(--band); padding: .1rem .35rem; border-radius: 3px; font-size: .85rem; }
  @media (max-width: 40rem) { .scroll { margin-left: 0; transform: none; max-width: 100%; } }
</style>
</head>
<body>
<h1>The claims of the papers, run and judged</h1>
<p>{{ total }}. Verdicts are on the runs that are shown, most of them much smaller than the published ones, as their
size says. Made by <code>python -m experiments report</code> from the result files beside this page.</p>
<div class="scroll"><table class="prose">
<thead><tr><th>id</th><th>experiment</th><th>claims</th></tr></thead>
<tbody>
{% for entry in entries %}
<tr><td><a href="#{{ entry.id }}">{{ entry.id }}</a></td><td>{{ entry.title }}</td>
<td>{{ counts(entry.verdicts) if entry.result else "not run" }}</td></tr>
{% endfor %}
</tbody></table></div>
{% for entry in entries %}
<h2 id="{{ entry.id }}">{{ entry.id }} <small>{{ entry.title }}</small></h2>
{% if not entry.result %}
<p>Not run at a size worth keeping.</p>
{% else %}
{% if entry.id in views %}<p>Rows of <a href="#E14">E14</a>'s table, on the same runs.</p>{% endif %}
<p>{{ entry.size }}</p>
{% if entry.verdicts %}
<div class="scroll"><table class="prose">
<thead><tr><th>claim</th><th>here</th><th>published</th><th>verdict</th><th>seeds</th></tr></thead>
<tbody>
{% for v in entry.verdicts %}
<tr><td>{{ v.claim }}</td><td>{{ v.here }}</td><td>{{ v.published or "–" }}</td>
<td><span class="{{ v.verdict.split()[0] }}">{{ v.verdict }}</span>{{ ": " ~ v.why if v.why }}</td>
<td>{{ v.seeds }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>No claim was judged.</p>
{% endif %}
{% if entry.id not in views %}
{% for picture in pictures[entry.id] %}
<figure><img src="{{ picture }}" alt="{{ entry.title }}" loading="lazy"></figure>
{% endfor %}
{% endif %}
<p class="note"><code>{{ entry.command }}</code>; {{ entry.seeds }} seed{{ "s" if entry.seeds > 1 }},
{{ "%.1f"|format(entry.result.wall_time_s / 60) }} minutes; {{ entry.result.machine.cpu }},
{{ entry.result.machine.cores }} cores, torch {{ entry.result.versions.torch }};
<a href="{{ files[entry.id] }}">all numbers</a></p>
{% endif %}
{% endfor %}
</body>
</html>
"""
