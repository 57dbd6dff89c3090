"""Split-conformal calibration: intervals and label sets whose coverage is guaranteed on exchangeable data.

A score says how badly a target fits its prediction; with scores of n calibration examples and ``k = ⌈(n+1)·level⌉``, a
new example's score is at most the k-th smallest with probability at least ``level``, whatever the model, if the n+1
examples are exchangeable (Vovk et al. 2005; Papadopoulos et al. 2002; Lei et al. 2018). Scores are measured on the
prediction's own scale, so that intervals and sets are wider where the posterior is less certain: ``|y − mean| / σ``
with the predictive standard deviation for real targets and counts, and for classes the probability of all classes that
are more probable than the right one (as Romano, Sesia, Candès 2020, without randomisation: never an empty set).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_kf.callers import users_line
from laplace_kf.errors import IncompatiblePair, InvalidArgument, ShapeMismatch

__all__ = ["Conformal", "Predictive", "interval", "prediction_set", "scores"]

OF = ("observation", "mean")


class Predictive(Protocol):
    """What is needed of a prediction (:class:`laplace_kf.Prediction`)."""

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Tensors ``(N, C)`` by attribute name."""

    @property
    def quantiles(self) -> Callable[[float], Tensor] | None:
        """Exact quantiles ``(N, C)`` by probability, if they are known."""

    @property
    def calibration(self) -> Conformal | None:
        """Scores of calibration data for this way to predict."""

    def kept(self, y: Tensor) -> Tensor:
        """Which targets count, of the shape of ``y``."""


@dataclass(frozen=True)
class Conformal:
    """Calibration scores.

    Attributes:
        scores: ascending, in float64: ``(n, C)`` of real targets, one column an output, with NaN last where targets
            were ignored; ``(n, 1)`` of classes.
        method: the method of prediction that they were measured with.
    """

    scores: Tensor
    method: str

    @classmethod
    def of(cls, scores: Tensor, method: str) -> Conformal:
        """From scores ``(n, C)`` in any order; NaN for none."""
        return cls(scores.detach().double().cpu().sort(0).values, method)

    def quantile(self, level: float) -> Tensor:
        """The ``⌈(n+1)·level⌉``-th smallest score of every column ``(C,)``; infinite, with a warning, if n is less."""
        counts = (~torch.isnan(self.scores)).sum(0)
        found = []
        for column, n in zip(self.scores.T, counts.tolist(), strict=True):
            k = math.ceil(round((n + 1) * level, 9))
            found.append(float(column[k - 1]) if k <= n else math.inf)
        if math.inf in found:
            warnings.warn(
                f"{int(counts.min())} calibration examples are too few for level {level:g} (it takes "
                f"{math.ceil(level / (1 - level) - 1e-9)}): intervals are infinite, sets hold every class",
                stacklevel=users_line(),
            )
        return torch.tensor(found, dtype=torch.float64)


def checked(level: float) -> float:
    """A level of coverage; raises ``ValueError`` unless it lies between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise InvalidArgument(f"a level of coverage lies between 0 and 1, for example 0.9, got {level}")
    return float(level)


def interval(prediction: Predictive, level: float, of: str) -> tuple[Tensor, Tensor]:
    """Both ends, each ``(N, C)``; see :meth:`laplace_kf.likelihoods.Prediction.interval`."""
    checked(level)
    if of not in OF:
        raise InvalidArgument(f"an interval is of one of {', '.join(map(repr, OF))}, got {of!r}")
    if "mean" not in prediction.values or "variance" not in prediction.values:
        raise IncompatiblePair(
            "intervals are of real targets and counts; for classes there is prediction.prediction_set(level)"
        )
    mean = prediction.values["mean"]
    if of == "mean":
        spread, calibration = prediction.values["epistemic_variance"], None
    else:
        spread, calibration = prediction.values["variance"], prediction.calibration
        if calibration is None and prediction.quantiles is not None:
            return prediction.quantiles((1.0 - level) / 2.0), prediction.quantiles((1.0 + level) / 2.0)
    normal = torch.special.ndtri(torch.tensor((1.0 + level) / 2.0, dtype=torch.float64))
    width = normal if calibration is None else calibration.quantile(level)
    half = width.to(mean) * spread.clamp_min(0.0).sqrt()
    return mean - half, mean + half


def prediction_set(prediction: Predictive, level: float) -> Tensor:
    """Bool ``(N, C)``; see :meth:`laplace_kf.likelihoods.Prediction.prediction_set`."""
    checked(level)
    probs = _class_probs(prediction)
    above = _more_probable(probs)
    if prediction.calibration is None:
        return above < level
    return above <= prediction.calibration.quantile(level).to(above)


def scores(prediction: Predictive, targets: Any) -> Tensor:
    """Scores of targets: ``(N, C)`` of real targets ``(N, C)``, ``(N, 1)`` of classes ``(N,)``; NaN where ignored.

    Raises:
        IncompatiblePair: for several positions an example, and for predictions with neither a variance nor classes.
        ShapeMismatch: if the targets do not fit.
    """
    values = prediction.values
    if "variance" in values and "mean" in values:
        mean = values["mean"]
        _single(mean)
        if isinstance(targets, (tuple, list)) and len(targets) == 2:
            targets = targets[0]  # (y, scale): coverage is of new observations, whose own noise nobody knows
        if not isinstance(targets, Tensor) or targets.shape != mean.shape:
            raise ShapeMismatch(
                f"expected targets {tuple(mean.shape)}, one for every predicted mean, got {_shape(targets)}; reshape "
                "them"
            )
        found = (targets.to(mean) - mean).abs() / values["variance"].sqrt()
        return torch.where(prediction.kept(targets), found, torch.nan)
    probs = _class_probs(prediction)
    targets = _labels(targets, probs)
    kept = prediction.kept(targets)
    found = _more_probable(probs).gather(1, torch.where(kept, targets, 0)[:, None])
    return torch.where(kept[:, None], found, torch.nan)


def _labels(targets: Any, probs: Tensor) -> Tensor:
    """Class labels ``(N,)`` of any integer type as int64, also given as one-hot rows ``(N, C)``."""
    if isinstance(targets, Tensor) and targets.shape == probs.shape:
        hot = targets == 1
        if bool((hot.sum(-1) == 1).all()) and bool((hot | (targets == 0)).all()):
            return hot.long().argmax(-1)
        raise ShapeMismatch(
            f"coverage is of one label an example, and the targets {tuple(targets.shape)} are probabilities of "
            "several; calibrate with the labels that were drawn, or with targets.argmax(-1)"
        )
    if not isinstance(targets, Tensor) or targets.shape != probs.shape[:1] or targets.is_floating_point():
        raise ShapeMismatch(f"expected class labels {tuple(probs.shape[:1])}, got {_shape(targets)}")
    return targets.long()


def _shape(targets: Any) -> Any:
    return tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__


def _class_probs(prediction: Predictive) -> Tensor:
    """Class probabilities ``(N, C)`` that add up to 1."""
    probs = prediction.values.get("probs")
    if probs is not None:
        _single(probs)
    if probs is None or probs.shape[-1] < 2 or bool((probs.sum(-1) - 1).abs().max() > 1e-3):
        raise IncompatiblePair(
            "sets of classes need probabilities of classes that exclude each other; this prediction has "
            f"{', '.join(sorted(prediction.values))}"
        )
    return probs


def _single(values: Tensor) -> None:
    if values.dim() != 2:
        raise IncompatiblePair(
            f"coverage is guaranteed for examples with one position, predictions (N, C), not {tuple(values.shape)}: "
            "positions of one sequence, image or graph are not exchangeable with those of another"
        )


def _more_probable(probs: Tensor) -> Tensor:
    """For every class, the probability of all classes that are more probable, ``(N, C)``; 0 for the most probable."""
    ordered, order = probs.sort(-1, descending=True)
    before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.cumsum(-1)[:, :-1]], -1)
    first = torch.cat([torch.ones_like(order[:, :1], dtype=torch.bool), ordered[:, 1:] < ordered[:, :-1]], -1)
    before = torch.where(first, before, 0.0).cummax(-1).values  # equally probable classes have equal scores
    return torch.zeros_like(before).scatter(-1, order, before)


def packed(calibration: Conformal | None) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and a JSON-able value to save."""
    if calibration is None:
        return {}, None
    return {"conformal/scores": calibration.scores}, {"method": calibration.method}


def unpacked(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None) -> Conformal | None:
    """The inverse of :func:`packed`."""
    return None if header is None else Conformal(tensors["conformal/scores"], str(header["method"]))
