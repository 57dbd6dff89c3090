"""Numbers of predictions: accuracy, likelihood, calibration, telling unknown inputs apart, selective prediction.

Everything takes probabilities ``(N, C)`` or scores ``(N,)`` and returns plain floats. torchmetrics computes what it
has; the Brier score, the false-positive rate at a given true-positive rate and the risk-coverage curve are a few lines
each on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laplace_kf.conventions import IGNORED
from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports.environment import missing_extra

try:
    from torchmetrics.functional import classification as tm
    from torchmetrics.functional import regression as tm_regression
except ImportError as error:
    raise missing_extra(error.name) from error

__all__ = [
    "classification",
    "entropy",
    "mean_std",
    "out_of_distribution",
    "regression",
    "risk_coverage",
    "selective_prediction",
]


def entropy(probs: Tensor) -> Tensor:
    """Predictive entropy ``-Σ_c p_c log p_c`` in nats, ``(N, C) -> (N,)``; between 0 and ``log C`` (methods 10.2)."""
    return torch.special.entr(probs).sum(-1)


def classification(probs: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log-likelihood, Brier score and calibration error of predicted probabilities.

    Args:
        probs: ``(N, C)`` predicted probabilities.
        labels: ``(N,)`` integer classes; those of -100 are left out.
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
    kept = labels != IGNORED
    if not bool(kept.any()):
        raise ShapeMismatch(
            f"all labels are ignored ({IGNORED}), so there is nothing to measure; give labels that are classes"
        )
    probs, labels = probs[kept], labels[kept]
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


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of the ``k`` most certain inputs, for every ``k`` (Geifman and El-Yaniv 2017).

    Equally uncertain inputs are taken in random order: the risk is its expectation over their orders, so that it does
    not depend on how the data were sorted.

    Args:
        uncertainty: ``(N,)``; larger means less certain.
        loss: ``(N,)``, for example 1 where a classifier is wrong and 0 where it is right.

    Returns:
        Coverage ``k/N`` and risk, both ``(N,)`` in float64, with increasing coverage.

    Raises:
        ShapeMismatch: if they are not equally long non-empty vectors.
    """
    if uncertainty.ndim != 1 or uncertainty.shape != loss.shape or not len(loss):
        raise ShapeMismatch(
            f"Expected uncertainty (N,) and loss (N,) with N >= 1, got {tuple(uncertainty.shape)} and "
            f"{tuple(loss.shape)}."
        )
    _, group = torch.unique(uncertainty, return_inverse=True)  # groups in increasing order of uncertainty
    size = torch.bincount(group)
    expected = (torch.bincount(group, loss.double()) / size).repeat_interleave(size)
    count = torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device)
    return count / len(loss), expected.cumsum(0) / count


def selective_prediction(uncertainty: Tensor, loss: Tensor) -> dict[str, float]:
    """Areas under the risk-coverage curve: how much a model gains by declining what it is least certain about.

    Args:
        uncertainty: ``(N,)``; larger means less certain.
        loss: ``(N,)``.

    Returns:
        ``aurc``, the mean risk over all coverages (lower is better), and ``e_aurc``, its excess over an oracle that
        declines the largest losses first (Geifman, Uziel and El-Yaniv 2019).

    Raises:
        ShapeMismatch: as :func:`risk_coverage`.
    """
    area = float(risk_coverage(uncertainty, loss)[1].mean())
    return {"aurc": area, "e_aurc": area - float(risk_coverage(loss.double(), loss)[1].mean())}


def regression(mean: Tensor, variance: Tensor, targets: Tensor, log_prob: Tensor) -> dict[str, float]:
    """Error, likelihood and calibration of predicted means and variances.

    Args:
        mean: ``(N, C)`` predictive means.
        variance: ``(N, C)`` predictive variances, noise included.
        targets: ``(N, C)``.
        log_prob: ``(N,)`` log predictive densities.

    Returns:
        ``nll`` (mean over examples, in nats), ``rmse`` (in the units of the targets), ``inside_95`` (fraction of
        targets within 1.96 standard deviations; 0.95 if calibrated) and ``sharpness`` (mean standard deviation).

    Raises:
        ShapeMismatch: if the shapes differ or there is no example.
    """
    if mean.shape != targets.shape or variance.shape != targets.shape or not targets.numel():
        raise ShapeMismatch(
            f"Expected means, variances and targets of one shape, got {tuple(mean.shape)}, {tuple(variance.shape)} and "
            f"{tuple(targets.shape)}."
        )
    deviation = variance.sqrt()
    inside = (targets - mean).abs() <= float(torch.special.ndtri(torch.tensor(0.975, dtype=torch.float64))) * deviation
    flat_mean, flat_targets = mean.reshape(-1).contiguous(), targets.reshape(-1).to(mean).contiguous()
    return {
        "nll": float(-log_prob.mean()),
        "rmse": float(tm_regression.mean_squared_error(flat_mean, flat_targets, squared=False)),
        "inside_95": float(inside.double().mean()),
        "sharpness": float(deviation.mean()),
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
