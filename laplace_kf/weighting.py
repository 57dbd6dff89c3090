"""Batches whose examples have weights: ``(x, y, w)``, or mappings with ``"weights"``, or as ``weights=`` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from laplace_kf.batches import Forward, as_batches, default_forward, slices, to_tensors
from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.outputs.weighted import WeightedTargets, bare
from laplace_kf.reading import Part, Reading

__all__ = [
    "Weights",
    "WithWeights",
    "batches",
    "counted_alike",
    "has_weights",
    "inputs_without_weights",
    "reader",
    "without",
]

Weights = bool | Part
"""``weights=``: whether batches bring weights, or the function of a batch that reads them."""

_MISREADS = (KeyError, IndexError, TypeError, AttributeError, ValueError)


class WithWeights:
    """A ``forward`` whose targets carry the weights of their examples.

    Args:
        forward: the user's, or ``None``. Without ``pick`` it returns ``(outputs, targets, weights)``; without it, too,
            batches are ``(x, y, w)`` or mappings with ``"labels"`` and ``"weights"``, ``w (N,)``.
        pick: batch → weights.

    Attributes:
        plain: whether it is known what of a batch are inputs: ``(x, y, w)``, or all but two entries of a mapping.
    """

    def __init__(self, forward: Forward | None, pick: Part | None) -> None:
        self.forward, self.pick, self.plain = forward, pick, forward is None and pick is None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Any, WeightedTargets]:
        if self.pick is not None:
            outputs, targets = (default_forward if self.forward is None else self.forward)(model, batch)
            return outputs, WeightedTargets(targets, to_tensors(self._picked(batch), model))
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
                    f"keys: {sorted(map(str, batch))}); say where they are, weights=lambda batch: batch[...], or leave "
                    "weights=True out"
                )
            outputs, targets = default_forward(model, inputs_without_weights(batch))
            return outputs, WeightedTargets(targets, batch["weights"])
        if isinstance(batch, (tuple, list)) and len(batch) == 3:
            outputs, targets = default_forward(model, (batch[0], batch[1]))
            return outputs, WeightedTargets(targets, batch[2])
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ShapeMismatch(
            f"with weights=True a batch must be (x, y, w) or a mapping with 'labels' and 'weights', got {what}; use "
            "DataLoader(TensorDataset(x, y, w)), or say which part is what with inputs=lambda batch: batch[0], "
            "targets=lambda batch: batch[1], weights=lambda batch: batch[2]"
        )

    def _picked(self, batch: Any) -> Any:
        assert self.pick is not None
        try:
            return self.pick(batch)
        except _MISREADS as error:
            raise ShapeMismatch(f"weights= does not work on a {type(batch).__name__} batch: {error!r}") from error

    def without(self, batch: Any) -> tuple[Any, Forward | None]:
        """The batch and the ``forward`` that read the same inputs and targets, without weights."""
        if self.pick is not None:
            return batch, self.forward
        if self.forward is not None:
            return batch, _TwoOfThree(self.forward)
        return inputs_without_weights(batch) if isinstance(batch, Mapping) else (batch[0], batch[1]), None


class _TwoOfThree:
    def __init__(self, forward: Callable[[nn.Module, Any], Any]) -> None:
        self.forward = forward

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        outputs, targets, _ = self.forward(model, batch)
        return outputs, targets


def reader(forward: Forward | None, weights: Weights) -> Forward | None:
    """What reads batches: ``forward``, or one that takes their weights too.

    Raises:
        IncompatiblePair: for ``inputs=`` and ``targets=`` without a function for the weights.
    """
    if weights is False:
        return forward
    if isinstance(forward, Reading) and not callable(weights):
        raise IncompatiblePair(
            "with inputs= and targets= the weights are a function of the batch, too: weights=lambda batch: batch[2]"
        )
    return WithWeights(forward, weights if callable(weights) else None)


def batches(data: Any, weights: Weights, model: nn.Module | None = None) -> Iterable[Any]:
    """As :func:`laplace_kf.batches.as_batches`; with weights also of ``(x, y, w)``, tensors or arrays of one length N.

    Raises:
        ShapeMismatch: for anything else.
    """
    if weights is not False and isinstance(data, tuple) and len(data) == 3:
        found = to_tensors(data, model)
        if isinstance(found[2], Tensor):
            return slices(found, found[2].shape[0] if found[2].dim() else 0)
    return as_batches(data, model)


def without(batch: Any, forward: Forward | None) -> tuple[Any, Forward | None]:
    """The batch and the ``forward`` as they would be without weights."""
    return forward.without(batch) if isinstance(forward, WithWeights) else (batch, forward)


def has_weights(batch: Any, forward: Forward | None, weights: Weights) -> bool:
    """Whether a batch for a likelihood with weights brings them: as the functions do, ``(x, y, w)``, ``"weights"``."""
    if weights is False or callable(weights) or forward is not None:
        return weights is not False
    if isinstance(batch, Mapping):
        return "weights" in batch
    return isinstance(batch, (tuple, list)) and len(batch) == 3


def counted_alike(targets: Any) -> Any:
    """The targets without their weights (N,), where all of them are equal.

    Raises:
        IncompatiblePair: if they are not: coverage is one of examples that count alike.
    """
    if isinstance(targets, WeightedTargets):
        weights = targets.weights
        if bool((weights != weights[:1]).any()) or not bool((weights > 0).all()):
            raise IncompatiblePair(
                "coverage is guaranteed for examples that count alike, and the weights of these differ; leave the "
                "weights out, calibrate(DataLoader(TensorDataset(x, y)))"
            )
    return bare(targets)


def inputs_without_weights(batch: Any) -> Any:
    """A mapping batch without its ``"weights"``, of which models know nothing; anything else as it is."""
    return {key: value for key, value in batch.items() if key != "weights"} if isinstance(batch, Mapping) else batch
