"""Pictures of a posterior itself: what the data determine, and how (N, λ) were found. Offered by ``plots`` too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from laplace_kf.reports.environment import missing_extra
from laplace_kf.reports.style import BAND, GRID, INK, SOFT, legend_below, panels, target_axes

try:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing_extra(error.name) from error

if TYPE_CHECKING:
    from laplace_kf.posterior.summary import BlockRow
    from laplace_kf.posterior.tuning import TuningResult

__all__ = ["effective_parameters", "tuning_map"]


def effective_parameters(summary: Sequence[BlockRow]) -> Figure:
    """How much of each block the data determine: its effective over its number of parameters, as bars.

    Args:
        summary: ``posterior.summary()``.

    Returns:
        The figure, as high as there are blocks.
    """
    figure, (axis,) = panels(1, 1, width=6.4, height=1.1 + 0.36 * len(summary))
    rows = range(len(summary))
    shares = [row.effective / row.size for row in summary]
    axis.barh(rows, [1.0] * len(summary), color=GRID, height=0.62)
    axis.barh(rows, shares, color=BAND, height=0.62)
    for k, row in enumerate(summary):
        axis.text(1.015, k, f"{row.effective:,.1f} of {row.size:,}", va="center", fontsize=9, color=SOFT)
    axis.set_yticks(rows, [row.name or "(root)" for row in summary])
    axis.set(xlim=(0, 1), ylim=(len(summary) - 0.4, -0.6))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0, colors=INK)
    axis.set_xlabel("share of the parameters that the data determine", color=INK)
    axis.set_ylabel("block", color=INK)
    return figure


def tuning_map(result: TuningResult) -> Figure:
    """The objective of a search over (N, λ) as a map; a ring marks the best point.

    Args:
        result: what ``posterior.tune`` returned, with one λ for all blocks: a grid with at least two values on either
            axis is drawn as cells, the points of any other search as dots.

    Returns:
        The figure. The scale ends where the objective is five times as far from the best value as the median is, so
        that hopeless corners do not wash out the rest.
    """
    counts = sorted({row["n_data"] for row in result.table})
    priors = sorted({row["prior_precision"] for row in result.table})
    found = {(row["n_data"], row["prior_precision"]): row["objective"] for row in result.table}
    gridded = len(found) == len(counts) * len(priors) and min(len(counts), len(priors)) > 1
    places = [[(n, p) for n in counts] for p in priors] if gridded else [list(found)]
    values = torch.tensor([[found[place] for place in row] for row in places], dtype=torch.float64)
    finite = values[torch.isfinite(values)]
    best = float(finite.min())
    top = min(float(finite.max()), best + 5 * max(float(finite.median()) - best, 1e-12))
    figure, axis = target_axes(None)
    axis.grid(False)
    colours = LinearSegmentedColormap.from_list("objective", ["#08306b", "#3182bd", "#9ecae1", "#f7fbff"])
    shades = colours.with_extremes(bad="#ffffff")
    shown = values.clamp(max=top)
    if gridded:
        edges = [_edges(axis_values) for axis_values in (counts, priors)]
        image: ScalarMappable = axis.pcolormesh(*edges, shown.tolist(), cmap=shades, vmin=best, vmax=top)
    else:
        x, y = zip(*places[0], strict=True)
        image = axis.scatter(x, y, c=shown[0].tolist(), s=60, cmap=shades, vmin=best, vmax=top)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.scatter(
        [result.best["n_data"]], [result.best["prior_precision"]], s=90, facecolors="none", edgecolors="#e69f00",
        linewidths=2.2, label=f"best: {result.best['objective']:.4g}", clip_on=False,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axis, pad=0.02, extend="max" if float(finite.max()) > top else "neither")
    bar.outline.set_visible(False)
    bar.set_label(f"{result.objective} (lower is better)", color=INK)
    bar.ax.tick_params(colors=SOFT, labelsize=9)
    axis.set_xlabel("data count N", color=INK)
    axis.set_ylabel("prior precision λ", color=INK)
    legend_below(figure)
    return figure


def _edges(values: Sequence[float]) -> list[float]:
    """Cell borders half way between neighbours on a logarithmic scale."""
    logs = [math.log(value) for value in values]
    half = [(b - a) / 2 for a, b in pairwise(logs)] or [0.5]
    inner = [a + step for a, step in zip(logs[:-1], half, strict=False)]
    return [math.exp(value) for value in (logs[0] - half[0], *inner, logs[-1] + half[-1])]
