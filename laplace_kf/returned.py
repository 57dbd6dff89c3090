"""What a model returned: its outputs, and a loss of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_kf.errors import ShapeMismatch

__all__ = ["as_tensor", "own_loss"]


def as_tensor(outputs: Any) -> Tensor:
    """The output tensor ``(N, ...)`` of a model call.

    Of a structured output that is its ``logits`` or ``out`` (entry or attribute), the only tensor beside a ``loss``, or
    what follows the loss in a tuple ``(loss, logits, ...)``.

    Raises:
        ShapeMismatch: if it is not clear which one; says what there is.
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries: Mapping[Any, Any] = outputs if isinstance(outputs, Mapping) else {}
    for name in ("logits", "out"):
        found = entries.get(name) if entries else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor) and value.dim() and key != "loss"]
    if len(tensors) == 1:
        only: Tensor = entries[tensors[0]]
        return only
    what, part = type(outputs).__name__, "[0]"
    if isinstance(outputs, Mapping):
        what += f" with {sorted(map(str, outputs))}"
        part = f'["{(tensors or list(entries) or ["..."])[0]}"]'
    elif isinstance(outputs, (tuple, list)):
        if len(outputs) == 1 and isinstance(outputs[0], Tensor):
            return outputs[0]
        if len(outputs) > 1 and isinstance(outputs[1], Tensor) and outputs[1].dim() and _is_loss(outputs[0]):
            return outputs[1]
        what += f" of {len(outputs)}"
    raise ShapeMismatch(
        f"the model returned {what}, but one tensor of outputs is needed; pick it, or put several together, with "
        f"forward=lambda model, batch: (model(batch[0]){part}, batch[1]), and give predict a whole batch then: "
        "posterior.predict((x, None))"
    )


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def own_loss(outputs: Any) -> Tensor | None:
    """The loss, 0-dim, that a model returned of itself: ``.loss``, ``["loss"]`` or the first of ``(loss, ...)``."""
    if isinstance(outputs, Tensor):
        return None
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "loss"):
        found = outputs[0] if len(outputs) > 1 else None
    else:
        found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if _is_loss(found) else None
