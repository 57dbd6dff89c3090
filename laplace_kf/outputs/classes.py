"""Class probabilities as targets, and weights of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import InvalidArgument, InvalidTarget, ShapeMismatch
from laplace_kf.outputs.checks import known_true, refuse_values
from laplace_kf.outputs.layout import to_positions

__all__ = ["checked_class_weights", "class_masses"]

TOLERANCE = 1e-4  # by which probabilities in float32 may miss 1 in sum
COARSE = 2e-2  # and in float16 or bfloat16


def checked_class_weights(who: str, weights: Tensor | Sequence[float]) -> Tensor:
    """Class weights as a float64 tensor ``(C,)``.

    Raises:
        ShapeMismatch: if they are not one number a class.
        ValueError: for a weight that is negative or not finite, or if none is positive.
    """
    found = torch.as_tensor(weights).detach().double()
    if found.ndim != 1 or not len(found):
        raise ShapeMismatch(f"{who}: class_weights must have shape (C,), one number a class, got {tuple(found.shape)}.")
    if not bool((torch.isfinite(found) & (found >= 0)).all()) or not bool((found > 0).any()):
        raise InvalidArgument(f"{who}: class_weights {found.tolist()} must be finite, at least 0, and not all 0.")
    return found


def class_masses(who: str, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """Class probabilities of the shape of the outputs, by position, and which positions count ``(N, T, 1)``.

    Args:
        who: name of the likelihood, for messages.
        targets: one-hot (bool or integer) or probabilities (floating), finite.
        ignore_index: a position all of whose entries equal it is left out (its probabilities come back uniform).

    Raises:
        ValueError: for entries outside [0, 1], or that do not add up to 1 at a position.
    """
    if targets.is_complex():
        raise InvalidTarget(f"{who}: class probabilities must be real numbers, got {targets.dtype}.")
    hot = not targets.is_floating_point()
    coarse = targets.dtype in (torch.float16, torch.bfloat16)
    y = to_positions(targets).to(targets.dtype if targets.dtype == torch.float32 else torch.float64)
    keep = None
    if ignore_index is not None:
        hits = y == ignore_index
        keep = ~hits.all(-1, keepdim=True)
        y = torch.where(keep, y, 1.0 / y.shape[-1])
    whole = "0 or 1 (one-hot integers)" if hot else "[0, 1] (class probabilities)"
    bad = (y < 0) | (y > 1 + TOLERANCE) if not hot else (y != 0) & (y != 1)
    bad = bad if keep is None else bad & keep
    refuse_values(who, y, bad, f"{whole}; an ignored position has ignore_index={ignore_index} in all its entries")
    gap = (y.sum(-1) - 1.0).abs() > (COARSE if coarse else TOLERANCE)
    if known_true(gap.any()):
        first = tuple(int(i) for i in gap.nonzero()[0])
        mark = "-100 (with ignore_index=-100)" if ignore_index is None else ignore_index
        raise InvalidTarget(
            f"{who}: the class probabilities of position {first} (example, position) add up to "
            f"{float(y.sum(-1)[first]):.6g}, not to 1. Divide them by their sum; to weigh examples, pass weights=True "
            f"and batches (x, y, w). A position to be left out has {mark} in all its entries."
        )
    return y, keep
