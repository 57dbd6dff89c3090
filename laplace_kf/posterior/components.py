"""What the components of a mixture have to share, their weights, and their shares of the draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair, InvalidArgument
from laplace_kf.likelihoods import Likelihood, Prediction
from laplace_kf.ood import References
from laplace_kf.posterior.laplace import LaplacePosterior
from laplace_kf.predictive import PREDICTION_METHODS, Predictor
from laplace_kf.registry import AUTO
from laplace_kf.weighting import Weights

__all__ = [
    "MixturePredictor",
    "MixtureSubject",
    "copied",
    "member_device",
    "method_of",
    "own_part",
    "require_own_models",
    "require_same",
    "shared_out",
    "shares_of",
    "with_samples",
]


class MixturePredictor:
    """Predictions of many batches from one set of weight draws of every component, made once.

    Args:
        mix: inputs and one prediction a component, of the same N examples → the mixture's ``(N, ...)``.
        members: the components' predictors.
        counts: how many of each component's draws count as samples.
    """

    def __init__(
        self,
        mix: Callable[[Any, Sequence[Prediction]], Prediction],
        members: Sequence[Predictor],
        counts: Sequence[int],
    ) -> None:
        self.mix, self.members, self.counts = mix, members, counts

    def __call__(self, x: Any, *, keep_samples: bool = False) -> Prediction:
        """Predictive distribution at inputs."""
        parts = [
            with_samples(member(x, keep_samples=keep_samples), count)
            for member, count in zip(self.members, self.counts, strict=True)
        ]
        return self.mix(x, parts)


@dataclass
class MixtureSubject:
    """A mixture as calibration and scores see it; inputs and outputs are of N examples, ``(N, ...)``."""

    predicted: Callable[..., Prediction]
    covariance: Callable[[Any, bool], Tensor]
    model: nn.Module
    forward: Forward | None
    weights: Weights
    likelihood: Likelihood
    mean: dict[str, Tensor]

    def predict(self, x: Any, method: str = AUTO, samples: int = 100, **settings: Any) -> Prediction:
        """The mixture's."""
        return self.predicted(x, method, samples, **settings)

    def functional_covariance(self, x: Any, diagonal_only: bool = False) -> Tensor:
        """The mixture's, ``(N, ...)``."""
        return self.covariance(x, diagonal_only)

    def leverage(self) -> Any:
        """Refused: it is each component's own."""
        raise IncompatiblePair("the components of a mixture have leverages, each its own")

    @property
    def references(self) -> References | None:
        """Each component has its own."""
        return None


def method_of(member: LaplacePosterior, method: str, link: str | None, space: str, draws: str) -> str:
    """How a component predicts where this is asked of the mixture."""
    if method != AUTO:
        _ = PREDICTION_METHODS[method]
        return method
    drawn = space != AUTO or draws != "independent"
    return "linearized" if link is not None else "mc" if drawn else member.method


def member_device(generator: torch.Generator | None) -> torch.device | str:
    """The device on which random numbers are drawn."""
    return "cpu" if generator is None else generator.device


def own_part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors (any shapes) whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def copied(posterior: LaplacePosterior) -> LaplacePosterior:
    """Another object with the same fit, whose settings are its own."""
    return copy.copy(posterior)


def with_samples(found: Prediction, count: int) -> Prediction:
    """With the first ``count`` samples, where it has any."""
    if "samples" not in found.values:
        return found
    return replace(found, values={**found.values, "samples": found.values["samples"][:count]})


def shared_out(samples: int, shares: Sequence[float]) -> list[int]:
    """How many of S samples each component gives, in proportion to the weights (largest remainders)."""
    if samples < 1:
        raise InvalidArgument(f"samples must be at least 1, got {samples}")
    exact = [samples * share for share in shares]
    counts = [int(each + 1e-9) for each in exact]
    order = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in order[: samples - sum(counts)]:
        counts[k] += 1
    return counts


def shares_of(members: Sequence[LaplacePosterior], rule: str) -> list[float]:
    """Weights of the components.

    Raises:
        IncompatiblePair: for evidences of different numbers of examples.
    """
    if rule == "equal":
        return [1.0 / len(members)] * len(members)
    for name in ("counted_data", "n_data"):
        found = [getattr(member, name) for member in members]
        if any(abs(value - found[0]) > 1e-9 * abs(found[0]) for value in found):
            what = "were fitted on different numbers of examples" if name == "counted_data" else "have different n_data"
            raise IncompatiblePair(
                f'weights="evidence" compares the evidence of the same data, but the components {what}: '
                f'{", ".join(f"{value:g}" for value in found)}; fit all on the same rows, or use weights="equal"'
            )
    logs = torch.stack([member.log_evidence().detach().double().cpu() for member in members])
    return logs.softmax(0).tolist()


def _kind(likelihood: Likelihood) -> tuple[Any, ...]:
    """What has to be the same of the components' likelihoods; noise scales and kinds of curvature may differ."""
    try:
        config = dict(likelihood.to_config())
    except IncompatiblePair:
        return type(likelihood), repr(likelihood)
    scale = config.pop("scale", None)
    config.pop("curvature", None)
    return type(likelihood), sorted(map(repr, config.items())), len(scale) if isinstance(scale, list) else 0


def require_same(first: LaplacePosterior, other: LaplacePosterior, k: int) -> None:
    """Refuses a component that does not go with the first one."""
    if _kind(first.likelihood) != _kind(other.likelihood):
        raise IncompatiblePair(
            f"component {k} has the likelihood {other.likelihood!r} and component 0 {first.likelihood!r}: the "
            "densities of a mixture are of the same targets; fit all components with one kind of likelihood"
        )
    devices = [next(iter(each.mean.values())).device for each in (first, other)]
    if devices[0] != devices[1]:
        raise IncompatiblePair(
            f"component {k} is on {devices[1]} and component 0 on {devices[0]}; move the models to one device before "
            "fit (or load all with models on one device)"
        )
    shapes = [{name: tuple(p.shape) for name, p in each.model.named_parameters()} for each in (first, other)]
    if list(shapes[0]) != list(shapes[1]):
        return  # another architecture: its outputs are compared when it predicts
    different = [name for name in shapes[0] if shapes[0][name] != shapes[1][name]]
    last = list(shapes[0])[-1:]
    owner = last[0].rpartition(".")[0] if last else ""
    if (
        different
        and all(name.rpartition(".")[0] == owner for name in different)
        and all(shapes[0][name][1:] == shapes[1][name][1:] for name in different)
    ):
        name = different[-1]
        raise IncompatiblePair(
            f"component {k} has {shapes[1][name][0]} outputs and component 0 has {shapes[0][name][0]} ({name}); the "
            "components of a mixture predict the same targets"
        )


def require_own_models(members: Sequence[LaplacePosterior]) -> None:
    """Refuses posteriors of one model object at different weights, where it keeps more than they do."""
    for k, other in enumerate(members):
        for first in members[:k]:
            if other.model is not first.model:
                continue
            mine, theirs = other.mean, first.mean
            if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
                continue
            kept = [name for name, _ in other.model.named_parameters() if name not in mine or name not in theirs]
            kept += [name for name, _ in other.model.named_buffers()]
            if kept:
                raise IncompatiblePair(
                    f"component {k} was fitted to the same model object as another one, at other weights; a posterior "
                    f"holds the weights it covers, but not {kept[0]!r}, which is now that of the last training: train "
                    "each network as an object of its own, copy.deepcopy(model)"
                )
