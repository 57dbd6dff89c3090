"""The predictions of a likelihood: from sampled outputs, or from normally distributed ones by its links."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from laplace_kf.errors import InvalidArgument, ShapeMismatch, UnknownName
from laplace_kf.likelihoods.joined import joined
from laplace_kf.likelihoods.normal import GaussianOutputs, Link
from laplace_kf.likelihoods.prediction import Prediction
from laplace_kf.likelihoods.reading import Reading, resolve_generator
from laplace_kf.outputs.layout import from_positions, to_positions
from laplace_kf.outputs.spread import Spread, runs

__all__ = ["Predicting"]

DRAWN = 2**23  # numbers of drawn outputs that exist at a time, unless one example has more


class Predicting(Reading):
    """The part of a likelihood that makes predictions."""

    has_logits: ClassVar[bool] = False
    inverse_links: ClassVar[Mapping[str, tuple[str, str, str]]] = {}
    linked_range: ClassVar[tuple[float, float]] = (0.0, math.inf)
    linked_last: ClassVar[bool] = False
    linked_sum: ClassVar[bool] = False

    @property
    def has_temperature(self) -> bool:
        """Whether :meth:`tempered` makes predictions less certain that stay the same otherwise."""
        return self.has_logits

    def tempered(self, outputs: Tensor, temperature: float) -> Tensor:
        """Outputs of predictions that are less certain the higher the temperature is; 1 changes nothing.

        Logits are divided by it. Of use where :attr:`has_temperature`.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            temperature: above 0.

        Returns:
            Outputs of the same shape.
        """
        return outputs / temperature

    @abc.abstractmethod
    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        """Mixture over the leading dimension of ``z (S, N, T, C)``; ``shape`` is that of one set of outputs."""

    def _density(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        density: Callable[[Tensor, Tensor | None], Tensor],
        targets: Tensor,
    ) -> Tensor:
        """Evaluates a predictive's density of ``(y, keep)`` at targets as a user gives them."""
        y, keep = self._position_targets(shape, targets)
        return density(y.to(dtype) if y.is_floating_point() else y, keep)

    def predict(self, outputs: Tensor, keep_samples: bool = False) -> Prediction:
        """Predictive distribution: the equal-weight mixture over sampled outputs (methods 10.1).

        Args:
            outputs: ``(S, N, C)``, ``(S, N, T, C)`` or ``(S, N, C, H, W)``; everything in the result stays
                differentiable in them.
            keep_samples: whether ``prediction.samples`` holds ``outputs``.

        Returns:
            A :class:`~laplace_kf.likelihoods.prediction.Prediction`.

        Raises:
            ShapeMismatch: if the outputs have no sample dimension, or no samples.
        """
        if outputs.ndim < 3 or outputs.shape[0] == 0:
            raise ShapeMismatch(
                f"{type(self).__name__}.predict: expected sampled outputs (S, N, C), (S, N, T, C) or (S, N, C, H, W) "
                f"with S >= 1, got {tuple(outputs.shape)}. Use outputs[None] for a single set of outputs."
            )
        shape = torch.Size(outputs.shape[1:])
        z = self._unpack(outputs.flatten(0, 1), None).z
        prediction = self._predict(z.reshape(*outputs.shape[:2], *z.shape[1:]), shape)
        prediction = dataclasses.replace(prediction, ignore_index=self.ignore_index)
        if keep_samples:
            prediction = dataclasses.replace(prediction, values={**prediction.values, "samples": outputs})
        return prediction

    def mixed_outputs(self, parts: Sequence[Prediction], log_weights: Tensor) -> Tensor | None:
        """Outputs ``(N, C)``, in the layout of the outputs, whose prediction is the mixture of predictions.

        Args:
            parts: predictions of this likelihood.
            log_weights: of the parts, ``(M,)``.

        Returns:
            ``None`` for likelihoods whose mixtures are no such prediction.
        """
        return None

    def mixed_entropy(self, parts: Sequence[Prediction], weights: Tensor) -> Tensor | None:
        """Entropy of the mixture of predictions by position, weights ``(M,)``.

        ``None`` where that of the mixture's probabilities, or of a normal variable with its variance, is right.
        """
        return None

    def links(self) -> dict[str, Link]:
        """How normally distributed outputs become predictions, by name; the first one is the default.

        Every likelihood has ``"mc"``, the mixture over draws of the outputs.
        """
        return {"mc": Link(self._predict_draws, marginal=False)}

    def _predict_draws(self, outputs: GaussianOutputs) -> Prediction:
        return self._predict(outputs.draws, torch.Size(outputs.shape))

    def link(self, name: str | None) -> Link:
        """One of :meth:`links`, the default for ``None``.

        Raises:
            UnknownName: for another name.
        """
        links = self.links()
        if name is None:
            return next(iter(links.values()))
        if name not in links:
            raise UnknownName(f"link of {type(self).__name__}", name, links)
        return links[name]

    def predict_gaussian(
        self,
        outputs: Tensor,
        variance: Tensor,
        covariance: Tensor | Spread | None = None,
        link: str | None = None,
        samples: int = 100,
        generator: torch.Generator | None = None,
        keep_samples: bool = False,
    ) -> Prediction:
        """Predictive distribution for outputs that are normal around ``outputs``.

        Args:
            outputs: means, ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            variance: of every output, in the same layout.
            covariance: of the outputs of a position, ``(N, T, C, C)``, or what it is made of; not needed by links
                that are ``marginal``.
            link: a name of :meth:`links`; ``None`` for the default.
            samples: draws S of links that draw.
            generator: their random numbers; None uses a fresh private one.
            keep_samples: whether ``prediction.samples`` holds draws ``(S, *outputs.shape)`` of the outputs.

        Raises:
            UnknownName: for a link that this likelihood does not have.
            ValueError: if ``samples`` is not positive.
        """
        rule = self.link(link)
        if samples < 1:
            raise InvalidArgument(f"samples must be at least 1, got {samples}")
        z = self._unpack(outputs, None).z
        spread = to_positions(variance).to(z)
        full = None if rule.marginal or covariance is None else covariance.to(z)
        state = resolve_generator(generator, z.device)
        normal = GaussianOutputs(z, spread, full, tuple(outputs.shape), samples, state)
        if keep_samples or rule.marginal:
            prediction = rule.predict(normal)
        else:
            prediction = _by_runs(rule, normal)
        prediction = dataclasses.replace(prediction, ignore_index=self.ignore_index)
        if keep_samples:
            draws = from_positions(normal.draws, outputs)
            prediction = dataclasses.replace(prediction, values={**prediction.values, "samples": draws})
        return prediction


def _by_runs(rule: Link, normal: GaussianOutputs) -> Prediction:
    """Some examples at a time where the draws of all of them would need much memory; the numbers are the same."""
    parts = list(runs(len(normal.mean), normal.samples * normal.mean[:1].numel(), DRAWN))
    if len(parts) < 2:
        return rule.predict(normal)
    before, found = normal.generator.get_state(), []
    for part in parts:
        normal.generator.set_state(before)
        found.append(rule.predict(normal.part(part)))
    return joined(found)
