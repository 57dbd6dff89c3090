"""How every picture looks: colours by method, axes, legends. Figures are made without pyplot.

No pyplot: nothing global is touched, no window opens, and a figure is freed with its last reference. A label such as
``"Kronecker, tuned"`` is a method and a variant: the method decides the colour, the same in every picture, and the
variant ``untuned`` is dashed. Colours are told apart with the common kinds of colour blindness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace_kf.reports.environment import missing_extra

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing_extra(error.name) from error

__all__ = ["colour", "legend_below", "line", "panels", "style_axes", "target_axes"]

INK, SOFT, GRID, GAP, BAND = "#1c2430", "#5b6675", "#e3e7ec", "#c23b22", "#0b62a3"
COLOURS = {
    "MAP": "#1c2430",
    "MC dropout": "#e08e0b",
    "diagonal": "#8a63c9",
    "Kronecker": "#0b62a3",
    "full last layer": "#1a9c74",
    "full": "#1a9c74",
    "HMC": "#b0492c",
    "posterior": "#0b62a3",
    "mean field": "#c8417a",
}
SPARE = ("#4fb3d9", "#7a8b22", "#9a6b4b", "#6c7a89", "#b0492c")
"""Colours for methods without one of their own, in order of appearance."""


def colour(label: str, labels: Sequence[str] = ()) -> str:
    """The colour of a label's method (the part before a comma); methods without one get a spare by their order."""
    method = method_of(label)
    if method in COLOURS:
        return COLOURS[method]
    others = list(dict.fromkeys(method_of(other) for other in (*labels, label)))
    others = [other for other in others if other not in COLOURS]
    return SPARE[others.index(method) % len(SPARE)]


def panels(rows: int, columns: int, *, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """An empty figure with ``rows x columns`` styled axes of ``width x height`` inches each, listed row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes:
        style_axes(axis)
    return figure, axes


def style_axes(axis: Axes, *, grid: bool = True) -> None:
    """Light grid (unless ``grid`` is False), no box, small grey ticks."""
    if grid:
        axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=9, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)


LETTER, HANDLE = 0.075, 0.65
"""Inches that a letter of a legend takes, and what stands before and after a label."""


def legend_below(figure: Figure, *, columns: int = 4) -> None:
    """One legend for all axes of a figure, under them, where it hides nothing; in fewer columns if labels are long."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    widest = HANDLE + LETTER * max(map(len, entries), default=0)
    columns = max(1, min(columns, len(entries), int(figure.get_figwidth() / widest)))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns,
        frameon=False, fontsize=9.5, labelcolor=INK, handlelength=2.8,
    )  # fmt: skip


def target_axes(axis: Axes | None) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure; new ones if there are none."""
    if axis is None:
        figure, (axis,) = panels(1, 1, width=6.4, height=4.2)
        return figure, axis
    owner = axis.get_figure(root=True)
    assert owner is not None  # it has one from the moment it is made until it is removed
    return owner, axis


def method_of(label: str) -> str:
    """The method of a label: the part before a comma."""
    return label.split(",")[0].strip()


DASHES = "-", (0, (4, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5))


def line(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Colour, dash and width of a label's curve, as matplotlib's keyword arguments.

    Of labels that share a colour, the second and third have dashes of their own; untuned ones are thin.
    """
    thin, shade = label.endswith("untuned"), colour(label, labels)
    alike = [other for other in dict.fromkeys((*labels, label)) if colour(other, labels) == shade]
    if method_of(label) in COLOURS:  # the first untuned one is dashed, the first of the others is not
        alike = [other for other in alike if other.endswith("untuned") == thin]
        place = alike.index(label) + 1 if alike.index(label) else int(thin)
    else:
        place = alike.index(label)
    return {"color": shade, "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.3 if thin else 2.0}
