"""What the Shakespeare tutorial makes of its predictions: metrics, claims, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.common.claims import Claim
from laplace_kf.reports import metrics, plots
from laplace_kf.reports.html import Picture, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CLAIMS", "Reading", "measure", "methods_table", "pictures", "texts_table", "tuning_table"]

KNOWN = "Shakespeare"
"""The text that is like the training text; every other one is to be told from it."""

ROUNDING = 1e-4
"""Mutual informations in nats that single precision makes of nothing."""


@dataclass(frozen=True)
class Reading:
    """What one method says about one text, character by character.

    Args:
        inputs: characters ``(N, T)``.
        targets: those that follow, ``(N, T)``.
        probs: predicted probabilities ``(N, T, C)``.
        entropy: their entropy ``(N, T)`` in nats.
        information: mutual information of character and weights ``(N, T)`` in nats; zero for a point estimate.
    """

    inputs: Tensor
    targets: Tensor
    probs: Tensor
    entropy: Tensor
    information: Tensor

    def scores(self, burn_in: int) -> dict[str, Tensor]:
        """The scores ``(N, T - burn_in)`` that may tell texts apart, by name; one that is zero is left out."""
        scores = {"entropy": self.entropy[:, burn_in:], "information": self.information[:, burn_in:]}
        return {name: values for name, values in scores.items() if float(values.max()) > ROUNDING}


def measure(readings: Mapping[str, Reading], burn_in: int) -> dict[str, float]:
    """The metrics of one method: quality on the known text; mean scores of every text; AUROC of every other text.

    AUROC is by single character and by the mean score of a window.
    """
    known = readings[KNOWN]
    probs, targets = known.probs[:, burn_in:].flatten(0, 1), known.targets[:, burn_in:].flatten()
    found = metrics.classification(probs, targets)
    found["bits"] = found["nll"] / math.log(2)
    inside = known.scores(burn_in)
    for title, reading in readings.items():
        hit = reading.probs[:, burn_in:].gather(-1, reading.targets[:, burn_in:, None]).clamp_min(1e-30)
        found[f"bits_{title}"] = float(-hit.log2().mean())
        for name, values in reading.scores(burn_in).items():
            found[f"{name}_{title}"] = float(values.mean())
            if title != KNOWN:
                by_character = metrics.out_of_distribution(inside[name].flatten(), values.flatten())
                by_window = metrics.out_of_distribution(inside[name].mean(1), values.mean(1))
                found[f"auroc_character_{name}_{title}"] = by_character["auroc"]
                found[f"auroc_window_{name}_{title}"] = by_window["auroc"]
    return found


ALL, LAST = "all weights", "last layer"
CLAIMS = (
    Claim("all weights: bits per character not above MAP's", "bits", ALL, "MAP", most=0.0),
    Claim("all weights: calibration error not above MAP's", "ece", ALL, "MAP", most=0.0),
    Claim("all weights: more mutual information on foreign text than on Shakespeare", "information_foreign", ALL, ALL,
          least=1e-12, other_metric="information_Shakespeare"),
    Claim("all weights: more mutual information on shuffled text than on Shakespeare", "information_shuffled", ALL, ALL,
          least=1e-12, other_metric="information_Shakespeare"),
    Claim("all weights: AUROC of foreign windows by mutual information at least MAP's by entropy",
          "auroc_window_information_foreign", ALL, "MAP", least=0.0, other_metric="auroc_window_entropy_foreign"),
    Claim("all weights: AUROC of foreign characters by mutual information at least MAP's by entropy",
          "auroc_character_information_foreign", ALL, "MAP", least=0.0, other_metric="auroc_character_entropy_foreign"),
    Claim("all weights: AUROC of shuffled characters by mutual information at least MAP's by entropy",
          "auroc_character_information_shuffled", ALL, "MAP", least=0.0,
          other_metric="auroc_character_entropy_shuffled"),
    Claim("all weights: AUROC of foreign characters by mutual information at least the last layer's",
          "auroc_character_information_foreign", ALL, LAST, least=0.0),
)  # fmt: skip

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]


def _cell(found: Mapping[str, Mapping[str, Any]], key: str, digits: int = 3, scale: float = 1) -> str:
    if key not in found:
        return ""
    return f"{scale * found[key]['mean']:.{digits}f} ± {scale * found[key]['std']:.{digits}f}"


def methods_table(summary: Summary) -> Table:
    """Quality on held-out Shakespeare, one row per method."""
    columns = [("bits per character", "bits", 4, 1), ("accuracy %", "accuracy", 2, 100), ("ECE %", "ece", 2, 100),
               ("Brier", "brier", 4, 1)]  # fmt: skip
    rows = [[name, *(_cell(found, key, digits, scale) for _, key, digits, scale in columns)]
            for name, found in summary.items()]  # fmt: skip
    return Table("Held-out Shakespeare", ["method", *(title for title, *_ in columns)], rows)


def texts_table(summary: Summary) -> Table:
    """Mean scores of every text and how well they tell it from Shakespeare, one row per method and score."""
    titles = [key.removeprefix("bits_") for key in next(iter(summary.values())) if key.startswith("bits_")]
    others = [title for title in titles if title != KNOWN]
    rows = [
        [f"{method}: {label}", *(_cell(found, f"{name}_{title}", 4) for title in titles),
         *(_cell(found, f"auroc_{unit}_{name}_{title}") for title in others for unit in ("character", "window"))]
        for method, found in summary.items()
        for name, label in (("entropy", "entropy"), ("information", "mutual information"))
        if f"{name}_{KNOWN}" in found
    ]  # fmt: skip
    head = [
        "method: score",
        *titles,
        *(f"AUROC {title}, {unit}s" for title in others for unit in ("character", "window")),
    ]
    return Table("Telling texts apart", head, rows, "Mean scores in nats per character. AUROC is against Shakespeare.")


def tuning_table(tuning: Mapping[str, Mapping[str, Mapping[str, Any]]], n_data: int) -> Table:
    """The ``(N, λ)`` that tuning chose, by seed and posterior; ``n_data`` is the number of training windows."""
    rows = [
        [seed, name, str(found["parameters"]), f"{found['best']['n_data'] / n_data:g}",
         f"{found['best']['prior_precision']:g}", f"{found['best']['objective']:.3f}",
         "yes" if found["at_edge"] else "no"]
        for seed, posteriors in tuning.items()
        for name, found in posteriors.items()
    ]  # fmt: skip
    columns = ["seed", "posterior over", "parameters", "N / real N", "λ", "validation NLL", "edge of grid"]
    return Table("Tuned settings", columns, rows, "NLL in nats per window.")


def pictures(readings: Mapping[str, Mapping[str, Reading]], alphabet: str, burn_in: int) -> list[Picture]:
    """A heat strip of a few windows by the last posterior's mutual information, and histograms over all windows."""
    name = list(readings)[-1]
    strip = _strips(readings[name], alphabet)
    return [
        Picture("characters", strip, f"Mutual information of the next character and the weights ({name}) as the "
                "colour behind that character: the darker, the less the network knows. Two windows of each text."),
        Picture("histograms", _histograms(readings, burn_in), "Mean score of a window, by text: the entropy of the "
                "network itself, and every posterior's mutual information."),
    ]  # fmt: skip


def _strips(readings: Mapping[str, Reading], alphabet: str, count: int = 2) -> Figure:
    figure, (axis,) = plots.panels(1, 1, width=11.5, height=0.36 * (count + 1) * len(readings) + 0.4)
    length = next(iter(readings.values())).inputs.shape[1]
    most = max(float(reading.information.flatten().quantile(0.98)) for reading in _few(readings, 16)) or 1.0
    row = 0
    for title, reading in readings.items():
        axis.text(0, row + 0.5, title, fontsize=10, color=plots.INK, va="center")
        row += 1
        for index in range(count):
            _strip(axis, row, reading.targets[index], reading.information[index] / most, alphabet)
            row += 1
    axis.set(xlim=(0, length), ylim=(row, 0))
    axis.set_axis_off()
    return figure


def _few(readings: Mapping[str, Reading], windows: int) -> list[Reading]:
    return [
        Reading(*(value[:windows] for value in (r.inputs, r.targets, r.probs, r.entropy, r.information)))
        for r in readings.values()
    ]


def _strip(axis: Axes, row: int, characters: Tensor, shade: Tensor, alphabet: str) -> None:
    axis.imshow(shade[None].clamp(0, 1).numpy(), cmap="Oranges", vmin=0, vmax=1.2, aspect="auto",
                extent=(0, len(characters), row + 1, row))  # fmt: skip
    for place, number in enumerate(characters.tolist()):
        letter = {"\n": "↵", " ": ""}.get(alphabet[number], alphabet[number])
        axis.text(place + 0.5, row + 0.5, letter, ha="center", va="center", fontsize=9, family="monospace",
                  color=plots.INK, parse_math=False)  # fmt: skip


def _histograms(readings: Mapping[str, Mapping[str, Reading]], burn_in: int) -> Figure:
    panels = {"MAP: entropy": ("MAP", "entropy")} if "MAP" in readings else {}
    panels |= {f"{name}: mutual information": (name, "information") for name in readings if name != "MAP"}
    figure, axes = plots.panels(1, len(panels), width=4.0, height=3.2)
    for axis, (title, (name, score)) in zip(axes, panels.items(), strict=True):
        values = {
            text: reading.scores(burn_in).get(score, torch.zeros(1, 1)).mean(1)
            for text, reading in readings[name].items()
        }
        everything = torch.cat(list(values.values()))
        edges = torch.linspace(float(everything.min()), float(everything.max()) + 1e-9, 31).tolist()
        for text, found in values.items():
            axis.hist(
                found.tolist(), bins=edges, density=True, alpha=0.55, label=text, color=plots.colour(text, list(values))
            )
        axis.set_title(title, fontsize=10.5, color=plots.INK)
        axis.set_xlabel("nats per character, mean of a window", fontsize=9, color=plots.SOFT)
        axis.set_yticks([])
    plots.legend_below(figure, columns=3)
    return figure
