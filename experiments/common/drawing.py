"""Plain line pictures and grey pictures of matrices for the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from laplace_kf.reports import plots
from laplace_kf.reports.html import Picture

__all__ = ["lines", "matrices"]


def lines(
    name: str,
    caption: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: tuple[str, str],
    scales: tuple[str, str] = ("linear", "linear"),
) -> Picture:
    """Curves by label, each ``(x, y)``."""
    figure, (axis,) = plots.panels(1, 1, width=6.4, height=4.2)
    for label, (x, y) in curves.items():
        axis.plot(list(x), list(y), ".-", label=label)
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale=scales[0], yscale=scales[1])
    axis.legend(fontsize="small")
    return Picture(name, figure, caption)


def matrices(name: str, caption: str, shown: Mapping[str, Tensor], limit: float | None = None) -> Picture:
    """Absolute values of matrices by title, white at ``limit`` (default: the 99 % quantile of the first)."""
    figure, axes = plots.panels(1, len(shown), width=3.4, height=3.6)
    for axis, (title, matrix) in zip(axes, shown.items(), strict=True):
        top = limit if limit is not None else float(next(iter(shown.values())).abs().flatten().float().sort()[0][
            int(0.99 * next(iter(shown.values())).numel()) - 1])  # fmt: skip
        axis.imshow(matrix.abs().float().numpy(), cmap="gray", vmin=0, vmax=top or None, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=title)
    return Picture(name, figure, caption)
