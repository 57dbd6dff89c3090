"""Scores of settings ``(N, λ)`` on validation data, with the same random numbers for every setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace_kf import weighting
from laplace_kf.batches import as_batches, check_batch, check_finite, inputs_of, run, to_device
from laplace_kf.engine import preserved
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.graphs import check_ignored, of_role
from laplace_kf.likelihoods import Prediction
from laplace_kf.outputs.weighted import WeightedTargets
from laplace_kf.posterior.objectives import Objective, OODContrast
from laplace_kf.posterior.predictors import MAP, METHODS, Point, Pools, Predictions
from laplace_kf.posterior.prior import positive
from laplace_kf.predictive import draw_seeds, outputs_at
from laplace_kf.predictive.suffix import FEATURE_BYTES, Site, cut, feature_bytes

if TYPE_CHECKING:
    from laplace_kf.posterior.laplace import LaplacePosterior

__all__ = ["MAP", "Measure", "Point", "Score", "Validation"]

FLOOR = 0.5  # least noise scale, in units of MAP's
EXPONENTS = 12.0  # decades that a tuned noise scale may move


@dataclass(frozen=True)
class Score:
    """What a point scores.

    Attributes:
        value: the objective, lower is better; infinite where outputs are not finite.
        parts: scores by example ``(N,)`` whose mean is ``value``, in an order common to all points; None where the
            objective is no such mean.
        noise: the noise scale σ at which this was measured, where it is tuned.
    """

    value: float
    parts: Tensor | None = None
    noise: float | None = None


Measure = Callable[[Sequence[Point], bool], dict[Point, Score]]


class Validation:
    """Measures points on validation data; the posterior is read, never changed.

    Args:
        posterior: fitted.
        val: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``; gone through once.
        objective: ``(prediction, targets) -> (N,) scores, or their mean``.
        method: a name of :data:`METHODS`.
        samples: weight draws S.
        generator: where their seeds come from.
        max_examples: look at the first batches only, until there are so many examples.
        noise: whether every point gets the noise scale at which it scores best, down to half of MAP's.
        pairs: whether weight draws come in pairs ``θ* ± ε``.

    Raises:
        UnknownName: for an unknown method.
        ShapeMismatch: if the data are empty or do not fit.
        NonFinite: for NaN or infinity in the data.
    """

    def __init__(
        self,
        posterior: LaplacePosterior,
        val: Iterable[Any] | tuple[Any, Tensor],
        objective: Objective,
        method: str,
        samples: int,
        generator: torch.Generator | None,
        max_examples: int | None = None,
        noise: bool = False,
        pairs: bool = False,
    ) -> None:
        if method not in METHODS:
            raise UnknownName(METHODS.kind, method, METHODS)
        if max_examples is not None:
            positive("max_examples", max_examples)
        self.posterior, self.objective, self.noise, self.pairs = posterior, objective, noise, pairs
        self.seeds = draw_seeds(samples, generator)
        self.device = next(iter(posterior.mean.values())).device
        self._kept = 0
        inputs, outputs, targets = self._read(val, max_examples)
        self.inside = Pools(inputs, outputs, samples)
        given = self.inside.joined_targets(targets)
        self.targets = [y.targets if isinstance(y, WeightedTargets) else y for y in given]
        self.weights = [y.weights if isinstance(y, WeightedTargets) else None for y in given]
        self.contrast = objective if isinstance(objective, OODContrast) else None
        far = None if self.contrast is None else self._read_inputs(self.contrast.inputs)
        self.outside = None if far is None else Pools(*far, samples)
        self._predictor = METHODS[method](self)
        self._exponent, self._lowest = 0.0, -EXPONENTS
        self._held: float | None = None
        self._factor = 1.0

    @property
    def count(self) -> int:
        """Number of validation examples."""
        return sum(self.inside.sizes)

    def _site(self, inputs: Any) -> Site:
        """What to run for one minibatch; features are kept up to ``FEATURE_BYTES`` in all."""
        posterior = self.posterior
        plain: Site = (posterior.model, posterior.forward, inputs)
        if self._kept >= FEATURE_BYTES:
            return plain
        site = cut(posterior.model, posterior.forward, posterior.mean, inputs)
        if site[0] is posterior.model:
            return plain
        self._kept += feature_bytes(site[2])
        return site if self._kept <= FEATURE_BYTES else plain

    def _read(self, val: Any, limit: int | None) -> tuple[list[Site], list[Tensor], list[Any]]:
        model, forward = self.posterior.model, self.posterior.forward
        read = weighting.reader(forward, self.posterior.weights)
        inputs, outputs, targets, seen = [], [], [], 0
        with preserved(model):
            for index, batch in enumerate(weighting.batches(val, self.posterior.weights)):
                check_batch(batch, index, "the validation batch", read, self.posterior.likelihood.nan_is_missing)
                batch = of_role(to_device(batch, self.device), "val_mask")
                with torch.no_grad():
                    found, wanted = run(model, batch, read)
                check_ignored(batch, wanted, self.posterior.likelihood, forward)
                self.posterior.likelihood.check(found, wanted)
                batch = weighting.inputs_without_weights(batch) if read is not forward and forward is None else batch
                inputs.append(self._site(inputs_of(batch, forward)))
                outputs.append(found)
                targets.append(wanted)
                seen += found.shape[0]
                if limit is not None and seen >= limit:
                    break
        if not seen:
            raise ShapeMismatch("the validation data are empty: no batch was yielded")
        return inputs, outputs, targets

    def _read_inputs(self, data: Any) -> tuple[list[Site], list[Tensor]]:
        batches = [data] if isinstance(data, Tensor) else as_batches(data) if isinstance(data, tuple) else data
        inputs, outputs = [], []
        with preserved(self.posterior.model):
            for index, batch in enumerate(batches):
                check_finite(batch, index, "the out-of-distribution batch")
                inputs.append(self._site(inputs_of(to_device(batch, self.device), self.posterior.forward)))
                model, forward, taken = inputs[-1]
                outputs.append(outputs_at(model, forward, None, taken))
        if not sum(len(found) for found in outputs):
            raise ShapeMismatch("the out-of-distribution data are empty: no batch was yielded")
        return inputs, outputs

    def __call__(self, points: Sequence[Point], progress: bool = False) -> dict[Point, Score]:
        """The score of every point; ``MAP`` may be among them."""
        found: dict[Point, Score] = {}
        # precisions are at the likelihood's own noise scale, where other data counts stand for another scale
        origin = {point if point == MAP else (point[0] * self._factor, point[1]): point for point in points}
        with preserved(self.posterior.model), tqdm(total=len(points), desc="tune", disable=not progress) as bar:
            for point, predictions in self._predictions(list(origin)):
                if predictions is None:
                    found[origin[point]] = Score(math.inf)
                elif self.noise and self._held is None:
                    found[origin[point]] = self._tuned(predictions, point == MAP)
                else:
                    found[origin[point]] = self._score(predictions, self._held)
                bar.update()
        return found

    def hold_noise(self, scale: float | None) -> None:
        """From now on measure all points at this noise scale; their N counts data at it."""
        before = self.posterior.likelihood.noise_scale
        if scale is not None and before is not None:
            self._held, self._factor = scale, (before / scale) ** 2

    def _predictions(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        if MAP in points:
            yield MAP, self._predictor.at_mean()
        yield from self._predictor([point for point in points if point != MAP])

    def _score(self, predictions: Predictions, noise: float | None = None) -> Score:
        likelihood = self.posterior.likelihood
        found = predictions(likelihood if noise is None else likelihood.with_noise_scale(noise))
        inside = len(self.inside.sizes)
        parts = [
            weighted(_as_scores(self.objective(p, y)), w, p, y)
            for p, y, w in zip(found[:inside], self.targets, self.weights, strict=True)
        ]
        if self.posterior.weights:  # so that the mean over all examples is the weighted mean
            share = torch.cat([w for w in self.weights if w is not None]).double().mean()
            parts = [part / share.to(part) for part in parts]
        value, scores = _combined(parts, self.inside.sizes)
        if self.contrast is not None:
            assert scores is not None
            far = torch.cat([self.contrast.outside(p) for p in found[inside:]]).double().cpu()
            count = len(scores) + len(far)  # weights under which one mean over both is the sum of the two means
            scores = torch.cat([scores * (count / len(scores)), far * (count / len(far))])
            value = float(scores.mean())
        return Score(value if math.isfinite(value) else math.inf, scores, noise)

    def _tuned(self, predictions: Predictions, at_map: bool) -> Score:
        """The score at the best noise scale: downhill in half decades, then in ever smaller steps down to 0.1 %.

        Not below half of what MAP needs, where that is known: a spread of weights that stands for all the noise fits
        the validation examples at hand, not others, and would make the scale, and N with it, as small as one likes.
        """
        start = self.posterior.likelihood.noise_scale
        assert start is not None
        known: dict[float, Score] = {}

        def score(exponent: float) -> float:
            if exponent not in known:
                known[exponent] = self._score(predictions, start * 10**exponent)
            return known[exponent].value

        centre = self._exponent
        for step in (0.5, 0.05, 0.005, 0.0005):
            while True:
                best = min((centre, round(centre - step, 5), round(centre + step, 5)), key=score)
                if best == centre or not self._lowest <= best <= EXPONENTS:
                    break
                centre = best
        if math.isfinite(known[centre].value):
            self._exponent = max(round(centre, 1), self._lowest)
            self._lowest = centre + math.log10(FLOOR) if at_map else self._lowest
        return known[centre]


def weighted(scores: Tensor, weights: Tensor | None, prediction: Prediction, targets: Any) -> Tensor:
    """Scores ``(N,)`` times the weights ``(N,)`` of their examples, if there are such.

    Raises:
        IncompatiblePair: for an objective that is one number for all examples.
    """
    if weights is None:
        return scores
    weights = weights.to(scores)
    if scores.dim() == 1 and len(scores) != len(weights):  # those without a target that counts have no score
        weights = weights[prediction.kept(targets).reshape(len(weights), -1).any(1)]
    if scores.dim() != 1 or len(scores) != len(weights):
        raise IncompatiblePair(
            "with weights=True an objective must give one score an example, (N,): use "
            'objective="nll" or "brier", or a function (prediction, targets) -> (N,)'
        )
    return scores * weights


def _as_scores(value: Tensor | float) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


def _combined(parts: Sequence[Tensor], sizes: Sequence[int]) -> tuple[float, Tensor | None]:
    """Mean over all examples, and the scores by example if there are such."""
    if all(part.dim() == 1 for part in parts):
        scores = torch.cat(list(parts)).double().cpu()
        return float(scores.mean()), scores
    means = [float(part.double().mean()) for part in parts]
    return sum(size * mean for size, mean in zip(sizes, means, strict=True)) / sum(sizes), None
