"""Batches whose examples have weights: ``(x, y, w)``, or mappings with ``"weights"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from laplace_kf.batches import Forward, as_batches, default_forward, slices
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.outputs.weighted import WeightedTargets

__all__ = ["WithWeights", "batches", "counted_alike", "has_weights", "inputs_without_weights", "reader"]


class WithWeights:
    """A ``forward`` whose targets carry the weights of their examples.

    Args:
        forward: the user's ``(model, batch) -> (outputs, targets, weights)``; without one, batches are ``(x, y, w)`` or
            mappings with ``"labels"`` and ``"weights"``, ``w (N,)``.

    Attributes:
        plain: whether there is none, so that it is known what of a batch are inputs.
    """

    def __init__(self, forward: Forward | None) -> None:
        self.forward, self.plain = forward, forward is None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Any, WeightedTargets]:
        if self.forward is not None:
            found: Any = self.forward(model, batch)
            if not isinstance(found, (tuple, list)) or len(found) != 3:
                what = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
                raise ShapeMismatch(
                    f"with weights=True forward= must return (outputs, targets, weights), it returned {what}: "
                    "forward=lambda model, batch: (model(batch[0]), batch[1], batch[2])"
                )
            outputs, targets, weights = found
            return outputs, WeightedTargets(targets, weights)
        if isinstance(batch, Mapping):
            if "weights" not in batch:
                raise ShapeMismatch(
                    f"with weights=True a mapping batch needs the weights (N,) of its examples under 'weights' (its "
                    f"keys: {sorted(map(str, batch))}); add them, or leave weights=True out"
                )
            outputs, targets = default_forward(model, inputs_without_weights(batch))
            return outputs, WeightedTargets(targets, batch["weights"])
        if isinstance(batch, (tuple, list)) and len(batch) == 3:
            outputs, targets = default_forward(model, (batch[0], batch[1]))
            return outputs, WeightedTargets(targets, batch[2])
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ShapeMismatch(
            f"with weights=True a batch must be (x, y, w) or a mapping with 'labels' and 'weights', got {what}; use "
            "DataLoader(TensorDataset(x, y, w)), or forward=lambda model, batch: (model(...), targets, weights)"
        )


def reader(forward: Forward | None, weights: bool) -> Forward | None:
    """What reads batches: ``forward``, or one that takes their weights too."""
    return WithWeights(forward) if weights else forward


def batches(data: Any, weights: bool) -> Iterable[Any]:
    """As :func:`laplace_kf.batches.as_batches`; with weights also of ``(x, y, w)``, tensors of one length N.

    Raises:
        ShapeMismatch: for anything else.
    """
    if weights and isinstance(data, tuple) and len(data) == 3 and isinstance(data[2], Tensor):
        return slices(data, data[2].shape[0] if data[2].dim() else 0)
    return as_batches(data)


def has_weights(batch: Any, forward: Forward | None) -> bool:
    """Whether a batch for a likelihood with weights brings them: as ``forward`` does, ``(x, y, w)``, ``"weights"``."""
    if forward is not None or isinstance(batch, Mapping):
        return forward is not None or "weights" in batch
    return isinstance(batch, (tuple, list)) and len(batch) == 3


def counted_alike(targets: Any) -> Any:
    """The targets without their weights (N,), where all of them are equal.

    Raises:
        IncompatiblePair: if they are not: coverage is one of examples that count alike.
    """
    if not isinstance(targets, WeightedTargets):
        return targets
    weights = targets.weights
    if bool((weights != weights[:1]).any()) or not bool((weights > 0).all()):
        raise IncompatiblePair(
            "coverage is guaranteed for examples that count alike, and the weights of these differ; leave the weights "
            "out, calibrate(DataLoader(TensorDataset(x, y)))"
        )
    return targets.targets


def inputs_without_weights(batch: Any) -> Any:
    """A mapping batch without its ``"weights"``, of which models know nothing; anything else as it is."""
    return {key: value for key, value in batch.items() if key != "weights"} if isinstance(batch, Mapping) else batch
