"""Predictions from normally distributed outputs, as a linearised network has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from laplace_kf.likelihoods.prediction import (
    LOG_2PI,
    Density,
    PredictDraws,
    Prediction,
    by_position,
    gaussian_entropy,
    given,
    normal_mixture,
)
from laplace_kf.outputs.layout import from_positions, masked, scalar_shape
from laplace_kf.outputs.spread import Spread, covariance_root, runs

__all__ = ["GaussianOutputs", "Link"]


@dataclass(frozen=True)
class GaussianOutputs:
    """Network outputs that are normal at every position, ``N(mean, covariance)``, as a linearised network has them.

    Attributes:
        mean: ``(N, T, C)``.
        variance: ``(N, T, C)``.
        covariance: ``(N, T, C, C)``, or what it is made of; ``None`` where the link needs the variances alone.
        shape: of the outputs in the model's layout.
        samples: number of draws for links that need them.
        generator: their random numbers.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | Spread | None
    shape: Sequence[int]
    samples: int
    generator: torch.Generator

    @cached_property
    def noise(self) -> Tensor:
        """Standard normal numbers ``(H, M)`` behind the draws, ``H`` half of S, rounded up; drawn once."""
        structured = isinstance(self.covariance, Spread)
        width = self.covariance.noise_size if isinstance(self.covariance, Spread) else self.mean.shape[-1]
        # many numbers are drawn in the outputs' own type: it is what most of the time goes to
        dtype = torch.float32 if structured and self.mean.dtype != torch.float64 else torch.float64
        size = ((self.samples + 1) // 2, width)
        found = torch.randn(size, generator=self.generator, device=self.generator.device, dtype=dtype)
        return found.to(self.mean)

    @cached_property
    def draws(self) -> Tensor:
        """Antithetic draws ``(S, N, T, C)``; the same standard normal numbers serve every example and position.

        So an example's prediction does not depend on the batch around it, and neighbouring (N, λ) are compared under
        common random numbers.
        """
        noise, rest = self.noise, self.samples // 2
        if self.covariance is None:
            spread = noise[:, None, None, :] * self.variance.clamp_min(0.0).sqrt()
        elif isinstance(self.covariance, Spread):
            spread = self.covariance.colour(noise)
        else:
            spread = torch.einsum("ntij,sj->snti", covariance_root(self.covariance), noise)
        return torch.cat([self.mean + spread, self.mean - spread[:rest]])

    def draw_blocks(self, numbers: int) -> Iterator[Tensor]:
        """The draws of :attr:`draws`, some ``(s, N, T, C)`` at a time, in tensors of their own; ``s`` is at least 2.

        Only of outputs whose covariance is a :class:`~laplace_kf.outputs.spread.Spread`.

        Args:
            numbers: at most so many numbers in a block, where two draws are not more.
        """
        assert isinstance(self.covariance, Spread)
        stop = 0
        for spread in self.covariance.coloured(self.noise, max(1, numbers // (2 * self.mean.numel()))):
            stop += len(spread)
            block = spread.new_empty(2, *spread.shape)
            torch.add(self.mean, spread, out=block[0])
            torch.sub(self.mean, spread, out=block[1])
            block = block.flatten(0, 1)
            yield block[:-1] if self.samples % 2 and stop == len(self.noise) else block

    def part(self, examples: slice) -> GaussianOutputs:
        """Those of some examples; with an equal generator, of the same draws."""
        full, mean = self.covariance, self.mean[examples]
        return replace(
            self,
            mean=mean,
            variance=self.variance[examples],
            covariance=full.part(examples) if isinstance(full, Spread) else None if full is None else full[examples],
            shape=(len(mean), *self.shape[1:]),
        )

    def covariances(self, noise: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Runs of examples with their covariances ``(n, T, C, C)``, those of ``noise (N, T, C)`` added."""
        full = self.covariance
        assert full is not None
        count, positions, width = self.mean.shape
        if not isinstance(full, Spread):
            yield slice(0, count), full + torch.diag_embed(noise)
            return
        for part in runs(count, positions * width**2):
            yield part, full.part(part).covariance() + torch.diag_embed(noise[part])


@dataclass(frozen=True)
class Link:
    """From normal outputs to a predictive distribution.

    Attributes:
        predict: the rule.
        marginal: whether the variances of the outputs suffice.
    """

    predict: Callable[[GaussianOutputs], Prediction]
    marginal: bool


def without_components(prediction: Prediction, outputs: GaussianOutputs, predict: PredictDraws) -> Prediction:
    """The prediction of one set of probabilities that stands for a mixture whose components are not known.

    Its mutual information is that of draws of the outputs (with what is known of their covariance), made on demand.

    Args:
        prediction: by a closed form.
        outputs: the normal outputs behind it.
        predict: draws ``(S, N, T, C)`` and the shape of one set of outputs → the mixture's prediction.
    """
    seed = int(torch.randint(2**62, (), generator=outputs.generator, device=outputs.generator.device))
    spread = (outputs.mean, outputs.variance, outputs.covariance, tuple(outputs.shape), outputs.samples)
    information = partial(_drawn_information, predict, spread, seed)
    return replace(prediction, entropies=partial(given_total, prediction.position_entropy), information=information)


def _drawn_information(predict: PredictDraws, spread: tuple[Any, ...], seed: int) -> Tensor:
    mean, variance, covariance, shape, samples = spread
    rng = torch.Generator().manual_seed(seed)
    outputs = GaussianOutputs(mean, variance, covariance, shape, samples, rng)
    total, conditional = predict(outputs.draws, torch.Size(outputs.shape)).entropies()
    assert conditional is not None
    return total - conditional


def given_total(total: Tensor) -> tuple[Tensor, None]:
    """An entropy without that of the components."""
    return total, None


def joint_normal_density(mean: Tensor, covariance: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """``(N, T)`` log densities of normals with ``mean (N, T, E)`` and ``covariance (N, T, E, E)``."""
    residual = masked(y - mean, keep)
    count: Tensor | float = float(mean.shape[-1])
    if keep is not None:  # an output that is left out: an independent standard normal one at its mean
        keep = keep.expand_as(mean)
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        covariance = torch.where(keep.unsqueeze(-1) & keep.unsqueeze(-2), covariance, eye)
        count = keep.sum(-1).to(mean.dtype)
    lower = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(lower, residual.unsqueeze(-1), upper=False).squeeze(-1)
    logdet = 2.0 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white.square().sum(-1) + logdet + count * LOG_2PI)


def joint_outputs_density(outputs: GaussianOutputs, noise: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """``(N,)`` log densities of targets ``(N, T, E)`` under ``N(f, V + noise)``, a run of examples at a time."""
    noise = noise.expand_as(outputs.mean)
    return _concatenated(
        joint_normal_density(outputs.mean[part], covariance, y[part], None if keep is None else keep[part])
        for part, covariance in outputs.covariances(noise)
    )


def _concatenated(parts: Iterable[Tensor]) -> Tensor:
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found)


def _joint_normal_entropy(outputs: GaussianOutputs, noise: Tensor) -> tuple[Tensor, Tensor]:
    constant = 0.5 * outputs.mean.shape[-1] * (LOG_2PI + 1.0)
    half = _concatenated(
        torch.linalg.cholesky(covariance).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        for _, covariance in outputs.covariances(noise)
    )
    rest = gaussian_entropy(noise).sum(-1)
    return by_position(constant + half, outputs.shape), by_position(rest, outputs.shape)


def _joint_normal(outputs: GaussianOutputs, noise: Tensor) -> Distribution:
    batch, width = scalar_shape(outputs.shape), outputs.mean.shape[-1]
    if isinstance(outputs.covariance, Spread):
        full = outputs.covariance.covariance() + torch.diag_embed(noise)  # refused where it is too large
    else:
        full = _concatenated(covariance for _, covariance in outputs.covariances(noise))
    checked = None if outputs.mean.numel() else False  # torch cannot check none
    mean = outputs.mean.reshape(*batch, width)
    return MultivariateNormal(mean, full.reshape(*batch, width, width), validate_args=checked)


def normal_outputs(outputs: GaussianOutputs, noise: Tensor, density: Density) -> Prediction:
    """Exact prediction of normal targets with a known noise variance: ``N(f, V + noise)``.

    Joint over the outputs of a position if their covariance is known, else with its marginals. Entropies are exact.

    Args:
        outputs: the network's outputs.
        noise: variance, broadcastable to ``(N, T, C)``.
        density: evaluates ``(y, keep) → (N, T, ...)`` at checked targets.
    """
    mean, shape = outputs.mean, tuple(outputs.shape)
    noise = noise.expand_as(mean)
    if outputs.covariance is None:
        log_variance = (outputs.variance + noise).log()
        prediction = normal_mixture(mean[None], log_variance[None], shape, density)
        total, rest = gaussian_entropy(log_variance.exp()).sum(-1), gaussian_entropy(noise).sum(-1)
        entropies = partial(given, by_position(total, shape), by_position(rest, shape))
        build = partial(_independent_normal, mean, log_variance, shape)
        prediction = replace(prediction, entropies=entropies, build=build)
    else:
        prediction = Prediction(
            values={"mean": from_positions(mean, shape)},
            density=partial(density, partial(joint_outputs_density, outputs, noise)),
            entropies=partial(_joint_normal_entropy, outputs, noise),
            build=partial(_joint_normal, outputs, noise),
        )
    return with_moments(prediction, mean, outputs.variance + noise, outputs.variance, shape)


def _independent_normal(mean: Tensor, log_variance: Tensor, shape: Sequence[int]) -> Distribution:
    batch, width = scalar_shape(shape), mean.shape[-1]
    return Independent(Normal(mean.reshape(*batch, width), (0.5 * log_variance).exp().reshape(*batch, width)), 1)


def with_moments(
    prediction: Prediction, mean: Tensor, variance: Tensor, epistemic: Tensor, shape: Sequence[int]
) -> Prediction:
    """A prediction with the moments ``(N, T, E)`` that are known in closed form."""
    moments = {"mean": mean, "variance": variance, "epistemic_variance": epistemic}
    values = {name: from_positions(value, shape) for name, value in moments.items()}
    return replace(prediction, values={**prediction.values, **values})
