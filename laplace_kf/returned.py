"""What a model returned: its outputs, and a loss of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from laplace_kf.errors import LaplaceKFError, ShapeMismatch, UnsupportedLayer

__all__ = ["as_tensor", "both", "explained", "nested", "own_loss", "readable", "unread"]


def as_tensor(outputs: Any, as_given: Callable[[], str] | None = None) -> Tensor:
    """The output tensor ``(N, ...)`` of a model call.

    Of a structured output that is its ``logits`` or ``out`` (entry or attribute), the only tensor beside a ``loss``, or
    what follows the loss in a tuple ``(loss, logits, ...)`` or stands before it, ``(logits, loss)`` and
    ``(logits, None)``.

    Args:
        outputs: what the model returned.
        as_given: () → how a batch's entries were given to the model, where these are several, for the message.

    Raises:
        ShapeMismatch: if it is not clear which one; says what there is.
    """
    found = _picked(outputs, as_given)
    if found.is_complex():
        raise ShapeMismatch(
            f"the model's outputs {tuple(found.shape)} are complex ({found.dtype}), and likelihoods are of real ones; "
            "put the two parts side by side, torch.view_as_real(outputs).flatten(1), or take outputs.abs(), in the "
            "model's forward or with forward="
        )
    return found


def _picked(outputs: Any, as_given: Callable[[], str] | None) -> Tensor:
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
        if _is_followed(outputs):
            return outputs[0]
        what += f" of {len(outputs)}"
    inputs = as_given() if as_given else "batch[0]"
    whole = "batch" if as_given else "(x, None)"
    targets = 'batch["labels"]' if as_given and "batch[0]" not in inputs else "batch[1]"
    raise ShapeMismatch(
        f"the model returned {what}, but one tensor of outputs is needed; pick it, or put several together, with "
        f"forward=lambda model, batch: (model({inputs}){part}, {targets}), and give predict a whole batch then: "
        f"posterior.predict({whole})"
    )


def both(found: Any, most: int = 2) -> tuple[Any, Any]:
    """What the user's ``forward=`` returned: outputs ``(N, ...)`` and targets.

    Args:
        found: what it returned.
        most: 3 where weights of the examples ``(N,)`` may follow, which are left out.

    Raises:
        ShapeMismatch: for anything else than two things.
    """
    if isinstance(found, (tuple, list)) and 2 <= len(found) <= most:
        weights = found[2] if len(found) == 3 else None
        if weights is None or getattr(weights, "ndim", 0) == 1:
            return found[0], found[1]
    what = f"{type(found).__name__} of {len(found)}" if isinstance(found, (tuple, list)) else type(found).__name__
    raise ShapeMismatch(
        f"forward= must return (outputs, targets), it returned {what}: "
        "forward=lambda model, batch: (model(batch[0]), batch[1])"
    )


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _is_followed(outputs: Any) -> bool:
    """Whether a tuple is ``(logits, loss)``, or ``(logits, None)`` of a model that was given no targets."""
    first = len(outputs) == 2 and isinstance(outputs[0], Tensor) and outputs[0].dim() > 0
    return first and (outputs[1] is None or _is_loss(outputs[1]))


def own_loss(outputs: Any) -> Tensor | None:
    """The loss, 0-dim, that a model returned of itself.

    That is ``.loss``, ``["loss"]``, the first of ``(loss, ...)`` or the last of ``(logits, loss)``.
    """
    if isinstance(outputs, Tensor):
        return None
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "loss"):
        found = (outputs[1] if _is_followed(outputs) else outputs[0]) if len(outputs) > 1 else None
    else:
        found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if _is_loss(found) else None


_TYPES = re.compile(r"dtype|scalar type|[Ii]nput type|not implemented for '|result type .* can't be cast")
_NO_GRADIENT = "does not require grad"  # of torch.autograd.grad and Tensor.backward
_NO_TENSOR = re.compile(r"must be Tensor, not (?:\w+\.)*(\w+)")
_NO_ATTRIBUTE = re.compile(r"^'(list|tuple|str|int|float|dict)' object has no attribute '(\w+)'")
_DEVICES = re.compile(r"on the same device|two devices|device type|on the expected device")
_NO_AXIS = re.compile(r"not enough values to unpack|too many indices for tensor|Dimension out of range")
_SHAPES = re.compile(
    r"shapes cannot be multiplied|expected input.* to have|expected weight to be|[Ee]xpected \d+D|Expected .* or .*D"
    r"|must match the (?:existing )?size|size mismatch|Given groups=|normalized_shape|running_mean should contain"
    r"|is invalid for input of size|number of channels|input\.size\(-1\) must be|was expecting embedding dimension"
    r"|index out of range in self|need to be at least 1D|Kernel size can't be greater|Sizes of tensors must match"
    r"|must be equal to input_size"
)


def nested(where: str) -> UnsupportedLayer:
    """What is said of a nested tensor inside of a forward pass."""
    return UnsupportedLayer(
        f"{where} a nested tensor, in which examples and positions cannot be told apart; pad instead, "
        "torch.nested.to_padded_tensor(x, 0.0), and mask: what is padded and left out of the outputs changes no result"
    )


def unread(batch: Any, line: str | None = None) -> ShapeMismatch:
    """What is said of a batch of no known form; ``line`` says which part is what, if there is a better one."""
    what, picked = type(batch).__name__, ("batch.x", "batch.y")
    if isinstance(batch, (tuple, list)):
        what, picked = f"{what} of {len(batch)}", ("batch[0]", "batch[1]")
        if len(batch) == 3:
            what += " (with weights=True, (x, y, w) is one whose examples have weights)"
        if all(isinstance(part, (tuple, list)) and len(part) == 2 for part in batch):
            what += " pairs (of batches give one; examples become a batch by torch.utils.data.default_collate)"
    elif isinstance(batch, Tensor):
        what, picked = f"a tensor {tuple(batch.shape)}", ("batch[:, :-1]", "batch[:, -1]")
        what += " (several tensors of all data, (x, y, w), are one batch: fit([(x, y, w)]))"
    elif isinstance(batch, Iterator) or hasattr(batch, "dataset"):
        return ShapeMismatch(
            f"a batch is needed, (x, y), got {what}, which brings batches: for batch in loader: ...; use one at a time"
        )
    return ShapeMismatch(
        f"a batch must be (x, y), ((x1, x2, ...), y) or a mapping with 'labels', got {what}; say which part is what "
        f"with {line or f'inputs=lambda batch: {picked[0]}, targets=lambda batch: {picked[1]}'}"
    )


@contextmanager
def explained(model: nn.Module, batch: Any, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Around a call of the model: errors that come from the form of the batch say so.

    Raises:
        ShapeMismatch: for a tuple of more entries than the model takes arguments, an entry that the user's ``forward``
            looks for in vain, lists or text for tensors, and inputs of another number type, device or shape than the
            model takes.
        UnsupportedLayer: for an exported program that takes batches of one size only; for a forward pass that takes a
            derivative and relies on its caller to have gradients on.
    """
    try:
        yield
    except LaplaceKFError:
        raise
    except AttributeError as error:
        other = _NO_ATTRIBUTE.search(str(error))
        inside = {type(leaf).__name__ for leaf in _leaves(batch) if leaf is not batch}
        if not other or other[1] not in inside or not hasattr(Tensor, other[2]):
            raise
        way = (
            "a list of batches is no batch: predict each of them, or a loader, torch.utils.data.DataLoader(dataset)"
            if other[1] == "dict"
            else 'give tensors: of texts tokenizer(texts, padding=True, return_tensors="pt"), of lists torch.tensor(x)'
        )
        raise ShapeMismatch(f"the batch holds a {other[1]} where the model takes a tensor ({error}); {way}") from error
    except TypeError as error:
        other = _NO_TENSOR.search(str(error))
        if other and other[1] in {type(leaf).__name__ for leaf in _leaves(batch)}:
            raise ShapeMismatch(
                f"the model was given a {other[1]} where it takes a tensor ({str(error).splitlines()[0]}); give "
                "tensors or arrays of numbers, torch.as_tensor(x), and text as the tokens of the model's tokenizer"
            ) from error
        if forward is None and "positional argument" in str(error) and (named := _by_name(model)):
            given = ", ".join(f'"{name}": batch[{k}]' for k, name in enumerate(named))
            raise ShapeMismatch(
                f"{type(model).__name__}.forward takes {named} by keyword only, and the batch gives them by position "
                f"({error}); use inputs=lambda batch: {{{given}}}, targets=lambda batch: batch[{len(named)}], and "
                f"predict a mapping with {named}"
            ) from error
        if not isinstance(batch, (tuple, list)) or forward is not None or "positional argument" not in str(error):
            raise
        if isinstance(batch, PackedSequence):
            raise ShapeMismatch(
                "a PackedSequence is read as a tuple of arguments, and its examples are interleaved; put the padded "
                "tensor and the lengths into the batch, ((x, lengths), y), and pack them inside the model"
            ) from error
        raise ShapeMismatch(
            f"the model does not take the {len(batch)} entries of the {type(batch).__name__} it was given ({error}); a "
            "tuple holds the model's arguments: to predict, leave out the targets, predict(x)"
        ) from error
    except (KeyError, IndexError, RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, AssertionError) and str(error).startswith("Guard failed"):
            raise UnsupportedLayer(
                f"the model is a torch.export program, made for batches of one size ({error}); pass the module it was "
                'made from, or export with dynamic_shapes=({0: torch.export.Dim("batch")},)'
            ) from error
        if "NestedTensorImpl" in str(error):
            raise nested(f"the forward pass of {type(model).__name__} makes") from error
        if _NO_GRADIENT in str(error) and not torch.is_grad_enabled():
            raise UnsupportedLayer(
                f"the forward pass of {type(model).__name__} takes a derivative itself, and fails where gradients are "
                f"off, as they are in predictions and evaluation ({error}); put that part of it under "
                "`with torch.enable_grad():`, with x = x.detach().requires_grad_() where the derivative is by x"
            ) from error
        said = _reason(model, batch, error)
        if said is None and forward is not None and isinstance(error, (KeyError, IndexError)):
            said = (
                f"forward= does not work on a batch that is a {type(batch).__name__}: {error!r}; look at what the "
                "batch and the model's outputs hold"
            )
        if said is None:
            raise
        raise ShapeMismatch(said) from error


def _by_name(model: nn.Module) -> list[str]:
    """The arguments without a default that the model's ``forward`` takes by keyword only."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _reason(model: nn.Module, batch: Any, error: Exception) -> str | None:
    """What torch's error says of the batch: another number type, device or shape than the model's; ``None`` if no."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    tensors, text = list(_tensors(batch)), str(error)
    if weight is None or not tensors or isinstance(error, KeyError):
        return None
    first = text.splitlines()[0] if text else repr(error)
    if _DEVICES.search(text):
        places = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
        return (
            f"tensors of the forward pass lie on different devices ({first}): the model's parameters and buffers on "
            f"{', '.join(places)}, and the batch is moved to {weight.device}. Put all of the model on one device, "
            f'model.to("{weight.device}"), also tensors that forward makes or that are no registered buffers'
        )
    if _TYPES.search(text) or (isinstance(error, RuntimeError) and "must be Long" in text):
        kinds = [t.dtype for t in tensors if t.dtype != weight.dtype]
        odd = [kind for kind in kinds if kind.is_floating_point or kind.is_complex] or kinds
        if odd:
            return (
                f"the model's parameters are {weight.dtype}, and the batch holds {odd[0]} ({first}); give it "
                f"x.to({weight.dtype}), or convert the model (indices of a table are x.long())"
            )
        if "indices" in text:  # floats given to a table
            return (
                f"the model looks its input up in a table, and the batch holds {tensors[0].dtype} ({first}); give it "
                "x.long()"
            )
    if _SHAPES.search(text) or (_NO_AXIS.search(text) and any(t.dim() < 2 for t in tensors)):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
        where = next((name for name, p in model.named_parameters() if p.is_floating_point() and p.dim() > 1), None)
        named = dict(model.named_parameters())
        its = f"; its first weight, {where!r}, has shape {tuple(named[where].shape)}" if where else ""
        return (
            f"the model cannot take the batch, tensors of shape {shapes} ({first}){its}. Give inputs of the shape that "
            "it was trained on, examples first: x.reshape(len(x), ...), or x[None] for one example"
        )
    return None


def readable(tensor: Tensor) -> Tensor:
    """A tensor of the user as it is.

    Raises:
        ShapeMismatch: for one without numbers (on the meta device), or without an axis of examples (nested).
    """
    if tensor.is_meta:
        raise ShapeMismatch(
            f"a tensor of shape {tuple(tensor.shape)} lies on the device meta, which holds no numbers; make the data "
            'on a real device, for example under torch.device("cpu")'
        )
    if tensor.is_nested:
        raise ShapeMismatch(
            "a nested tensor has no axes that could be cut into examples; give torch.nested.to_padded_tensor(x, 0.0) "
            "and a mask, or batches of examples of one length"
        )
    return tensor


def _leaves(structure: Any) -> Iterator[Any]:
    """Everything in a nest, the nest itself included."""
    yield structure
    if isinstance(structure, (tuple, list)):
        for value in structure:
            yield from _leaves(value)
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from _leaves(value)


def _tensors(structure: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    return (leaf for leaf in _leaves(structure) if isinstance(leaf, Tensor))
