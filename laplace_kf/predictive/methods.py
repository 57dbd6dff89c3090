"""Prediction methods by name: each turns one request into a :class:`~laplace_kf.likelihoods.Prediction`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite, to_device
from laplace_kf.errors import IncompatiblePair, NonFinite, NotFitted
from laplace_kf.likelihoods import Likelihood, Prediction
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise
from laplace_kf.outputs.spread import Spread
from laplace_kf.predictive.calls import outputs_at, require_movable
from laplace_kf.predictive.draws import draw_seeds
from laplace_kf.predictive.functions import function_draws
from laplace_kf.predictive.linearized import Linearization
from laplace_kf.predictive.montecarlo import independent_examples, monte_carlo
from laplace_kf.registry import Registry

__all__ = ["PREDICTION_METHODS", "PredictionMethod", "Request", "linearized"]


@dataclass(frozen=True)
class Request:
    """What a prediction is to be made from.

    Attributes:
        model: the network; never changed.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        likelihood: of the targets.
        mean: posterior mean by parameter name, each of its parameter's shape.
        precision: () → posterior precision; asked only by methods that need it.
        inputs: what the model takes, N examples.
        samples: number of draws.
        generator: random numbers.
        space: where Monte Carlo draws are made, a name of :data:`laplace_kf.predictive.SPACES`.
        draws: kind of Monte Carlo draws, a name of :data:`laplace_kf.predictive.DRAWS`.
        link: name of a link of the likelihood, or ``None``.
        keep_samples: whether the prediction keeps the drawn outputs ``(S, N, ...)``.
        temperature: what ``"temperature"`` divides the logits by (predicted noise: multiplies); ``None`` if none was
            chosen.
    """

    model: nn.Module
    forward: Forward | None
    likelihood: Likelihood
    mean: Mapping[str, Tensor]
    precision: Callable[[], Blockwise]
    inputs: Any
    samples: int = 100
    generator: torch.Generator | None = None
    space: str = "auto"
    draws: str = "independent"
    link: str | None = None
    keep_samples: bool = False
    temperature: float | None = None

    def without_link(self, method: str) -> None:
        """Raises :class:`IncompatiblePair` if a link was given to a method that has no use for one."""
        if self.link is not None:
            raise IncompatiblePair(
                f'method="{method}" takes no link (got link={self.link!r}); use method="linearized", or leave it out'
            )


PredictionMethod = Callable[[Request], Prediction]
PREDICTION_METHODS: Registry[PredictionMethod] = Registry("prediction method")


@PREDICTION_METHODS.register("mc")
def _monte_carlo(request: Request) -> Prediction:
    """Average over draws of weights or pre-activations (methods 10.1)."""
    request.without_link("mc")
    drawn = monte_carlo(
        request.model, request.forward, request.mean, request.precision(), request.inputs, request.samples,
        request.space, request.draws, request.generator, functions=request.keep_samples,
    )  # fmt: skip
    found = request.likelihood.predict(drawn, keep_samples=request.keep_samples)
    return replace(found, independent_samples=independent_examples(request.space))


@PREDICTION_METHODS.register("map")
def _mean_weights(request: Request) -> Prediction:
    """The network at the mean weights."""
    request.without_link("map")
    return request.likelihood.predict(_outputs(request), keep_samples=request.keep_samples)


@PREDICTION_METHODS.register("temperature")
def _tempered(request: Request) -> Prediction:
    """The network at the mean weights, its logits divided by a temperature or its predicted noise multiplied by it."""
    request.without_link("temperature")
    if not request.likelihood.has_temperature:
        raise IncompatiblePair(
            f"{request.likelihood!r} has no logits that a temperature could divide, and predicts no noise that it "
            'could multiply; use method="map" or "linearized"'
        )
    if request.temperature is None:
        raise NotFitted(
            'method="temperature" needs a temperature: call posterior.tune(val) first, or set posterior.temperature'
        )
    outputs = request.likelihood.tempered(_outputs(request)[0], request.temperature)[None]
    return request.likelihood.predict(outputs, keep_samples=request.keep_samples)


def _outputs(request: Request) -> Tensor:
    """At the mean weights, ``(1, N, ...)``."""
    inputs = to_device(request.inputs, next(iter(request.mean.values())).device)
    require_movable(request.model, request.forward, request.mean, inputs)
    with preserved(request.model):
        outputs = outputs_at(request.model, request.forward, request.mean, inputs)[None]
    check_finite(outputs, 0, "the model's output")
    return outputs


@PREDICTION_METHODS.register("linearized")
def _linearized(request: Request) -> Prediction:
    """Normal outputs of the network linearised at the mean weights, through the likelihood's link."""
    network = Linearization(request.model, request.forward, request.mean, request.inputs, keep=False, announce=True)
    return linearized(request, network, [request.precision()])[0]


@PREDICTION_METHODS.register("probit")
def _probit(request: Request) -> Prediction:
    """As ``linearized`` with the probit approximation, which needs the variances of the outputs only."""
    if request.link not in (None, "probit"):
        raise IncompatiblePair(f'method="probit" is itself a link (got link={request.link!r}); use method="linearized"')
    if "probit" not in request.likelihood.links():
        raise IncompatiblePair(
            f'{request.likelihood!r} has no probit approximation; use method="linearized" with one of the links '
            f"{', '.join(map(repr, request.likelihood.links()))}"
        )
    return _linearized(replace(request, link="probit"))


def linearized(request: Request, network: Linearization, precisions: list[Blockwise]) -> list[Prediction]:
    """Predictions of one linearised network for several precisions, with common random numbers.

    Raises:
        UnknownName: for a link that the likelihood does not have.
        NonFinite: if a variance is not finite; says which knob to turn.
    """
    rule = request.likelihood.link(request.link)
    variances, found = network.moments(precisions, request.likelihood, marginal=rule.marginal)
    covariances: Sequence[Tensor | Spread | None] = found or [None] * len(precisions)
    if not bool(torch.isfinite(variances.detach()).all()):
        raise NonFinite("variances of the outputs have NaN or infinite entries; increase prior_precision or n_data")
    seed = draw_seeds(1, request.generator)[0]
    made = [
        request.likelihood.predict_gaussian(
            network.outputs, variance, covariance, request.link, request.samples, torch.Generator().manual_seed(seed)
        )
        for variance, covariance in zip(variances, covariances, strict=True)
    ]
    if not request.keep_samples:
        return made
    # the link's own draws share their noise over inputs, so that a prediction does not depend on the batch around it
    functions = [
        function_draws(network, precision, request.samples, torch.Generator().manual_seed(seed))
        for precision in precisions
    ]
    return [replace(p, values={**p.values, "samples": f}) for p, f in zip(made, functions, strict=True)]
