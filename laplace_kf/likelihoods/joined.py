"""Predictions of several batches as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
)

from laplace_kf.errors import ShapeMismatch, UnknownAttribute
from laplace_kf.likelihoods.prediction import Prediction

__all__ = ["joined"]

PARAMETERS = {
    Bernoulli: ("logits",),
    Categorical: ("logits",),
    MultivariateNormal: ("loc", "covariance_matrix"),
    Normal: ("loc", "scale"),
    Poisson: ("rate",),
}


def joined(parts: Sequence[Prediction]) -> Prediction:
    """One prediction over the examples of all parts, in their order.

    Args:
        parts: predictions of one likelihood by one method; where they have samples, of the same functions.

    Raises:
        ShapeMismatch: if the outputs of the parts do not have one shape beside the examples (sequences of several
            lengths).
    """
    if len(parts) == 1:
        return parts[0]
    for name in parts[0].values:
        axis = 1 if name == "samples" else 0
        shapes = {(*part.values[name].shape[:axis], *part.values[name].shape[axis + 1 :]) for part in parts}
        if len(shapes) > 1:
            raise ShapeMismatch(
                f"the batches have outputs of several shapes ({name}: {', '.join(map(str, sorted(shapes)))} beside the "
                "examples), so they are no one prediction; call predict for each batch, or pad all to one length"
            )
    return replace(
        parts[0],
        values={
            name: torch.cat([part.values[name] for part in parts], 1 if name == "samples" else 0)
            for name in parts[0].values
        },
        density=partial(_density, tuple(part.density for part in parts), [_count(part) for part in parts]),
        entropies=partial(_entropies, tuple(parts)),
        information=partial(_information, tuple(parts)) if all(part.information for part in parts) else None,
        quantiles=partial(_quantiles, tuple(parts)) if all(part.quantiles for part in parts) else None,
        build=partial(_distribution, tuple(parts)),
    )


def _count(part: Prediction) -> int:
    for name, value in part.values.items():
        return int(value.shape[1 if name == "samples" else 0])
    try:  # no moments and no samples: a density alone
        return int(part.distribution.batch_shape[0])
    except (UnknownAttribute, IndexError) as error:
        raise ShapeMismatch(
            "predictions that have a density alone cannot be put together; call predict for each batch"
        ) from error


def _density(densities: Sequence[Callable[[Tensor], Tensor]], counts: Sequence[int], y: Tensor) -> Tensor:
    if len(y) != sum(counts):
        raise ShapeMismatch(f"targets of shape {tuple(y.shape)} do not fit a prediction of {sum(counts)} examples")
    return torch.cat([density(part) for density, part in zip(densities, y.split(list(counts)), strict=True)])


def _entropies(parts: Sequence[Prediction]) -> tuple[Tensor, Tensor | None]:
    found = [part.entropies() for part in parts]
    conditional = [rest for _, rest in found if rest is not None]
    total = torch.cat([each for each, _ in found])
    return total, torch.cat(conditional) if len(conditional) == len(found) else None


def _information(parts: Sequence[Prediction]) -> Tensor:
    return torch.cat([part.information() for part in parts if part.information is not None])


def _quantiles(parts: Sequence[Prediction], probability: float) -> Tensor:
    return torch.cat([part.quantiles(probability) for part in parts if part.quantiles is not None])


def _distribution(parts: Sequence[Prediction]) -> Distribution:
    return _together([part.distribution for part in parts])


def _together(found: Sequence[Distribution]) -> Distribution:
    """One distribution whose batch is that of all, along the examples."""
    first = found[0]
    if isinstance(first, Independent):
        base = _together([each.base_dist for each in found])  # type: ignore[attr-defined]
        return Independent(base, first.reinterpreted_batch_ndims)
    if isinstance(first, MixtureSameFamily):
        mixtures, components = zip(
            *((each.mixture_distribution, each.component_distribution) for each in found),  # type: ignore[attr-defined]
            strict=True,
        )
        together: Any = _together(mixtures)
        return MixtureSameFamily(together, _together(components))
    names = PARAMETERS.get(type(first))
    if names is None:
        raise UnknownAttribute(
            Prediction,
            "distribution",
            why=f"predictions of several batches have no common {type(first).__name__}; call predict for each batch",
        )
    values = {name: torch.cat([getattr(each, name) for each in found]) for name in names}
    kind: Any = type(first)
    made: Distribution = kind(**values)
    return made
