"""The most probable classes of a prediction, where there are too many to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidArgument, ShapeMismatch
from laplace_kf.outputs.conformal import Predictive

__all__ = ["TopClasses", "top_classes"]


@dataclass(frozen=True)
class TopClasses:
    """The k most probable classes of every example (and position), the most probable one first.

    Attributes:
        classes: int64 ``(N, k)``; of sequences ``(N, T, k)``, of images ``(N, k, H, W)``.
        probs: their probabilities, of the same shape.
        rest: probability of all other classes together, ``(N,)``; ``(N, T)`` or ``(N, H, W)``.
    """

    classes: Tensor
    probs: Tensor
    rest: Tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}(classes={tuple(self.classes.shape)}, rest={tuple(self.rest.shape)})"

    @staticmethod
    def joined(parts: Sequence[TopClasses]) -> TopClasses:
        """Those of the examples of all parts, in their order.

        Raises:
            ShapeMismatch: for parts with shapes that differ beside the examples.
        """
        if len({part.classes.shape[1:] for part in parts}) > 1:
            raise ShapeMismatch(
                "the batches have outputs of several shapes "
                f"({', '.join(str(tuple(part.classes.shape)) for part in parts)}), so their classes cannot be put "
                "together; call it for each batch, or pad all to one length"
            )
        return TopClasses(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("classes", "probs", "rest"))
        )


def top_classes(prediction: Predictive, probs: Tensor | None, axis: int, k: int) -> TopClasses:
    """See :meth:`laplace_kf.Prediction.top_k`.

    Args:
        prediction: for messages.
        probs: its probabilities ``(N, ..., C)`` in any layout, or ``None``.
        axis: that of the classes.
        k: how many.

    Raises:
        IncompatiblePair: where there are no probabilities of classes that exclude each other.
        ValueError: for k below 1 or above C.
    """
    if probs is None or probs.shape[axis] < 2 or bool((probs.sum(axis) - 1).abs().max() > 1e-2):
        raise IncompatiblePair(
            "the most probable classes need probabilities of classes that exclude each other; this prediction has "
            f"{', '.join(sorted(prediction.values))}"
        )
    classes = probs.shape[axis]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= classes:
        raise InvalidArgument(f"k must be a whole number from 1 to {classes}, the number of classes; got {k!r}")
    found = probs.topk(k, axis)
    # summed, not the difference to 1, which would be rounding where the classes found have nearly all of it
    rest = probs.scatter(axis, found.indices, 0.0).sum(axis)
    return TopClasses(found.indices, found.values, rest)
