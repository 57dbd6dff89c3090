"""Scores of settings ``(N, λ)`` on validation data, with the same random numbers for every setting."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace_kf import weighting
from laplace_kf.agreement import require_same_loss
from laplace_kf.arrays import is_array
from laplace_kf.batches import (
    BATCH_SIZE,
    as_batches,
    check_finite,
    inputs_of,
    map_examples,
    run,
    tensors_of,
    to_device,
    to_tensors,
)
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, ShapeMismatch, UnknownName
from laplace_kf.graphs import check_ignored, of_role
from laplace_kf.likelihoods import Likelihood, Prediction
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved
from laplace_kf.outputs.weighted import bare
from laplace_kf.posterior.examples import Batch, Part
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.jackknife import Drawn, extrapolated
from laplace_kf.posterior.kept_scores import KeptScores
from laplace_kf.posterior.objectives import Objective, OODContrast, scored_alone
from laplace_kf.posterior.predictors import MAP, TUNING_METHODS, Point, Predictions, Shared, rounded
from laplace_kf.posterior.prior import positive
from laplace_kf.posterior.work import EPOCH, multiply_adds
from laplace_kf.predictive import draw_seeds, outputs_at
from laplace_kf.predictive.calls import require_movable
from laplace_kf.predictive.suffix import FEATURE_BYTES, Site, cut, feature_bytes
from laplace_kf.resuming import digest

__all__ = ["MAP", "Measure", "Point", "Score", "Scorer", "Validation", "scores_of"]

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
        folds: of a score by weight draws, the values without each group of draws ``(g,)``: how much draws matter.
    """

    value: float
    parts: Tensor | None = None
    noise: float | None = None
    folds: Tensor | None = None


Measure = Callable[[Sequence[Point], bool], dict[Point, Score]]


class Validation:
    """Validation data, read once; the posterior is read, never changed.

    Args:
        fitted: the posterior.
        val: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``; gone through once.
        objective: ``(prediction, targets) -> (N,) scores, or their mean``.
        samples: weight draws S.
        generator: where their seeds come from.
        max_examples: look at the first batches only, until there are so many examples.
        noise: whether every point gets the noise scale at which it scores best, down to half of MAP's.
        pairs: whether weight draws come in pairs ``θ* ± ε``.
        mixed: cut large minibatches and bring them into a random order, so that the first of them stand for all.
        kept: scores of an interrupted search on the same data.

    Attributes:
        epoch: multiply-adds of a training epoch over the data; three forward passes (forward, gradients of inputs and
            of weights).
        forward: multiply-adds of one example at other weights.

    Raises:
        ShapeMismatch: if the data are empty or do not fit.
        NonFinite: for NaN or infinity in the data.
    """

    kept: KeptScores | None = None

    def __init__(
        self,
        fitted: Fitted,
        val: Iterable[Any] | tuple[Any, Tensor],
        objective: Objective,
        samples: int = 20,
        generator: torch.Generator | None = None,
        max_examples: int | None = None,
        noise: bool = False,
        pairs: bool = False,
        mixed: bool = False,
        kept: KeptScores | None = None,
    ) -> None:
        if max_examples is not None:
            positive("max_examples", max_examples)
        self.fitted, self.objective, self.noise, self.pairs = fitted, objective, noise, pairs
        self.mixed, self.kept = mixed, kept
        self.seeds = draw_seeds(samples, generator) if kept is None else kept.seeds(samples, generator)
        self.mean = fitted.mean_by_name()
        self.device = next(iter(self.mean.values())).device
        self._trained = self._at_mean()
        self._kept = 0
        self._passes = [0.0, 0.0, 0]  # multiply-adds of whole passes, of passes at other weights, examples counted
        self.batches = self._read(val, max_examples)
        if mixed:
            order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.seeds[0]))
            self.batches = [self.batches[k] for k in order.tolist()]
        if kept is not None:
            read = [t for batch in self.batches for t in (batch.outputs, *tensors_of(bare(batch.targets)))]
            kept.require_data(digest({str(k): t for k, t in enumerate(read)}))
        self.contrast = objective if isinstance(objective, OODContrast) else None
        self._far = None if self.contrast is None else self._read_inputs(self.contrast.inputs)
        self._parts: dict[int, Part] = {}
        whole, again, counted = self._passes
        self.forward = again / counted
        self.epoch = EPOCH * self.count * whole / counted
        self.exponent, self.lowest = 0.0, -EXPONENTS  # of the noise scale

    @property
    def shared(self) -> Shared:
        """What predictions at all points have in common."""
        return Shared(self.fitted, self.mean, self.seeds, self.pairs, self.kept)

    def redrawn(self, samples: int) -> Validation:
        """The same data, and so many other weight draws."""
        other = copy.copy(self)
        other.seeds = draw_seeds(samples, torch.Generator().manual_seed(self.seeds[0]))
        return other

    @property
    def count(self) -> int:
        """Number of validation examples."""
        return sum(batch.outputs.shape[0] for batch in self.batches)

    def part(self, examples: float = math.inf) -> Part:
        """The first examples, this many at most; with a contrast, or where minibatches cannot be cut, maybe more."""
        if self.contrast is not None:
            examples = math.inf
        taken: list[Batch] = []
        seen = 0
        for batch in self.batches:
            size = batch.outputs.shape[0]
            if seen + size > examples:
                pieces = self._cut(batch, max(1, int(examples - seen)), seen < examples)
                taken += pieces[:1] if len(pieces) > 1 else [batch] if not taken else []
                break
            taken.append(batch)
            seen += size
        count = sum(batch.outputs.shape[0] for batch in taken)
        if count not in self._parts:
            self._parts[count] = Part(taken, self._far, len(self.seeds))
        return self._parts[count]

    def _at_mean(self) -> bool:
        """Whether the model's own weights are the posterior's mean."""
        named = dict(self.fitted.model.named_parameters())
        return all(torch.equal(named[name].detach(), value) for name, value in self.mean.items())

    def _site(self, inputs: Any) -> Site:
        """What to run for one minibatch; features are kept up to ``FEATURE_BYTES`` in all."""
        fitted = self.fitted
        plain: Site = (fitted.model, fitted.forward, inputs)
        if self._kept >= FEATURE_BYTES:
            return plain
        site = cut(fitted.model, fitted.forward, self.mean, inputs)
        if site[0] is fitted.model:
            return plain
        self._kept += feature_bytes(site[2])
        return site if self._kept <= FEATURE_BYTES else plain

    def _read(self, val: Any, limit: int | None) -> list[Batch]:
        model, forward = self.fitted.model, self.fitted.forward
        read = weighting.reader(forward, self.fitted.weights)
        batches: list[Batch] = []
        seen, counted = 0, 0
        with preserved(model), torch.no_grad():
            for index, batch in enumerate(weighting.batches(val, self.fitted.weights, model)):
                check_batch(batch, index, "the validation batch", read, self.fitted.likelihood.nan_is_missing)
                batch = of_role(to_device(batch, self.device), "val_mask")
                if index == 0:
                    require_same_loss(model, batch, read, self.fitted.likelihood)
                plain = weighting.inputs_without_weights(batch) if getattr(read, "plain", False) else batch
                if index == 0:  # before anything is kept from a pass
                    require_movable(model, forward, self.mean, inputs_of(plain, forward))
                with multiply_adds(not batches) as work:
                    found, wanted = run(model, batch, read)
                check_ignored(*weighting.without(batch, read)[:1], bare(wanted), self.fitted.likelihood, forward)
                self.fitted.likelihood.check(found, wanted)
                site = self._site(inputs_of(plain, forward))
                at_mean = found if self._trained else outputs_at(site[0], site[1], self.mean, site[2])
                if not batches:
                    self._count_passes(work[0], site, found)
                made = Batch(site, at_mean, wanted)
                batches += self._cut(made) if self.mixed else [made]
                seen += found.shape[0]
                counted += self.fitted.likelihood.counted_examples(found, wanted)
                if limit is not None and seen >= limit:
                    break
        if not seen:
            raise ShapeMismatch(
                "the validation data are empty: no batch was yielded; a generator that was read before is empty: "
                "give a list or a DataLoader"
            )
        if not counted:
            raise ShapeMismatch(
                f"all targets of the validation data are ignored ({self.fitted.likelihood!r}), so there is nothing to "
                "choose by; check the targets, or the ignore_index of the likelihood"
            )
        return batches

    def _count_passes(self, whole: float, site: Site, outputs: Tensor) -> None:
        again = whole
        if site[0] is not self.fitted.model:
            with multiply_adds() as work:
                outputs_at(site[0], site[1], self.mean, site[2])
            again = work[0]
        least = float(outputs.numel())  # a network without products
        self._passes = [max(whole, least), max(again, least), outputs.shape[0]]

    def _cut(self, batch: Batch, size: int = BATCH_SIZE, wanted: bool = True) -> list[Batch]:
        """A minibatch in pieces of ``size``, where pieces of the inputs give pieces of the outputs; else as it is."""
        count, (model, forward, inputs) = batch.outputs.shape[0], batch.site
        targets = batch.targets
        if not wanted or count <= size or any(t.shape[:1] != (count,) for t in tensors_of(targets)):
            return [batch]
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        try:
            pieces = [map_examples(inputs, count, partial(_rows, part=part)) for part in parts]
            with preserved(model), torch.no_grad():
                first = outputs_at(model, forward, self.mean, pieces[0])
        except (LaplaceKFError, RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
            return [batch]
        expected = batch.outputs[parts[0]]
        if first.shape != expected.shape or not torch.allclose(first, expected, rtol=1e-4, atol=1e-5):
            return [batch]
        return [
            Batch(
                (model, forward, piece),
                batch.outputs[part],
                map_examples(targets, count, partial(_rows, part=part)),
            )
            for piece, part in zip(pieces, parts, strict=True)
        ]

    def _read_inputs(self, data: Any) -> tuple[list[Site], list[Tensor]]:
        data = to_tensors(data, self.fitted.model) if is_array(data) else data
        batches = [data] if isinstance(data, Tensor) else as_batches(data, self.fitted.model)
        inputs, outputs = [], []
        with preserved(self.fitted.model), torch.no_grad():
            for index, batch in enumerate(batches):
                check_finite(batch, index, "the out-of-distribution batch")
                inputs.append(self._site(inputs_of(to_device(batch, self.device), self.fitted.forward)))
                model, forward, taken = inputs[-1]
                outputs.append(outputs_at(model, forward, self.mean, taken))
        if not sum(len(found) for found in outputs):
            raise ShapeMismatch(
                "the out-of-distribution data are empty: no batch was yielded; a generator that was read before is "
                "empty: give a list or a DataLoader"
            )
        return inputs, outputs

    def scorer(self, method: str, examples: float = math.inf) -> Scorer:
        """What measures points by a prediction method (a name of :data:`TUNING_METHODS`) on the first examples.

        Raises:
            UnknownName: for an unknown method.
            IncompatiblePair: for one that the likelihood does not have.
        """
        if method not in TUNING_METHODS:
            raise UnknownName(TUNING_METHODS.kind, method, TUNING_METHODS)
        return Scorer(self, self.part(examples), method)


class Scorer:
    """Scores of points by one prediction method on a part of the validation data.

    Args:
        validation: the data.
        part: of them.
        method: a name of :data:`TUNING_METHODS`.
    """

    def __init__(self, validation: Validation, part: Part, method: str) -> None:
        self.validation, self.part, self.method = validation, part, method
        self.fitted = validation.fitted
        with preserved(self.fitted.model):
            self.predictor = TUNING_METHODS[method](validation.shared, part)
        self._held: float | None = None
        self._factor = 1.0

    def __call__(self, points: Sequence[Point], progress: bool = False) -> dict[Point, Score]:
        """The score of every point; ``MAP`` may be among them."""
        found: dict[Point, Score] = {}
        origin = self._at_this_noise(points)
        with preserved(self.fitted.model), tqdm(total=len(points), desc="tune", disable=not progress) as bar:
            for group in self._groups(list(origin)):
                for point, score in self._known(group) or self._measured(group):
                    found[origin[point]] = score
                    bar.update()
        return found

    def _at_this_noise(self, points: Sequence[Point]) -> dict[Point, Point]:
        """What stands for every point where precisions are at the likelihood's own noise scale, with the point."""
        return {point if point == MAP else (point[0] * self._factor, point[1]): point for point in points}

    def _groups(self, points: list[Point]) -> list[list[Point]]:
        """Points that are measured at once: all, or those of one ratio where what was measured is kept."""
        if self.validation.kept is None or not self.predictor.separate:
            return [points]
        groups: dict[float, list[Point]] = {}
        for point in sorted(points, key=lambda one: one != MAP):  # MAP first
            groups.setdefault(math.nan if point == MAP else rounded(point[1] / point[0]), []).append(point)
        return list(groups.values())

    def _measured(self, points: list[Point]) -> Iterator[tuple[Point, Score]]:
        kept = self.validation.kept if self.predictor.separate else None
        for point, predictions in self._predictions(points):
            score = self.score(predictions, point == MAP)
            if kept is not None:
                exponents = self.validation.exponent, self.validation.lowest
                folds = None if score.folds is None else score.folds.tolist()
                values = {"value": score.value, "noise": score.noise, "exponents": exponents, "folds": folds}
                kept.keep_score(self._key(point), values, score.parts)
            yield point, score
        if kept is not None:
            kept.write()

    def _known(self, points: list[Point]) -> list[tuple[Point, Score]]:
        """The scores of points, if all were measured before."""
        kept = self.validation.kept if self.predictor.separate else None
        stored = [] if kept is None else [kept.score(self._key(point)) for point in points]
        found = []
        for point, one in zip(points, stored, strict=False):
            if one is None:
                return []
            folds = one[0]["folds"] and torch.tensor(one[0]["folds"], dtype=torch.float64)
            found.append((point, Score(one[0]["value"], one[1], one[0]["noise"], folds)))
        if stored and stored[-1] is not None:
            self.validation.exponent, self.validation.lowest = stored[-1][0]["exponents"]
            if points != [MAP]:
                self.predictor.passed(points)
        return found

    def _key(self, point: Point) -> list[Any]:
        seeds = self.validation.seeds
        return [self.method, self.part.count, len(seeds), seeds[0], self._held, *point]

    def score(self, predictions: Predictions | None, at_map: bool = False) -> Score:
        """The score of predictions of the part, at their best noise scale where that is tuned."""
        if predictions is None:
            return Score(math.inf)
        if self.validation.noise and self._held is None:
            return self._tuned(predictions, at_map)
        return self._score(predictions, self._held)

    def hold_noise(self, scale: float | None) -> None:
        """From now on measure all points at this noise scale; their N counts data at it."""
        before = self.fitted.likelihood.noise_scale
        if scale is not None and before is not None:
            self._held, self._factor = scale, (before / scale) ** 2

    def _predictions(self, points: Sequence[Point]) -> Iterator[tuple[Point, Predictions | None]]:
        if MAP in points:
            yield MAP, self.predictor.at_mean()
        yield from self.predictor([point for point in points if point != MAP])

    def _score(self, predictions: Predictions, noise: float | None = None, rough: bool = False) -> Score:
        """At one noise scale; of few weight draws, unless ``rough``, as it would be with those of ``predict``."""
        likelihood = self.fitted.likelihood
        likelihood = likelihood if noise is None else likelihood.with_noise_scale(noise)
        value, scores = self._objective_of(predictions(likelihood))
        if rough or not isinstance(predictions, Drawn) or not predictions.groups or scores is None:
            return Score(value if math.isfinite(value) else math.inf, scores, noise)
        return score_of(scores, self._left_out(predictions, likelihood), predictions.samples, noise)

    def _left_out(self, predictions: Drawn, likelihood: Likelihood) -> Tensor:
        """Scores by example without each group of draws, ``(g, N)``: all groups at once where that is the same."""
        count = predictions.groups
        if predictions.stacked is not None and scored_alone(self.validation.objective):
            part = self.part.repeated(count)
            if part is not None:
                left = self._objective_of(predictions.stacked(likelihood), part, count)[1]
                assert left is not None
                return left
        without = [self._objective_of(predictions.make(likelihood, k))[1] for k in range(count)]
        return torch.stack([each for each in without if each is not None])

    def _objective_of(
        self, found: Sequence[Prediction], part: Part | None = None, groups: int = 1
    ) -> tuple[float, Tensor | None]:
        """The objective of predictions of every pool, and its parts by example ``(N,)`` if there are such.

        Of several groups of predictions one after the other in every pool, as in ``part``, they are ``(groups, N)``.
        """
        objective, contrast, sizes = self.validation.objective, self.validation.contrast, self.part.inside.sizes
        inside = len(sizes)
        parts, given = scores_of(objective, found[:inside], part or self.part)
        if given:  # so that the mean over all examples is the weighted mean
            share = torch.cat(given).double().mean()
            parts = [part / share.to(part) for part in parts]
        value, scores = _combined(parts, sizes, groups)
        if contrast is not None:
            assert scores is not None
            far = torch.cat([_by_group(contrast.outside(p), groups) for p in found[inside:]], -1).double().cpu()
            near, other = scores.shape[-1], far.shape[-1]
            count = near + other  # weights under which one mean over both is the sum of the two means
            scores = torch.cat([scores * (count / near), far * (count / other)], -1)
            value = float(scores.mean())
        return value, scores

    def _tuned(self, predictions: Any, at_map: bool) -> Score:
        """The score at the best noise scale: downhill in half decades, then in ever smaller steps down to 0.1 %.

        Smaller steps begin where a parabola through the last three values has its minimum.

        Not below half of what MAP needs, where that is known: a spread of weights that stands for all the noise fits
        the validation examples at hand, not others, and would make the scale, and N with it, as small as one likes.
        """
        start = self.fitted.likelihood.noise_scale
        assert start is not None
        known: dict[float, Score] = {}

        def score(exponent: float) -> float:
            if exponent not in known:
                known[exponent] = self._score(predictions, start * 10**exponent, rough=True)
            return known[exponent].value

        centre, near = self.validation.exponent, None
        for step, digits in ((0.5, 0), (0.05, 2), (0.005, 3), (0.0005, 4)):
            if near is not None:
                guess = round(centre + 10 * step * _lowest_point(*map(score, near)), digits)
                centre = min((centre, min(max(guess, self.validation.lowest), EXPONENTS)), key=score)
            while True:
                near = centre, round(centre - step, 5), round(centre + step, 5)
                best = min(near, key=score)
                if best == centre or not self.validation.lowest <= best <= EXPONENTS:
                    break
                centre = best
        if math.isfinite(known[centre].value):
            validation = self.validation
            validation.exponent = max(round(centre, 1), validation.lowest)
            validation.lowest = centre + math.log10(FLOOR) if at_map else validation.lowest
        return self._score(predictions, start * 10**centre)


def _lowest_point(middle: float, left: float, right: float) -> float:
    """Where the parabola through values at 0, −1 and 1 has its minimum; 0 where the first is not the lowest."""
    bend = left - 2 * middle + right
    return (left - right) / (2 * bend) if middle <= min(left, right) and 0 < bend < math.inf else 0.0


def score_of(scores: Tensor, left: Tensor, samples: int, noise: float | None) -> Score:
    """A score by example ``(N,)`` of S draws, from those without each of ``g`` groups of them ``(g, N)``.

    Without such groups it is what it is; else as it would be with the draws of ``predict``.
    """
    folds = None
    if len(left):
        scores, folds = extrapolated(scores, left, samples), left.mean(1)
    value = float(scores.mean())
    if not math.isfinite(value):
        return Score(math.inf, scores, noise)
    return Score(value, scores, noise, folds if folds is not None and bool(folds.isfinite().all()) else None)


def scores_of(objective: Objective, found: Sequence[Prediction], part: Part) -> tuple[list[Tensor], list[Tensor]]:
    """Scores of every pool of a part, by example ``(n,)`` or one number, and the weights ``(n,)`` of its examples."""
    scores = [
        weighted(_as_scores(objective(p, y)), w, p, y)
        for p, y, w in zip(found, part.targets, part.weights, strict=True)
    ]
    return scores, [w for w in part.weights if w is not None]


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


def _rows(tensor: Tensor, part: slice) -> Tensor:
    return tensor[part]


def _as_scores(value: Tensor | float) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


def _by_group(scores: Tensor, groups: int) -> Tensor:
    return scores if groups == 1 else scores.reshape(groups, -1)


def _combined(parts: Sequence[Tensor], sizes: Sequence[int], groups: int = 1) -> tuple[float, Tensor | None]:
    """Mean over all examples, and the scores by example (by group of them, ``(groups, N)``) if there are such."""
    if all(part.dim() == 1 for part in parts):
        scores = torch.cat([_by_group(part, groups) for part in parts], -1).double().cpu()
        return float(scores.mean()), scores
    means = [float(part.double().mean()) for part in parts]
    return sum(size * mean for size, mean in zip(sizes, means, strict=True)) / sum(sizes), None
