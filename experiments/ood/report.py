"""What E20 makes of its predictions: metrics, claims, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.common.claims import Claim
from laplace_kf.reports import metrics, plots
from laplace_kf.reports.html import Picture, Table

__all__ = ["CLAIMS", "PUBLISHED", "Outcome", "measure", "methods_table", "pictures", "tuning_table"]

PUBLISHED = {
    "mean field": 0.9888, "MAP": 0.9886, "MC dropout": 0.9885, "diagonal, tuned": 0.9885, "Kronecker, tuned": 0.9880
}  # fmt: skip
"""Test accuracies of table 5.1: 250 epochs, 1000 draws per image, tuned."""
CERTAIN = 0.1
"""A prediction counts as certain when its entropy is below this many nats."""


@dataclass
class Outcome:
    """One repetition: probabilities on test images and letters, in this order, by method; how tuning went; times."""

    probs: dict[str, Tensor]
    settings: dict[str, dict[str, float]]
    tuning: dict[str, dict[str, Any]]
    labels: Tensor
    seconds: dict[str, float]


def measure(outcome: Outcome) -> dict[str, dict[str, float]]:
    """The metrics of every method of one repetition."""
    found = {}
    count = len(outcome.labels)
    for name, probs in outcome.probs.items():
        inside, outside = metrics.entropy(probs[:count]), metrics.entropy(probs[count:])
        found[name] = {
            **metrics.classification(probs[:count], outcome.labels),
            "entropy_in": float(inside.mean()),
            "entropy_out": float(outside.mean()),
            "certain_out": float((outside < CERTAIN).double().mean()),
            **metrics.out_of_distribution(inside, outside),
            **outcome.settings.get(name, {}),
        }
    return found


KRON, DIAG = "Kronecker, tuned", "diagonal, tuned"
TINY = 1e-12
CLAIMS = (
    Claim("accuracy of the tuned Kronecker posterior within 0.2 points of MAP", "accuracy", KRON, "MAP", -0.002, 0.002),
    Claim("its test NLL is not worse than MAP's", "nll", KRON, "MAP", most=0.0),
    Claim("its mean entropy on letters is above MAP's", "entropy_out", KRON, "MAP", least=TINY),
    Claim("and above the tuned diagonal posterior's", "entropy_out", KRON, DIAG, least=TINY),
    Claim("and above MC dropout's", "entropy_out", KRON, "MC dropout", least=TINY),
    Claim("its AUROC for letters is at least MAP's", "auroc", KRON, "MAP", least=0.0),
    Claim(
        "its share of certain predictions on letters is at most MC dropout's",
        "certain_out",
        KRON,
        "MC dropout",
        most=0.0,
    ),
    Claim("and at most the tuned diagonal posterior's", "certain_out", KRON, DIAG, most=0.0),
    Claim("and at most MAP's", "certain_out", KRON, "MAP", most=0.0),
    Claim("mean entropy on letters: tuned diagonal at least MAP's", "entropy_out", DIAG, "MAP", least=0.0),
    Claim("mean entropy on letters: MC dropout above MAP's", "entropy_out", "MC dropout", "MAP", least=TINY),
    Claim("mean entropy on letters: mean field below tuned Kronecker's", "entropy_out", "mean field", KRON, most=-TINY),
)


_COLUMNS = (
    ("accuracy %", "accuracy", 100, 2), ("NLL", "nll", 1, 4), ("ECE %", "ece", 100, 2),
    ("entropy in", "entropy_in", 1, 3), ("entropy out", "entropy_out", 1, 3),
    ("certain out %", "certain_out", 100, 1), ("AUROC", "auroc", 1, 4), ("FPR95 %", "fpr95", 100, 1),
)  # fmt: skip


def methods_table(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """One row per method: mean and standard deviation over seeds."""
    rows = []
    for method, found in summary.items():
        cells = [f"{s * found[key]['mean']:.{d}f} ± {s * found[key]['std']:.{d}f}" for _, key, s, d in _COLUMNS]
        rows.append([method, *cells, f"{100 * PUBLISHED[method]:.2f}" if method in PUBLISHED else ""])
    note = (
        "NLL and entropies in nats. Certain out: letters predicted with an entropy below "
        f"{CERTAIN} nats. AUROC and FPR95 (false alarms on digits when 95 % of the letters are caught) by entropy. "
        "Published: test accuracy of the thesis, table 5.1, after 250 epochs with 1000 draws per image."
    )
    return Table("Methods", ["method", *(title for title, *_ in _COLUMNS), "published accuracy %"], rows, note)


def tuning_table(tuning: Mapping[str, Mapping[str, Mapping[str, Any]]], n_data: int) -> Table:
    """The ``(N, λ)`` that tuning chose, by seed and posterior; ``n_data`` is the real N."""
    rows = [
        [seed, name, f"{found['best']['n_data'] / n_data:g}", f"{found['best']['prior_precision']:g}",
         f"{found['best']['objective']:.4f}", "yes" if found["at_edge"] else "no"]
        for seed, methods in tuning.items()
        for name, found in methods.items()
    ]  # fmt: skip
    columns = ["seed", "posterior", "N / real N", "λ", "validation NLL", "edge of grid"]
    return Table("Tuned settings", columns, rows, "The whole grids are in result.json under tuning.")


def pictures(outcome: Outcome, seed: int) -> list[Picture]:
    """Entropy curves and reliability diagrams of one repetition."""
    count = len(outcome.labels)
    entropies = {name: metrics.entropy(probs) for name, probs in outcome.probs.items()}
    figure, (left, right) = plots.panels(1, 2, width=5.8, height=4.4)
    inside = {name: values[:count] for name, values in entropies.items()}
    outside = {name: values[count:] for name, values in entropies.items()}
    plots.inverse_entropy_cdf(inside, axis=left, title="MNIST test digits", classes=10)
    plots.inverse_entropy_cdf(outside, axis=right, title="notMNIST letters", classes=10)
    plots.legend_below(figure, columns=5)
    pairs = {name: (probs[:count], outcome.labels) for name, probs in outcome.probs.items()}
    return [
        Picture("entropy", figure, "Share of images whose predictive entropy is above a threshold. On letters (right) "
                f"a high curve is good; on digits (left) a low one. Seed {seed}."),
        Picture("reliability", plots.reliability_diagram(pairs),
                f"Reliability on the MNIST test digits, seed {seed}. {plots.RELIABILITY_KEY}"),
    ]  # fmt: skip
