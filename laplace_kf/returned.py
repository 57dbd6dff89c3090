"""What a model returned: its outputs, and a loss of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import ShapeMismatch

__all__ = ["as_tensor", "explained", "own_loss"]


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


_TYPES = re.compile(r"dtype|scalar type|[Ii]nput type")


@contextmanager
def explained(model: nn.Module, batch: Any, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Around a call of the model: errors that come from the form of the batch say so.

    Raises:
        ShapeMismatch: for a tuple of more entries than the model takes arguments, an entry that the user's ``forward``
            looks for in vain, and inputs of another number type than the model's.
    """
    try:
        yield
    except (KeyError, IndexError) as error:
        if forward is None or isinstance(error, ShapeMismatch):
            raise
        raise ShapeMismatch(
            f"forward= does not work on a batch that is a {type(batch).__name__}: {error!r}; look at what the batch "
            "and the model's outputs hold"
        ) from error
    except TypeError as error:
        if not isinstance(batch, (tuple, list)) or forward is not None or "positional argument" not in str(error):
            raise
        raise ShapeMismatch(
            f"the model does not take the {len(batch)} entries of the {type(batch).__name__} it was given ({error}); a "
            "tuple holds the model's arguments: to predict, leave out the targets, predict(x)"
        ) from error
    except RuntimeError as error:
        wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        found = [t.dtype for t in _tensors(batch) if t.dtype not in (wanted, torch.int64, torch.bool)]
        if wanted is None or not found or not _TYPES.search(str(error)):
            raise
        raise ShapeMismatch(
            f"the model's parameters are {wanted}, and the batch holds {found[0]} ({error}); give it "
            f"x.to({wanted}), or convert the model"
        ) from error


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from _tensors(value)
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from _tensors(value)
