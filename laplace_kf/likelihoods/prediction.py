"""Predictive distributions: what a likelihood makes of several sampled sets of network outputs.

Conventions. A prediction is the equal-weight mixture over S sampled outputs, taken position by position: probabilities
are averaged, never logits (Ritter et al. in Botev 2020, (5.8)-(5.9); methods 10.1), and quantities of an example are
sums over its positions. Entropies are in nats. Variances over samples divide by S, as the variance of a mixture does,
so that S = 1 gives 0 and not NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

from laplace_kf.batches import to_tensors
from laplace_kf.errors import UnknownAttribute
from laplace_kf.members import Members
from laplace_kf.outputs.conformal import Conformal, interval, prediction_set
from laplace_kf.outputs.layout import from_positions, masked, scalar_shape
from laplace_kf.outputs.top import TopClasses, top_classes

__all__ = ["LOG_2PI", "Prediction"]

NO_INFORMATION = "This prediction has no samples to take a mutual information over."
LOG_2PI = math.log(2.0 * math.pi)
PositionDensity = Callable[[Tensor, "Tensor | None"], Tensor]
Density = Callable[[PositionDensity, Tensor], Tensor]
PredictDraws = Callable[[Tensor, torch.Size], "Prediction"]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Members):
    """Predictive distribution of a batch. Made by ``likelihood.predict``; the fields are its building blocks.

    Attributes that a likelihood cannot supply raise ``AttributeError`` naming the ones that exist.

    Attributes:
        probs: mean class probabilities ``(N, C)`` (categorical), mean probabilities of 1 ``(N, C)`` (Bernoulli) or
            ``(N, 1)`` (mixture of two Bernoulli classifiers). Sequences ``(N, T, C)``, images ``(N, C, H, W)``.
        mean: predictive mean, same layout (counts and real-valued targets).
        variance: predictive variance, noise included.
        epistemic_variance: variance of the sampled conditional means.
        entropy: ``(N,)`` nats, summed over the positions of an example (and over Bernoulli outputs). Continuous
            mixtures have no closed form: the entropy is that of Gaussians with the mixture's marginal variances,
            which is an upper bound.
        position_entropy: ``(N, T)`` (T = 1 for ``(N, C)`` outputs), for images ``(N, H, W)``.
        mutual_information: ``(N,)`` entropy of the mixture minus mean entropy of its components, never negative.
        samples: the sampled network outputs ``(S, N, ...)``, only with ``keep_samples=True``.
        distribution: the same distribution as a ``torch.distributions`` object. Where its ``log_prob`` is by
            position, :meth:`log_prob` is the sum over positions; its event has the channel last.

    Args:
        values: tensors by attribute name.
        density: targets → ``(N, ...)`` log densities of the parts of an example that are mixed each by itself (its
            positions; of Bernoulli outputs each output), or ``(N,)`` of whole examples.
        entropies: () → entropy by position and mean entropy of the components by position (None if unknown).
        build: () → the ``torch.distributions`` object.
        ignore_index: the likelihood's; see :meth:`kept`.
        information: () → mutual information by position, where the components of the mixture are not known.
        independent_samples: whether :attr:`samples` are drawn anew for every example (``space="activations"``). By
            default a sample is one function over all examples.
        quantiles: probability → quantiles of every output in the layout of :attr:`mean`, where they are known exactly.
        channel: the axis of classes and outputs, 1 or -1; ``None``: last for up to three axes, else the second.
        calibration: conformal scores of this way to predict, see :meth:`interval`.
    """

    called = "prediction"
    values: Mapping[str, Tensor]
    density: Callable[[Tensor], Tensor]
    entropies: Callable[[], tuple[Tensor, Tensor | None]]
    build: Callable[[], Distribution]
    ignore_index: int | None = None
    channel: int | None = None
    calibration: Conformal | None = None
    information: Callable[[], Tensor] | None = None
    independent_samples: bool = False
    quantiles: Callable[[float], Tensor] | None = None

    def channel_last(self, x: Tensor) -> Tensor:
        """A tensor in the layout of the outputs ``(N, C, ...)``, such as :attr:`probs`, with C as its last axis."""
        first = x.dim() > 3 if self.channel is None else self.channel == 1
        return x.movedim(1, -1) if first else x

    def _value(self, name: str) -> Tensor:
        if name not in self.values:
            advice = " Ask for it with keep_samples=True." if name == "samples" else ""
            raise UnknownAttribute(
                type(self),
                name,
                why=f"This prediction has no {name!r}; it has {', '.join(sorted(self.values))}, entropy, "
                f"position_entropy, mutual_information, log_prob and distribution.{advice}",
            )
        return self.values[name]

    @property
    def probs(self) -> Tensor:
        """Mean probabilities ``(N, C)``, or in the layout of the outputs; see the class."""
        return self._value("probs")

    @property
    def mean(self) -> Tensor:
        """Predictive mean ``(N, C)``, or in the layout of the outputs; see the class."""
        return self._value("mean")

    @property
    def variance(self) -> Tensor:
        """Predictive variance ``(N, C)``, noise included, or in the layout of the outputs; see the class."""
        return self._value("variance")

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance of the sampled conditional means ``(N, C)``, or in the layout of the outputs; see the class."""
        return self._value("epistemic_variance")

    @property
    def samples(self) -> Tensor:
        """Sampled network outputs ``(S, N, ...)``; see the class."""
        return self._value("samples")

    @cached_property
    def _position_entropies(self) -> tuple[Tensor, Tensor | None]:
        return self.entropies()

    @property
    def position_entropy(self) -> Tensor:
        """Entropy by position in nats, ``(N, T)`` or ``(N, H, W)``; see the class."""
        return self._position_entropies[0]

    @property
    def entropy(self) -> Tensor:
        """``(N,)`` entropy in nats; see the class."""
        return self.position_entropy.flatten(1).sum(1)

    @property
    def mutual_information(self) -> Tensor:
        """``(N,)`` mutual information of target and weights in nats; see the class."""
        total, conditional = self._position_entropies
        if conditional is None:
            if self.information is None:
                raise UnknownAttribute(type(self), "mutual_information", why=NO_INFORMATION)
            return self.information().flatten(1).sum(1).clamp_min(0.0)
        # Jensen makes it non-negative; only rounding could not.
        return (total - conditional).flatten(1).sum(1).clamp_min(0.0)

    @cached_property
    def distribution(self) -> Distribution:
        """The predictive as a ``torch.distributions`` object; see the class."""
        return self.build()

    def log_prob(self, y: Tensor) -> Tensor:
        """Log predictive density of targets.

        Args:
            y: targets as the likelihood's ``log_prob`` takes them; ignored ones contribute 0.

        Returns:
            ``(N,)`` in nats, summed over the positions of an example.

        Raises:
            ShapeMismatch, ValueError: if the targets do not fit.
        """
        if isinstance(y, list) and y and all(isinstance(value, (int, float)) for value in y):
            y = torch.tensor(y)
        found = self.density(to_tensors(y))
        return found if found.dim() == 1 else found.flatten(1).sum(1)

    def interval(self, level: float = 0.9, of: str = "observation") -> tuple[Tensor, Tensor]:
        """Central intervals of real targets and counts.

        Args:
            level: probability that they are to hold.
            of: ``"observation"`` for a new target, ``"mean"`` for its mean (the spread of the weights alone).

        Returns:
            Lower and upper ends, each in the layout of :attr:`mean`, ``(N, C)``: exact quantiles of a mixture of
            several posteriors of normal targets, else those of a normal distribution with the prediction's mean and
            variance. After ``posterior.calibrate(data)`` those of an observation are
            calibrated: each output's interval holds at least ``level`` of new examples that are exchangeable with the
            data (:mod:`laplace_kf.outputs.conformal`).

        Raises:
            ValueError: for a level outside (0, 1), or another ``of``.
            IncompatiblePair: for predictions of classes.
        """
        return interval(self, level, of)

    def prediction_set(self, level: float = 0.9) -> Tensor:
        """Which classes belong to a set that holds the right one with probability ``level``, bool ``(N, C)``.

        The most probable classes until their probabilities reach ``level``; after ``posterior.calibrate(data)`` until
        they reach the threshold that held ``level`` of those data, which guarantees the coverage of exchangeable
        examples. The most probable class is always in it.

        Raises:
            ValueError: for a level outside (0, 1).
            IncompatiblePair: for predictions without classes that exclude each other, or with several positions.
        """
        return prediction_set(self, level)

    def top_k(self, k: int) -> TopClasses:
        """The k most probable classes, their probabilities ``(N, k)`` and the probability of all others ``(N,)``.

        In the layout of :attr:`probs`, with k in place of C. For thousands of classes and many inputs
        ``posterior.predict_top_k(loader, k)`` keeps nothing else.

        Raises:
            ValueError: for k below 1 or above the number of classes.
            IncompatiblePair: for predictions without classes that exclude each other.
        """
        probs = self.values.get("probs")
        first = probs is not None and (probs.dim() > 3 if self.channel is None else self.channel == 1)
        return top_classes(self, probs, 1 if first else -1, k)

    def kept(self, y: Tensor) -> Tensor:
        """Which targets count, of the shape of ``y`` (bool): all but the likelihood's ``ignore_index`` and NaN."""
        kept = torch.ones_like(y, dtype=torch.bool) if self.ignore_index is None else y != self.ignore_index
        return kept & ~torch.isnan(y) if y.is_floating_point() else kept

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.values.items())
        return f"{type(self).__name__}({shapes})"


def given(total: Tensor, conditional: Tensor) -> tuple[Tensor, Tensor]:
    """Returns its arguments; a ``partial`` of it is a picklable constant."""
    return total, conditional


def log_mean_exp(x: Tensor) -> Tensor:
    """``log (1/S) Σ_s exp x_s`` over the first dimension, without over- or underflow."""
    return torch.logsumexp(x, 0) - math.log(x.shape[0])


def by_position(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``(N, T)`` in the layout of ``position_entropy``."""
    return x if len(shape) < 4 else x.reshape(scalar_shape(shape))


def mixture_batch(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``(S, N, T, E)`` to ``(*positions, S, E)``, the batch layout of ``MixtureSameFamily``."""
    return x.permute(1, 2, 0, 3).reshape(*scalar_shape(shape), x.shape[0], x.shape[-1])


def uniform_mixture(batch: Sequence[int], samples: int, like: Tensor) -> Categorical:
    """Equal weights over samples."""
    return of_logits(torch.zeros(*batch, samples, dtype=like.dtype, device=like.device))


def of_logits(logits: Tensor) -> Categorical:
    """Classes with these logits ``(..., C)``; also for no example, of which torch cannot check that they are real."""
    return Categorical(logits=logits, validate_args=None if logits.numel() else False)


# ------------------------------------------------------------------------------------------------- binary variables


def _binary_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_p.exp() * log_p + log_q.exp() * log_q)


def _binary_density(log_p: Tensor, log_q: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    return masked(y * log_p + (1.0 - y) * log_q, keep)


def _binary_distribution(log_p: Tensor, log_q: Tensor, shape: Sequence[int]) -> Distribution:
    return Independent(Bernoulli(logits=from_positions(log_p - log_q, shape)), len(shape) - 1)


def binary_mixture(log_p: Tensor, log_q: Tensor, shape: Sequence[int], density: Density) -> Prediction:
    """Prediction of independent binary outputs.

    Args:
        log_p: ``(S, N, T, E)`` log probabilities of 1.
        log_q: ``(S, N, T, E)`` log probabilities of 0; kept apart because ``log1p(-exp(log_p))`` loses them.
        shape: of one set of outputs.
        density: evaluates ``(y, keep) → (N, T, ...)`` at checked targets.
    """
    conditional = _binary_entropy(log_p, log_q).mean(0).sum(-1)
    # The mean of probabilities can exceed 1 by a rounding error.
    log_p, log_q = log_mean_exp(log_p).clamp_max(0.0), log_mean_exp(log_q).clamp_max(0.0)
    total = _binary_entropy(log_p, log_q).sum(-1)
    return Prediction(
        values={"probs": from_positions(log_p.exp(), shape)},
        density=partial(density, partial(_binary_density, log_p, log_q)),
        entropies=partial(given, by_position(total, shape), by_position(conditional, shape)),
        build=partial(_binary_distribution, log_p, log_q, tuple(shape)),
    )


# ------------------------------------------------------------------------------------------------- normal variables


def gaussian_entropy(variance: Tensor) -> Tensor:
    """Entropy in nats of a normal variable with the given variance, elementwise."""
    return 0.5 * (LOG_2PI + 1.0 + variance.log())


def normal_density(mean: Tensor, log_variance: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """``(N, T)`` log densities of a mixture of normals over ``mean (S, N, T, E)``, joint over the outputs."""
    elements = -0.5 * ((y - mean).square() * (-log_variance).exp() + log_variance + LOG_2PI)
    return log_mean_exp(masked(elements, keep).sum(-1))


def _normal_distribution(mean: Tensor, log_variance: Tensor, shape: Sequence[int]) -> Distribution:
    loc = mixture_batch(mean, shape)
    scale = mixture_batch((0.5 * log_variance).exp().expand_as(mean), shape)
    weights = uniform_mixture(scalar_shape(shape), mean.shape[0], loc)
    return MixtureSameFamily(weights, Independent(Normal(loc, scale), 1))


def _normal_entropies(
    mean: Tensor, log_variance: Tensor, variance: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of the mixture, and the mean of its components'; made when they are asked for."""
    total = gaussian_entropy(variance).sum(-1)
    conditional = (0.5 * (LOG_2PI + 1.0 + log_variance)).expand_as(mean).mean(0).sum(-1)
    return by_position(total, shape), by_position(conditional, shape)


def normal_mixture(mean: Tensor, log_variance: Tensor, shape: Sequence[int], density: Density) -> Prediction:
    """Prediction of normal outputs: a mixture of normals, joint over the outputs of a position.

    Args:
        mean: ``(S, N, T, E)``.
        log_variance: broadcastable to ``mean``.
        shape: of one set of outputs.
        density: evaluates ``(y, keep) → (N, T, ...)`` at checked targets.
    """
    epistemic = mean.var(0, correction=0)
    variance = epistemic + log_variance.exp().expand_as(mean).mean(0)
    return Prediction(
        values={
            "mean": from_positions(mean.mean(0), shape),
            "variance": from_positions(variance, shape),
            "epistemic_variance": from_positions(epistemic, shape),
        },
        density=partial(density, partial(normal_density, mean, log_variance)),
        entropies=partial(_normal_entropies, mean, log_variance, variance, tuple(shape)),
        build=partial(_normal_distribution, mean, log_variance, tuple(shape)),
    )
