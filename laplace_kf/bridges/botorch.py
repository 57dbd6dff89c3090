"""BoTorch: a posterior as the surrogate of Bayesian optimisation::

    surrogate = lk.bridges.botorch.LaplaceModel(posterior)
    acquisition = qLogExpectedImprovement(surrogate, best_f=y.max())
    candidates, value = optimize_acqf(acquisition, bounds, q=2, num_restarts=10, raw_samples=128)

The surrogate is the network linearised at the posterior mean (methods 10.3): outputs at any points are jointly normal,
``f(x) + J(x) ε`` with ``ε ~ N(0, Λ⁻¹)``, a Gaussian process with the kernel ``J Λ⁻¹ Jᵀ``. Observations condition it
exactly in function space, with no pass over the training data and for every structure, batches of fantasies included.

Needs BoTorch: ``pip install botorch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, MissingPackage, ShapeMismatch
from laplace_kf.likelihoods import Gaussian
from laplace_kf.models import lasting
from laplace_kf.operators import fresh_generator
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.predictive import Linearization
from laplace_kf.predictive.asked import asked
from laplace_kf.predictive.functions import function_draws
from laplace_kf.replica import stage

try:
    from botorch.models.model import Model
    from botorch.posteriors import GPyTorchPosterior
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from linear_operator import to_linear_operator
except ImportError as error:
    raise MissingPackage(
        "The bridge to BoTorch needs the package 'botorch', which is not installed: pip install botorch",
        name=error.name,
    ) from error

__all__ = ["LaplaceModel"]

JOINT = 512  # outputs whose joint covariance is made at once; of it the blocks on the diagonal are kept


class LaplaceModel(Model):
    """A fitted posterior as a ``botorch.models.model.Model``.

    Letters of BoTorch: ``b`` batches of ``q`` points of ``d`` features, ``m`` outputs.

    Args:
        posterior: fitted; of a network with outputs ``(N, m)``. It is used as it is at each call.
        num_outputs: m; needed only where it is not known from the fit (likelihoods other than the Gaussian one).

    Raises:
        NotFitted: before ``fit``.
        IncompatiblePair: if m is not known.
    """

    def __init__(self, posterior: LaplacePosterior, num_outputs: int | None = None) -> None:
        super().__init__()
        statistics = posterior.statistics
        if num_outputs is None:
            if not isinstance(posterior.likelihood, Gaussian) or statistics.terms % statistics.count:
                raise IncompatiblePair(
                    f"the number of outputs is not known from a fit with {posterior.likelihood!r}; say it: "
                    "LaplaceModel(posterior, num_outputs=1)"
                )
            num_outputs = round(statistics.terms / statistics.count)
        self.laplace, self._outputs = posterior, num_outputs
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_outputs(self) -> int:
        """m."""
        return self._outputs

    @property
    def batch_shape(self) -> torch.Size:
        """Of the observations that condition the surrogate; empty without any."""
        return torch.Size() if self._seen is None else self._seen[1].shape[:-2]

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The joint distribution of the outputs at ``X (b, q, d)``, differentiable in ``X``.

        Args:
            X: points; any number of batch dimensions.
            output_indices: outputs to keep; default all.
            observation_noise: add the noise of the Gaussian likelihood, or a tensor of variances that broadcasts to
                ``(b, q, m)``.
            posterior_transform: applied to the result.

        Returns:
            A ``GPyTorchPosterior`` over ``(b, q, m)``.

        Raises:
            IncompatiblePair: for ``observation_noise=True`` with a likelihood that is not Gaussian.
            ShapeMismatch: if the network's outputs at ``X`` are not ``(N, m)``.
        """
        mean, covariance = self._conditioned(X)
        q, m = mean.shape[-2:]
        if observation_noise is not False:
            given = observation_noise if isinstance(observation_noise, Tensor) else None
            added = self._noise(given, mean)
            covariance = covariance + torch.diag_embed(added.reshape(*mean.shape[:-2], q * m))
        if output_indices is not None:
            chosen = torch.as_tensor(output_indices, device=mean.device)
            rows = (torch.arange(q, device=mean.device)[:, None] * m + chosen).reshape(-1)
            mean, covariance, m = mean[..., chosen], covariance[..., rows, :][..., rows], len(chosen)
        # An operator is decomposed when it is needed, with jitter where points coincide; a tensor at once, and without.
        spread = to_linear_operator(covariance)
        if m == 1:
            normal: Any = MultivariateNormal(mean.squeeze(-1), spread)
        else:
            normal = MultitaskMultivariateNormal(mean, spread, interleaved=True)
        found = GPyTorchPosterior(normal)
        return found if posterior_transform is None else posterior_transform(found)

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> LaplaceModel:
        """The surrogate after more observations; this one stays.

        Args:
            X: points ``(b, n, d)``.
            Y: their values ``(..., b, n, m)``, with any further batch dimensions in front (fantasies).
            noise: variances ``(..., n, m)``; default: of the Gaussian likelihood.

        Raises:
            IncompatiblePair: without ``noise``, for a likelihood that is not Gaussian.
            ShapeMismatch: if ``X`` and ``Y`` do not belong together.
        """
        if Y.ndim < 2 or X.ndim < 2 or Y.shape[-1] != self._outputs or Y.shape[-2] != X.shape[-2]:
            raise ShapeMismatch(
                f"observations are X (..., n, d) and Y (..., n, {self._outputs}), got {tuple(X.shape)} and "
                f"{tuple(Y.shape)}"
            )
        variance = self._noise(noise, Y)
        made = LaplaceModel(self.laplace, self._outputs)
        if self._seen is not None:
            old_x, old_y, old_variance = self._seen
            batch = torch.broadcast_shapes(old_y.shape[:-2], X.shape[:-2], Y.shape[:-2])
            X, Y, variance = (
                torch.cat([a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])], -2)
                for a, b in ((old_x, X), (old_y, Y), (old_variance, variance))
            )
        made._seen = X, Y, variance
        return made

    def fantasize(
        self, X: Tensor, sampler: Any, observation_noise: Tensor | None = None, **kwargs: Any
    ) -> LaplaceModel:
        """The surrogate after draws of its own at ``X (b, n, d)``, one batch of it for each draw."""
        drawn = sampler(self.posterior(X, observation_noise=True if observation_noise is None else observation_noise))
        return self.condition_on_observations(X, drawn, noise=observation_noise)

    def paths(self, samples: int, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
        """S draws of functions, for Thompson sampling: a callable ``X (b, q, d) -> (S, b, q, m)``, without gradients.

        Raises:
            IncompatiblePair: for a surrogate that was conditioned; use ``posterior(X).rsample`` there.
        """
        if self._seen is not None:
            raise IncompatiblePair(
                "draws of functions are of the fitted posterior, and this surrogate was conditioned on observations; "
                "use surrogate.posterior(X).rsample(), or fit a posterior with them: posterior.update((X, Y))"
            )
        source = generator if generator is not None else fresh_generator()
        seed = int(torch.randint(2**62, (), generator=source, device=source.device))
        precision = self.laplace.precision

        def drawn(X: Tensor) -> Tensor:
            with lasting(), torch.no_grad(), stage(self.laplace.model, self.laplace.forward) as (model, forward):
                network = self._network(model, forward, X.reshape(-1, X.shape[-1]))
                found = function_draws(network, precision, samples, torch.Generator().manual_seed(seed))
            return found.reshape(samples, *X.shape[:-1], self._outputs).to(X)

        return drawn

    # -- how it is found ---------------------------------------------------------------------------------------------

    def _network(self, model: Any, forward: Any, points: Tensor) -> Linearization:
        mean = self.laplace.mean
        like = next(iter(mean.values()))
        network = Linearization(model, forward, mean, asked(model, forward, points.to(like)), keep=False)
        if network.outputs.shape[1:] != (self._outputs,):
            raise ShapeMismatch(
                f"a surrogate's outputs are (N, {self._outputs}), got {tuple(network.outputs.shape)}; say how many: "
                "LaplaceModel(posterior, num_outputs=...)"
            )
        return network

    def _noise(self, given: Tensor | None, like: Tensor) -> Tensor:
        """Variances of the noise, in the shape of ``like (..., m)``."""
        if given is None:
            likelihood = self.laplace.likelihood
            if not isinstance(likelihood, Gaussian):
                raise IncompatiblePair(
                    f"{likelihood!r} has no noise that is added to the outputs; pass a tensor of variances, or leave "
                    "observation_noise out"
                )
            given = torch.as_tensor(likelihood.scale).detach() ** 2
        return given.to(like).expand(like.shape)

    def _conditioned(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(b, q, m)`` and covariance ``(b, q·m, q·m)`` given the observations."""
        if self._seen is None:
            return self._prior(X)
        old_x, y, variance = (part.to(X) for part in self._seen)
        batch = torch.broadcast_shapes(X.shape[:-2], y.shape[:-2])
        old_x, y, variance, X = (part.expand(*batch, *part.shape[-2:]) for part in (old_x, y, variance, X))
        mean, covariance = self._prior(torch.cat([old_x, X], -2))
        n = old_x.shape[-2]
        known = n * self._outputs
        seen = covariance[..., :known, :known] + torch.diag_embed(variance.flatten(-2))
        between = covariance[..., :known, known:]
        solved = torch.cholesky_solve(between, torch.linalg.cholesky(seen))
        shift = solved.mT @ (y - mean[..., :n, :]).flatten(-2)[..., None]
        moved = mean[..., n:, :] + shift.reshape(mean[..., n:, :].shape)
        return moved, covariance[..., known:, known:] - between.mT @ solved

    def _prior(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the fitted posterior alone, in the type of ``X``."""
        batch, (p, d), m = X.shape[:-2], X.shape[-2:], self._outputs
        groups = X.reshape(-1, p, d)
        size = max(1, JOINT // max(1, p * m))
        means, covariances = [], []
        precision = self.laplace.precision
        with lasting(), stage(self.laplace.model, self.laplace.forward) as (model, forward):
            for part in groups.split(size):
                network = self._network(model, forward, part.reshape(-1, d))
                count = len(part)
                if p == 1:
                    block = network.covariance(precision)
                else:
                    joint = network.covariance(precision, joint=True).reshape(count, p * m, count, p * m)
                    block = joint.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
                means.append(network.outputs.reshape(count, p, m).to(X))
                covariances.append(block.to(X))
        mean = torch.cat(means) if means else X.new_zeros(0, p, m)
        covariance = torch.cat(covariances) if covariances else X.new_zeros(0, p * m, p * m)
        return mean.reshape(*batch, p, m), covariance.reshape(*batch, p * m, p * m)
