"""Pictures of predictive uncertainty, as :class:`matplotlib.figure.Figure` objects.

No pyplot: nothing global is touched, no window opens, and a figure is freed with its last reference. A label such as
``"Kronecker, tuned"`` is a method and a variant: the method decides the colour, the same in every picture, and the
variant ``untuned`` is dashed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports.environment import missing_extra
from laplace_kf.reports.posterior_plots import effective_parameters, tuning_map
from laplace_kf.reports.style import BAND, GAP, INK, SOFT, SPARE, colour, legend_below, line, panels, target_axes

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, to_rgba
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing_extra(error.name) from error

if TYPE_CHECKING:
    from laplace_kf.likelihoods import Prediction

__all__ = [
    "INK",
    "SOFT",
    "SPARE",
    "colour",
    "decision_map",
    "effective_parameters",
    "interval_calibration",
    "inverse_entropy_cdf",
    "legend_below",
    "panels",
    "regression_band",
    "reliability_diagram",
    "risk_coverage",
    "tuning_map",
]

RELIABILITY_KEY = (
    "Bars: accuracy by confidence; red: the gap to the diagonal, on which a calibrated model lies. Both are darker "
    "where there are more inputs."
)
"""How to read a reliability diagram, for captions."""
CLASSES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
"""Colours of classes (Okabe and Ito's, told apart with every common kind of colour blindness)."""


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
    figure, axis = target_axes(axis)
    top = math.log(classes) if classes else max(float(values.max()) for values in entropies.values())
    for label, values in entropies.items():
        if values.ndim != 1 or not len(values):
            raise ShapeMismatch(f"Expected entropies (N,) of {label!r} with N >= 1, got shape {tuple(values.shape)}.")
        edge = torch.cat([torch.zeros(1).to(values), values.sort().values.clamp_min(0), torch.tensor([top]).to(values)])
        above = torch.cat([torch.ones(1), 1 - torch.arange(1, len(values) + 1) / len(values), torch.zeros(1)])
        axis.step(edge.tolist(), above.tolist(), where="post", label=label, **line(label, list(entropies)))
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


def risk_coverage(
    predictions: Mapping[str, tuple[Tensor, Tensor]], *, axis: Axes | None = None, risk: str = "error rate"
) -> Figure:
    """Mean loss of the inputs that are kept when the least certain ones are handed to somebody else.

    Args:
        predictions: ``{label: (uncertainty (N,), loss (N,))}``; larger means less certain. The loss of a classifier is
            1 for a wrong prediction and 0 for a right one.
        axis: where to draw, without a legend; a figure of its own, with one, by default.
        risk: what the mean loss is called.

    Returns:
        The figure that was drawn on. Labels give the area under the curve (AURC) in thousandths.

    Raises:
        ShapeMismatch: if uncertainties and losses are not equally long non-empty vectors.
    """
    from laplace_kf.reports.metrics import risk_coverage as curve

    alone = axis is None
    figure, axis = target_axes(axis)
    highest = 0.0
    for label, (uncertainty, loss) in predictions.items():
        coverage, value = curve(uncertainty, loss)
        # the first few inputs make a curve jump between 0 and 1; that says nothing
        shown = coverage >= min(0.05, float(coverage[-1]) / 2)
        highest = max(highest, float(value[shown].max()))
        text = f"{label} (AURC {1000 * float(value.mean()):.3g} ‰)"
        style = line(label, list(predictions))
        axis.plot(coverage[shown].tolist(), value[shown].tolist(), label=text, **style)
    axis.set(xlim=(0, 1), ylim=(0, 1.08 * highest or 1.0))
    axis.set_xlabel("coverage (fraction of inputs kept, most certain first)", color=INK)
    axis.set_ylabel(f"{risk} of the inputs kept", color=INK)
    if alone:
        legend_below(figure, columns=2)
    return figure


def regression_band(
    x: Tensor,
    mean: Tensor,
    epistemic: Tensor,
    total: Tensor | None = None,
    *,
    points: tuple[Tensor, Tensor] | None = None,
    points_label: str = "training data",
    truth: Tensor | None = None,
    reference: Tensor | None = None,
    reference_label: str = "reference",
    axis: Axes | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
    labels: tuple[str, str] = ("input", "output"),
) -> Figure:
    """Predictive mean and bands over a one-dimensional input.

    Without ``total`` the bands are one and two epistemic standard deviations; with it, two epistemic ones (dark) inside
    two of the whole predictive distribution, noise included (light).

    Args:
        x: ``(M,)`` inputs, increasing.
        mean: ``(M,)`` predictive mean.
        epistemic: ``(M,)`` standard deviation of the sampled means.
        total: ``(M,)`` standard deviation of the prediction, noise included.
        points: data ``(x, y)``, each with N entries.
        points_label: what they are, for the legend.
        truth: ``(M,)`` noiseless function.
        reference: ``(M,)`` another mean, dotted.
        reference_label: its name in the legend.
        axis: where to draw, without a legend; a figure of its own, with one, by default.
        title: which method.
        limits: of the vertical axis.
        labels: of the axes, with units.

    Returns:
        The figure that was drawn on.

    Raises:
        ShapeMismatch: if the curves are not equally long vectors.
    """
    curves = {"mean": mean, "epistemic": epistemic, "total": total, "truth": truth, "reference": reference}
    for name, curve in curves.items():
        if curve is not None and (curve.shape != x.shape or x.dim() != 1):
            raise ShapeMismatch(f"Expected {name} (M,) like x, got {tuple(curve.shape)} and {tuple(x.shape)}.")
    alone = axis is None
    figure, axis = target_axes(axis)
    wide, narrow = (2 * epistemic, epistemic) if total is None else (2 * total, 2 * epistemic)
    names = (
        ("± 2 sd, epistemic", "± 1 sd, epistemic") if total is None else ("± 2 sd, noise included", "± 2 sd, epistemic")
    )
    for spread, name, alpha in ((wide, names[0], 0.18), (narrow, names[1], 0.32)):
        low, high = (mean - spread).tolist(), (mean + spread).tolist()
        axis.fill_between(x.tolist(), low, high, color=BAND, alpha=alpha, linewidth=0, label=name)
    axis.plot(x.tolist(), mean.tolist(), color=BAND, linewidth=2, label="predictive mean")
    if reference is not None:
        style = (0, (1, 1.3))
        axis.plot(x.tolist(), reference.tolist(), color=GAP, linewidth=1.6, linestyle=style, label=reference_label)
    if truth is not None:
        axis.plot(x.tolist(), truth.tolist(), color=INK, linewidth=1.1, linestyle=(0, (5, 2)), label="true function")
    if points is not None:
        xs, ys = (values.reshape(-1).tolist() for values in points)
        axis.scatter(xs, ys, s=13, color=INK, zorder=3, linewidths=0.6, edgecolors="white", label=points_label)
    axis.set_xlim(float(x[0]), float(x[-1]))
    if limits is not None:
        axis.set_ylim(*limits)
    axis.set_xlabel(labels[0], color=INK)
    axis.set_ylabel(labels[1], color=INK)
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    if alone:
        legend_below(figure, columns=3)
    return figure


def interval_calibration(predictions: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Figure:
    """How often targets fall into central predictive intervals, against how often they should (regression).

    Intervals are those of normal variables with the prediction's mean and variance. Below the diagonal a model is
    overconfident, above it underconfident.

    Args:
        predictions: ``{label: (mean, variance, targets)}``, each ``(N, C)``; all entries count alike.

    Returns:
        The figure.
    """
    figure, axis = target_axes(None)
    levels = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    width = torch.special.ndtri((1 + levels) / 2)
    axis.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":", label="calibrated")
    for label, (mean, variance, targets) in predictions.items():
        score = ((targets - mean).abs() / variance.sqrt()).double().reshape(-1)
        inside = (score[:, None] <= width).double().mean(0)
        axis.plot(levels.tolist(), inside.tolist(), label=label, **line(label, list(predictions)))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_xlabel("nominal probability of the central interval", color=INK)
    axis.set_ylabel("fraction of targets inside", color=INK)
    legend_below(figure)
    return figure


def decision_map(
    predict: Callable[[Tensor], Prediction],
    bounds: tuple[tuple[float, float], tuple[float, float]],
    *,
    points: tuple[Tensor, Tensor] | None = None,
    resolution: int = 100,
    value: str = "entropy",
    title: str = "",
    labels: tuple[str, str] = ("input 1", "input 2"),
    like: Tensor | None = None,
) -> Figure:
    """What a classifier of two inputs decides, and how uncertain it is, side by side.

    Left: the most probable class, the paler the less probable it is. Right: entropy or mutual information in nats.

    Args:
        predict: takes inputs ``(M, 2)``, gives a prediction with ``probs (M, C)``, for example ``posterior.predict``.
        bounds: range of either input.
        points: data ``(x (N, 2), y (N,))`` to show, coloured by class.
        resolution: grid points along each input.
        value: ``"entropy"`` or ``"mutual_information"``.
        title: which method.
        labels: of the axes.
        like: a tensor in the type and on the device that ``predict`` wants, of any shape.

    Returns:
        The figure.

    Raises:
        ShapeMismatch: if the prediction has no class probabilities ``(M, C)``.
    """
    (left, right), (bottom, top) = bounds
    xs, ys = torch.linspace(left, right, resolution), torch.linspace(bottom, top, resolution)
    inputs = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
    prediction = predict(inputs if like is None else inputs.to(like))
    probs = prediction.probs.detach().double().cpu()
    if probs.dim() != 2 or len(probs) != len(inputs):
        raise ShapeMismatch(f"Expected class probabilities ({len(inputs)}, C), got {tuple(probs.shape)}.")
    if probs.shape[1] == 1:
        probs = torch.cat([1 - probs, probs], 1)
    count = probs.shape[1]
    confidence, guess = probs.max(1)
    tones = torch.tensor([to_rgba(CLASSES[k % len(CLASSES)])[:3] for k in range(count)], dtype=torch.float64)
    share = ((confidence - 1 / count) / (1 - 1 / count))[:, None].clamp(0, 1)
    picture = (1 - share * 0.72) + share * 0.72 * tones[guess]
    uncertainty = getattr(prediction, value).detach().double().cpu()
    figure, (decision, doubt) = panels(1, 2, width=4.6, height=4.0)
    extent = (left, right, bottom, top)
    shape = (resolution, resolution)
    decision.imshow(picture.reshape(*shape, 3).tolist(), origin="lower", extent=extent, aspect="auto")
    shades = LinearSegmentedColormap.from_list("doubt", ["#ffffff", "#9ecae1", "#3182bd", "#08306b"])
    limit = math.log(count) if value == "entropy" else max(float(uncertainty.max()), 1e-12)
    image = doubt.imshow(
        uncertainty.reshape(shape).tolist(),
        origin="lower",
        extent=extent,
        aspect="auto",
        cmap=shades,
        vmin=0,
        vmax=limit,
    )
    bar = figure.colorbar(image, ax=doubt, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(f"{value.replace('_', ' ')} (nats)", color=INK)
    bar.ax.tick_params(colors=SOFT, labelsize=9)
    for axis, name in ((decision, "decision"), (doubt, "uncertainty")):
        axis.grid(False)
        if points is not None:
            for k in points[1].reshape(-1).long().unique().tolist():
                own = points[0][points[1].reshape(-1) == k]
                axis.scatter(
                    own[:, 0].tolist(), own[:, 1].tolist(), s=15, color=CLASSES[k % len(CLASSES)], edgecolors="white",
                    linewidths=0.6, label=f"class {k}",
                )  # fmt: skip
        axis.set(xlim=(left, right), ylim=(bottom, top))
        axis.set_xlabel(labels[0], color=INK)
        axis.set_ylabel(labels[1], color=INK)
        axis.set_title(f"{title}: {name}" if title else name, loc="left", fontsize=11, color=INK)
    if points is not None:
        legend_below(figure, columns=6)
    return figure
