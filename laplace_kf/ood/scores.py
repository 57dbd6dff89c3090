"""Kinds of out-of-distribution scores by name; all are larger the stranger an input is.

A new kind is one function ``(request) -> (N,)``, registered in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, NotFitted
from laplace_kf.likelihoods import Likelihood, Prediction, to_positions
from laplace_kf.ood.leverage import Leverage, total
from laplace_kf.ood.references import References, combined
from laplace_kf.predictive.padding import without_padding
from laplace_kf.registry import Registry

__all__ = ["BY_LAYERS", "KINDS", "Subject", "reference_scores", "score"]


class Subject(Protocol):
    """What a score needs of a posterior."""

    likelihood: Likelihood

    def predict(
        self, x: Any, method: str = ..., samples: int = ..., *, generator: torch.Generator | None = ...
    ) -> Prediction:
        """Predictive distribution at inputs."""

    def functional_covariance(self, x: Any, diagonal_only: bool = False) -> Tensor:
        """Variances of the outputs, in their layout ``(N, ...)``."""

    def leverage(self) -> Leverage:
        """Leverages of the layers."""

    @property
    def references(self) -> References | None:
        """In-distribution reference scores."""


@dataclass(frozen=True)
class Request:
    """What is asked of a kind of score.

    Attributes:
        subject: the posterior.
        x: inputs, N examples.
        layers: of leverages; ``None`` for what the kind takes by default.
        samples: weight draws, where a kind takes them.
        generator: their random numbers.
    """

    subject: Subject
    x: Any
    layers: str | Sequence[str] | None
    samples: int
    generator: torch.Generator | None


KINDS: Registry[Callable[[Request], Tensor]] = Registry("kind of score")


@KINDS.register("entropy")
def _entropy(request: Request) -> Tensor:
    """Entropy of the predictive distribution, in nats."""
    return request.subject.predict(request.x, samples=request.samples, generator=request.generator).entropy


@KINDS.register("mutual_information")
def _mutual_information(request: Request) -> Tensor:
    """Mutual information of target and weights over weight draws (BALD; Houlsby et al. 2011), in nats."""
    found = request.subject.predict(request.x, "mc", request.samples, generator=request.generator)
    return found.mutual_information


@KINDS.register("variance")
def _variance(request: Request) -> Tensor:
    """Epistemic variance ``J Λ⁻¹ Jᵀ`` of the outputs, summed over all outputs of an example."""
    return request.subject.functional_covariance(request.x, diagonal_only=True).flatten(1).sum(1)


@KINDS.register("max_prob")
def _max_prob(request: Request) -> Tensor:
    """One minus the largest class probability by the probit approximation, summed over positions."""
    likelihood = request.subject.likelihood
    if "probit" not in likelihood.links():
        raise IncompatiblePair(f'kind="max_prob" needs class probabilities, which {likelihood!r} does not have')
    found = request.subject.predict(request.x, "probit", generator=request.generator)
    if "probs" not in found.values:
        raise IncompatiblePair(f'kind="max_prob" needs class probabilities, which {likelihood!r} does not have')
    probs = to_positions(found.probs)
    if not bool((probs.sum(-1) - 1).abs().max() < 1e-3):  # independent binary outputs
        return torch.minimum(probs, 1 - probs).sum((1, 2))
    return (1 - probs.amax(-1)).sum(1)


@KINDS.register("leverage")
def _leverage(request: Request) -> Tensor:
    """Sum over layers of the logarithm of the leverage (:mod:`laplace_kf.ood.leverage`)."""
    return request.subject.leverage()(request.x, request.layers or "last")


@KINDS.register("direction")
def _direction(request: Request) -> Tensor:
    """Sum over layers of the logarithm of the leverage of the input's direction: leverage per squared length."""
    return total(request.subject.leverage().by_layer(request.x, request.layers or "last").directions())


BY_LAYERS = ("leverage", "direction", "auto")
"""The kinds that are made of layers' leverages: of a mixture, the mean of its components'."""
AUTO: dict[str | None, tuple[str, ...]] = {
    None: ("entropy", "last", "last direction", "all directions"),
    "last": ("entropy", "last", "last direction"),
    "all": ("entropy", "last", "last direction", "all", "all directions"),
}
"""The scores that ``kind="auto"`` combines, by its ``layers``."""


@KINDS.register("auto")
def _auto(request: Request) -> Tensor:
    """Minus the log of the harmonic mean of upper-tail p-values among in-distribution examples: one forward pass.

    The p-values are those of the entropy at the mean weights, of the leverage of the last layer and its direction, and
    of the directions of all layers. Each sees what another one does not: the entropy strangers between classes, the
    leverage those that excite a layer in new ways, its direction those that excite it too weakly for either, and those
    of all layers other kinds of inputs, whatever the network makes of them.
    """
    references = request.subject.references
    if references is None:
        raise NotFitted(
            'kind="auto" compares with scores of in-distribution data: call posterior.tune(val_loader) or '
            "posterior.calibrate(val_loader) first (setting N, λ or the method drops them)"
        )
    if not (request.layers is None or isinstance(request.layers, str)) or request.layers not in AUTO:
        raise IncompatiblePair(f'kind="auto" takes layers=None, "last" or "all", got {request.layers!r}')
    names = AUTO[request.layers]
    if not set(names) <= set(references.scores):
        raise NotFitted(
            'the references of kind="auto" are from an older version of this package, which combined fewer scores: '
            "call posterior.calibrate(val_loader) again"
        )
    scores = reference_scores(request.subject, request.x)
    return combined([references.p_value(name, scores[name]) for name in names])


def reference_scores(subject: Subject, x: Any) -> dict[str, Tensor]:
    """Entropy at the mean weights, and log leverages of the last and of all layers and of their inputs' directions.

    Each ``(N,)``; one forward pass.
    """
    found = subject.leverage().by_layer(x, "all")
    entropy = without_padding(subject.likelihood.predict(found.outputs[None]), x, None).entropy
    leverages, directions = found.values, found.directions()
    return {
        "entropy": entropy,
        "last": total({found.last: leverages[found.last]}),
        "last direction": total({found.last: directions[found.last]}),
        "all": total(leverages),
        "all directions": total(directions),
    }


def score(
    subject: Subject,
    x: Any,
    kind: str = "auto",
    layers: str | Sequence[str] | None = None,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A score ``(N,)`` of inputs; errors as the kinds raise, and :class:`UnknownName` for another kind."""
    return KINDS[kind](Request(subject, x, layers, samples, generator)).detach()
