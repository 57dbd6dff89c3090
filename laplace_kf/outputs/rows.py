"""Targets of any structure as rows, one for every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from laplace_kf.errors import ShapeMismatch
from laplace_kf.outputs.layout import scalar_shape

__all__ = ["leaves", "map_rows", "target_rows"]


def leaves(targets: Any) -> Iterator[Tensor]:
    """The tensors ``(N, ...)`` of targets: a tensor, or a tuple, list or mapping of tensors (nested)."""
    if isinstance(targets, Tensor):
        yield targets
    elif isinstance(targets, Mapping):
        for value in targets.values():
            yield from leaves(value)
    elif isinstance(targets, (tuple, list)):
        for value in targets:
            yield from leaves(value)


def map_rows(targets: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Targets of the same structure with every tensor ``(N, ...)`` changed."""
    if isinstance(targets, Tensor):
        return change(targets)
    if isinstance(targets, Mapping):
        return {key: map_rows(value, change) for key, value in targets.items()}
    if isinstance(targets, tuple) and hasattr(targets, "_fields"):
        return type(targets)(*(map_rows(value, change) for value in targets))
    if isinstance(targets, (tuple, list)):
        return type(targets)(map_rows(value, change) for value in targets)
    return targets


def target_rows(who: str, targets: Any, shape: Sequence[int]) -> Any:
    """Targets with one row ``(N·T, *rest)`` for every position of outputs of ``shape``.

    Raises:
        ShapeMismatch: if a tensor does not begin with the positions of the outputs.
    """
    lead = scalar_shape(shape)
    found = list(leaves(targets))
    if not found:
        raise ShapeMismatch(f"{who}: targets must be tensors, or a tuple or mapping of tensors, got {targets!r}.")

    def rows(t: Tensor) -> Tensor:
        if len(shape) > 3 and t.ndim == len(shape) and tuple(t.shape[:1] + t.shape[2:]) == lead:
            return t.movedim(1, -1).reshape(-1, t.shape[1])
        if tuple(t.shape[: len(lead)]) != lead:
            way = "" if len(shape) == 2 else (
                " The outputs have several positions, and a target belongs to one of them; for one target an example "
                "let the model return outputs (N, C)."
            )  # fmt: skip
            raise ShapeMismatch(
                f"{who}: targets of shape {tuple(t.shape)} do not fit outputs of shape {tuple(shape)}; expected "
                f"({', '.join(map(str, lead))}, ...).{way}"
            )
        return t.reshape(-1, *t.shape[len(lead) :])

    return map_rows(targets, rows)
