"""Pictures of predictive uncertainty, as :class:`matplotlib.figure.Figure` objects.

No pyplot: nothing global is touched, no window opens, and a figure is freed with its last reference. A label such as
``"Kronecker, tuned"`` is a method and a variant: the method decides the colour, the same in every picture, and the
variant ``untuned`` is dashed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports import missing_extra

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing_extra(error.name) from error

__all__ = ["colour", "inverse_entropy_cdf", "legend_below", "panels", "reliability_diagram"]

INK, SOFT, GRID, GAP = "#1c2430", "#5b6675", "#e3e7ec", "#c23b22"
COLOURS = {
    "MAP": "#1c2430",
    "MC dropout": "#e08e0b",
    "diagonal": "#8a63c9",
    "Kronecker": "#0b62a3",
    "full last layer": "#1a9c74",
    "mean field": "#c8417a",
}
SPARE = ("#b0492c", "#4fb3d9", "#7a8b22", "#9a6b4b", "#6c7a89")
"""Colours for methods without one of their own, in order of appearance."""
RELIABILITY_KEY = (
    "Bars: accuracy by confidence; red: the gap to the diagonal, on which a calibrated model lies. Both are darker "
    "where there are more inputs."
)
"""How to read a reliability diagram, for captions."""


def colour(label: str, labels: Sequence[str] = ()) -> str:
    """The colour of a label's method (the part before a comma); methods without one get a spare by their order."""
    method = _method(label)
    if method in COLOURS:
        return COLOURS[method]
    others = list(dict.fromkeys(_method(other) for other in (*labels, label)))
    others = [other for other in others if other not in COLOURS]
    return SPARE[others.index(method) % len(SPARE)]


def panels(rows: int, columns: int, *, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """An empty figure with ``rows x columns`` styled axes of ``width x height`` inches each, listed row by row."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=SOFT, labelsize=9, length=3)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(SOFT)
    return figure, axes


def inverse_entropy_cdf(
    entropies: Mapping[str, Tensor],
    *,
    axis: Axes | None = None,
    title: str = "",
    classes: int | None = None,
) -> Figure:
    """Fraction of inputs whose predictive entropy is above a value, one curve per method (methods 10.2).

    Args:
        entropies: ``{label: (N,) entropies in nats}``.
        axis: where to draw, without a legend (see :func:`legend_below`); a figure of its own, with one, by default.
        title: what the inputs are.
        classes: number of classes ``C``; marks the largest possible entropy ``log C``.

    Returns:
        The figure that was drawn on.

    Raises:
        ShapeMismatch: if entropies are not a non-empty vector.
    """
    alone = axis is None
    figure, axis = _target(axis)
    top = math.log(classes) if classes else max(float(values.max()) for values in entropies.values())
    for label, values in entropies.items():
        if values.ndim != 1 or not len(values):
            raise ShapeMismatch(f"Expected entropies (N,) of {label!r} with N >= 1, got shape {tuple(values.shape)}.")
        edge = torch.cat([torch.zeros(1).to(values), values.sort().values.clamp_min(0), torch.tensor([top]).to(values)])
        above = torch.cat([torch.ones(1), 1 - torch.arange(1, len(values) + 1) / len(values), torch.zeros(1)])
        axis.step(edge.tolist(), above.tolist(), where="post", label=label, **_line(label, list(entropies)))
    axis.set(xlim=(0, top * 1.06), ylim=(0, 1.02))
    axis.set_xlabel("entropy threshold (nats)", color=INK)
    axis.set_ylabel("fraction of inputs above it", color=INK)
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    if classes:
        axis.axvline(top, color=SOFT, linewidth=1, linestyle=":")
        axis.text(
            top * 1.008, 0.5, f"uniform, ln {classes}", rotation=90, ha="left", va="center", fontsize=8, color=SOFT
        )
    if alone:
        legend_below(figure)
    return figure


def legend_below(figure: Figure, *, columns: int = 4) -> None:
    """One legend for all axes of a figure, under them, where it hides nothing."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(columns, len(entries)),
        frameon=False, fontsize=9.5, labelcolor=INK, handlelength=2.8,
    )  # fmt: skip


def reliability_diagram(
    predictions: Mapping[str, tuple[Tensor, Tensor]], *, bins: int = 15, columns: int = 4
) -> Figure:
    """Accuracy against confidence, one panel per method; a calibrated model lies on the diagonal.

    Bars are the accuracy of each non-empty bin of confidence (the largest probability); the line from a bar to the
    diagonal is the gap to the bin's mean confidence. Both are the more opaque the more inputs a bin holds. The expected
    calibration error in the corner is the mean gap, weighted by these counts.

    Args:
        predictions: ``{label: (probs (N, C), labels (N,))}``.
        bins: number of equal-width bins.
        columns: panels in a row.

    Returns:
        The figure.
    """
    rows = math.ceil(len(predictions) / columns)
    figure, axes = panels(rows, min(columns, len(predictions)), width=3.1, height=3.1)
    for axis in axes[len(predictions) :]:
        axis.set_visible(False)
    for axis, (label, (probs, labels)) in zip(axes, predictions.items(), strict=False):
        confidence, guess = probs.double().max(1)
        correct = (guess == labels).double()
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        count = torch.bincount(index, minlength=bins).double()
        filled = count > 0
        mean_confidence = torch.bincount(index, confidence, bins)[filled] / count[filled]
        accuracy = torch.bincount(index, correct, bins)[filled] / count[filled]
        share = count[filled] / count.sum()
        left = torch.arange(bins).double()[filled] / bins
        tone = colour(label, list(predictions))
        weights = (0.15 + 0.85 * share.sqrt()).tolist()
        fills, gaps = ([to_rgba(shade, weight) for weight in weights] for shade in (tone, GAP))
        axis.bar(left.tolist(), accuracy.tolist(), 1 / bins, align="edge", color=fills, edgecolor="white")
        height = mean_confidence.tolist()
        axis.vlines(height, accuracy.tolist(), height, colors=gaps, linewidth=1.8)
        axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
        error = float((share * (accuracy - mean_confidence).abs()).sum())
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        text = f"ECE {100 * error:.1f} %"
        axis.text(0.05, 0.95, text, transform=axis.transAxes, va="top", fontsize=10, color=INK, bbox=box)
        axis.set(xlim=(0, 1), ylim=(0, 1.0))
        axis.set_title(label, loc="left", fontsize=10.5, color=INK)
        axis.set_xlabel("confidence", color=INK)
        axis.set_ylabel("accuracy", color=INK)
    return figure


def _target(axis: Axes | None) -> tuple[Figure, Axes]:
    if axis is None:
        figure, (axis,) = panels(1, 1, width=6.4, height=4.2)
        return figure, axis
    owner = axis.get_figure(root=True)
    assert owner is not None  # it has one from the moment it is made until it is removed
    return owner, axis


def _method(label: str) -> str:
    return label.split(",")[0].strip()


def _line(label: str, labels: Sequence[str]) -> dict[str, Any]:
    dashed = label.endswith("untuned")
    return {
        "color": colour(label, labels),
        "linestyle": (0, (4, 2)) if dashed else "-",
        "linewidth": 1.3 if dashed else 2.0,
    }
