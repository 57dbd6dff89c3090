"""Targets with a weight for every example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import InvalidTarget, NonFinite, ShapeMismatch
from laplace_kf.outputs.checks import known_true

__all__ = ["WeightedTargets", "apart", "bare", "concatenated"]


@dataclass(frozen=True)
class WeightedTargets:
    """What a likelihood takes in place of targets where examples have weights.

    Attributes:
        targets: as the likelihood takes them, N examples.
        weights: ``(N,)``, ≥ 0: factors on the negative log-likelihood, and so on the curvature, of the examples. An
            example of weight 0 is one whose targets are all ignored.
    """

    targets: Any
    weights: Tensor


def apart(targets: Any, count: int) -> tuple[Any, Tensor | None]:
    """Targets and weights ``(N,)`` of ``count`` examples; ``None`` where targets come without.

    Raises:
        ShapeMismatch: if there is not one weight an example.
        NonFinite: for a weight that is NaN or infinite.
        ValueError: for a negative one.
    """
    if not isinstance(targets, WeightedTargets):
        return targets, None
    weights = targets.weights
    if not isinstance(weights, Tensor):
        raise ShapeMismatch(f"weights of examples must be a tensor of shape ({count},), got {type(weights).__name__}")
    if tuple(weights.shape) != (count,):
        hint = "; use weights.squeeze(-1)" if tuple(weights.shape) == (count, 1) else ""
        raise ShapeMismatch(
            f"weights of shape {tuple(weights.shape)} do not fit {count} examples; expected ({count},){hint}"
        )
    if weights.is_complex():
        raise InvalidTarget(f"weights of examples must be real numbers, got {weights.dtype}")
    if weights.is_floating_point() and known_true((~torch.isfinite(weights)).any()):
        raise NonFinite(
            "the weights of the examples have NaN or infinite entries; leave such examples out, or weight 0"
        )
    if weights.dtype != torch.bool and known_true((weights < 0).any()):
        first = int((weights < 0).nonzero()[0])
        raise InvalidTarget(
            f"the weight {weights[first].item()} of example {first} is negative; weights are at least 0"
        )
    return targets.targets, weights


def bare(targets: Any) -> Any:
    """The targets (N of them, in any form) without weights."""
    return targets.targets if isinstance(targets, WeightedTargets) else targets


def concatenated(parts: Sequence[Any]) -> Any:
    """Targets of several batches, of one structure, as those of one."""
    first = parts[0]
    if isinstance(first, WeightedTargets):
        return WeightedTargets(
            concatenated([part.targets for part in parts]), concatenated([part.weights for part in parts])
        )
    if isinstance(first, Mapping):
        return {key: concatenated([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(concatenated([part[k] for part in parts]) for k in range(len(first)))
    return torch.cat(list(parts))
