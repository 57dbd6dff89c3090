"""Numbers of a classifier's predictions: accuracy, likelihood, calibration, and telling unknown inputs apart.

Everything takes probabilities ``(N, C)`` or scores ``(N,)`` and returns plain floats. torchmetrics computes what it
has; the Brier score and the false-positive rate at a given true-positive rate are a line each on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports import missing_extra

try:
    from torchmetrics.functional import classification as tm
except ImportError as error:
    raise missing_extra(error.name) from error

__all__ = ["classification", "entropy", "mean_std", "out_of_distribution"]


def entropy(probs: Tensor) -> Tensor:
    """Predictive entropy ``-Σ_c p_c log p_c`` in nats, ``(N, C) -> (N,)``; between 0 and ``log C`` (methods 10.2)."""
    return torch.special.entr(probs).sum(-1)


def classification(probs: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log-likelihood, Brier score and calibration error of predicted probabilities.

    Args:
        probs: ``(N, C)`` predicted probabilities.
        labels: ``(N,)`` integer classes.
        bins: equal-width confidence bins of the expected calibration error.

    Returns:
        ``accuracy`` (fraction), ``nll`` (mean, in nats), ``brier`` (mean of ``Σ_c (p_c - [c = y])²``, 0 to 2) and
        ``ece`` (fraction). A probability that underflowed to zero counts as the smallest normal number of its dtype,
        so ``nll`` stays finite.

    Raises:
        ShapeMismatch: if ``probs`` is not ``(N, C)`` with ``labels`` ``(N,)``, or there is no example.
    """
    if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ShapeMismatch(
            f"Expected probabilities (N, C) and labels (N,) with N >= 1, got {tuple(probs.shape)} and "
            f"{tuple(labels.shape)}."
        )
    classes = probs.shape[1]
    hit = probs.gather(1, labels[:, None])[:, 0]
    one_hot = torch.nn.functional.one_hot(labels, classes).to(probs)
    return {
        "accuracy": float(tm.multiclass_accuracy(probs, labels, num_classes=classes, average="micro")),
        "nll": float(-hit.clamp_min(torch.finfo(probs.dtype).tiny).log().mean()),
        "brier": float((probs - one_hot).square().sum(1).mean()),
        "ece": float(tm.multiclass_calibration_error(probs, labels, num_classes=classes, n_bins=bins, norm="l1")),
    }


def out_of_distribution(inside: Tensor, outside: Tensor, *, rate: float = 0.95) -> dict[str, float]:
    """How well an uncertainty score tells out-of-distribution inputs (the positive class) from in-distribution ones.

    Args:
        inside: ``(N,)`` scores of in-distribution inputs, for example predictive entropies.
        outside: ``(M,)`` scores of out-of-distribution inputs; larger means more uncertain.
        rate: true-positive rate of the operating point.

    Returns:
        ``auroc``, ``aupr`` (average precision) and ``fpr95``: the fraction of in-distribution inputs that are flagged
        at the strictest threshold that flags at least ``rate`` of the out-of-distribution ones (lower is better).

    Raises:
        ShapeMismatch: if a score tensor is empty or not one-dimensional.
    """
    for name, score in (("inside", inside), ("outside", outside)):
        if score.ndim != 1 or not len(score):
            raise ShapeMismatch(f"Expected {name} scores (N,) with N >= 1, got shape {tuple(score.shape)}.")
    score = torch.cat([inside, outside]).double()
    target = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)]).long()
    # torchmetrics applies a sigmoid to anything outside [0, 1], which would merge large scores in float; ranks are
    # all that these metrics use, so map the scores to [0, 1] by their order.
    rank = torch.unique(score, return_inverse=True)[1].double()
    rank = rank / rank.max().clamp_min(1)
    false_positive, true_positive, _ = tm.binary_roc(rank, target)
    return {
        "auroc": float(tm.binary_auroc(rank, target)),
        "aupr": float(tm.binary_average_precision(rank, target)),
        "fpr95": float(false_positive[true_positive >= rate].min()),
    }


def mean_std(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | list[float]]]:
    """Mean, sample standard deviation and the single values of each metric over repeated runs.

    Args:
        runs: one mapping of metrics per seed, all with the same keys.

    Returns:
        ``{metric: {"mean", "std", "values"}}``; the deviation of a single run is 0.
    """
    summary: dict[str, dict[str, float | list[float]]] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        mean = math.fsum(values) / len(values)
        spread = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
        summary[key] = {"mean": mean, "std": math.sqrt(spread), "values": values}
    return summary
