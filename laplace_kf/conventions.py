"""What ``labels`` of a mapping batch mean to models that follow the conventions of Hugging Face transformers.

A causal language model shifts its labels inside: its outputs at position t predict label t + 1. An encoder-decoder
model makes the inputs of its decoder from the labels. Both are known by the model's class name and ``config``, so that
transformers need not be installed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import ShapeMismatch

__all__ = [
    "IGNORED",
    "adapter_lines",
    "arguments",
    "by_name",
    "channels_are_last",
    "decoder_explained",
    "decoder_inputs_from_labels",
    "first_of",
    "frozen_adapter_line",
    "is_causal",
    "lines_of",
    "lines_of_mapping",
    "merged_away",
    "require_labels",
    "takes_labels",
    "target_key",
    "target_like",
    "targets",
    "unshifted",
]

IGNORED = -100  # what transformers and torch.nn.CrossEntropyLoss leave out
CAUSAL = ("ForCausalLM", "LMHeadModel")
IN_CACHE = frozenset(["PREFIX_TUNING", "CARTRIDGE"])  # adapters whose virtual tokens have no outputs
TARGETS = ("labels", "label", "targets", "target", "label_ids", "shift_labels", "y")


def _wrapped(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper (peft)."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def adapter_lines(model: nn.Module, names: Sequence[str]) -> str:
    """Behind a message's advice: how adapters of peft that hold these parameters are used again; else empty.

    An adapter that is merged into the weights, switched off, or not the active one takes no part in the outputs.
    """
    of = next((name for name in _adapters(model) if any(f".{name}." in f".{full}." for full in names)), None)
    if of is None:
        return ""
    if callable(getattr(model, "get_base_model", None)):
        lines = f'model.unmerge_adapter(), model.enable_adapter_layers(), model.set_adapter("{of}")'
        return f" (of an adapter of peft by {lines})"
    return f' (of an adapter by model.enable_adapters(), model.set_adapter("{of}"))'  # of transformers' own models


def merged_away(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of some parameters that belong to an adapter of peft whose product is in the weights already."""
    merged = [f"{path}." for path, module in model.named_modules() if getattr(module, "merged", False) is True]
    return [name for name in names if name.startswith(tuple(merged))] if merged else []


def _adapters(model: nn.Module) -> Mapping[str, Any]:
    """The configurations of a model's adapters of peft by their names."""
    known = getattr(model, "peft_config", None)
    return known if isinstance(known, Mapping) else {}


def frozen_adapter_line(model: nn.Module) -> str:
    """The line by which the adapter of a model of peft that was loaded for inference is trainable; else empty."""
    if not any(getattr(config, "inference_mode", False) is True for config in _adapters(model).values()):
        return ""
    return (
        "; an adapter of peft is loaded frozen, and trainable by PeftModel.from_pretrained(base, path, "
        "is_trainable=True)"
    )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def arguments(model: nn.Module) -> list[inspect.Parameter] | None:
    """The arguments that the model's ``forward`` names; ``None`` if it takes any keyword, or does not tell."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # no signature to be had
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def takes_labels(model: nn.Module) -> bool:
    """Whether the ``forward`` of the model, or of the one inside an adapter's wrapper, names ``labels``."""
    for module in (model, _wrapped(model)):
        try:
            if "labels" in inspect.signature(module.forward).parameters:
                return True
        except (TypeError, ValueError):
            continue
    return False


def target_key(model: nn.Module, batch: Mapping[Any, Any]) -> str | None:
    """Where the targets of a mapping batch stand: ``"labels"``, else ``"label"`` unless the model has such an input."""
    if "labels" in batch:
        return "labels"
    takes_it = any(p.name == "label" for p in arguments(model) or ())
    return "label" if "label" in batch and not takes_it else None


def require_labels(key: str, labels: Any) -> None:
    """Refuses what cannot be the labels ``(N, ...)`` of a batch: None, or those of a single example.

    Raises:
        ShapeMismatch: says how batches are made of examples.
    """
    if labels is None:
        raise ShapeMismatch(f"{key!r} of a mapping batch is None; only predict takes batches without targets")
    if isinstance(labels, (int, float)) or (isinstance(labels, Tensor) and not labels.dim()):
        raise ShapeMismatch(
            f"{key!r} of a mapping batch is one number, as of an example, and a batch has one for each of its "
            "examples; give a loader that puts examples together, torch.utils.data.DataLoader(examples, "
            "batch_size=32), with the collate_fn= of your training"
        )


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a causal language model of transformers, bare or inside an adapter's wrapper."""
    model = _wrapped(model)
    return any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__) and not _is_encoder_decoder(model)


def targets(model: nn.Module, labels: Any) -> Any:
    """The targets of the outputs: ``labels (N, T)`` themselves, or for a causal language model label t + 1 at t.

    The last position of a causal language model has no target and is ignored (-100), nor have those of the V virtual
    tokens that an adapter of prompts puts in front: targets ``(N, V + T)``. Labels ``(N,)`` of a model of transformers
    with one output (regression) are ``(N, 1)``.
    """
    config = getattr(_wrapped(model), "config", None)
    if isinstance(labels, Tensor) and labels.dim() == 1:
        one = getattr(config, "model_type", None) is not None and getattr(config, "num_labels", None) == 1
        return labels[:, None] if one else labels
    if not isinstance(labels, Tensor) or labels.dim() < 2 or not is_causal(model):
        return labels
    nothing = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([nothing.expand(-1, _virtual_tokens(model)), labels, nothing], dim=1)[:, 1:]


def _virtual_tokens(model: nn.Module) -> int:
    """How many positions an adapter of peft (prompt tuning, p-tuning) puts in front of a causal model's."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if getattr(config, "is_prompt_learning", False) is not True or kind in IN_CACHE:
        return 0
    return int(getattr(config, "num_virtual_tokens", 0) or 0)


@contextmanager
def decoder_explained(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Around a call of the model: that an encoder-decoder had nothing to make the inputs of its decoder from is said.

    Raises:
        ShapeMismatch: in place of the model's own error, if so.
    """
    try:
        yield
    except ValueError as error:
        keys = ("labels", "decoder_input_ids", "decoder_inputs_embeds")
        given = isinstance(inputs, Mapping) and any(inputs.get(key) is not None for key in keys)
        if given or not _is_encoder_decoder(_wrapped(model)):
            raise
        raise ShapeMismatch(
            f"{type(model).__name__} is an encoder-decoder, which makes the inputs of its decoder from labels, and was "
            f'given none ({error}); give mappings with "labels" beside the inputs, to predict too, or with '
            '"decoder_input_ids"'
        ) from error


def unshifted(model: nn.Module, batch: Any) -> bool:
    """Whether a pair ``(input_ids, y)``, both ``(N, T)``, asks a causal model at every position for the token it sees.

    In a pair y stands beside the outputs; labels that equal the inputs are those of a mapping, which are shifted.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and is_causal(model)):
        return False
    ids, y = batch
    while isinstance(ids, (Mapping, tuple, list)) and len(ids):
        ids = ids.get("input_ids") if isinstance(ids, Mapping) else ids[0]
    if not (isinstance(ids, Tensor) and isinstance(y, Tensor) and ids.shape == y.shape and ids.dim() == 2):
        return False
    ids, kept = ids.to(y.device), y != IGNORED
    seen = bool(kept.any()) and bool((ids == y)[kept].all())
    return seen and not bool((ids[:, 1:] == y[:, :-1])[kept[:, :-1]].all())


def first_of(model: nn.Module, outputs: Any) -> Any:
    """The logits ``(N, ...)`` of a tuple of a model of transformers (``return_dict=False``); else the outputs.

    A cache or hidden states follow them, which are tuples themselves. Where another tensor follows, it is not clear.
    """
    if not (isinstance(outputs, tuple) and len(outputs) > 1 and isinstance(outputs[0], Tensor) and outputs[0].dim()):
        return outputs
    known = getattr(getattr(_wrapped(model), "config", None), "model_type", None) is not None
    return outputs[0] if known and outputs[1] is not None and not isinstance(outputs[1], Tensor) else outputs


def channels_are_last(model: nn.Module, batch: Any) -> bool:
    """Whether outputs ``(N, T, C)`` of a batch are known to have the channel last: a model of transformers over tokens.

    Its outputs have one position for each of the tokens ``(N, T)``, or labels, that a mapping batch holds.
    """
    if not isinstance(batch, Mapping) or getattr(getattr(_wrapped(model), "config", None), "model_type", None) is None:
        return False
    given = [batch.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids", "input_features")]
    return any(isinstance(value, Tensor) for value in given)


def decoder_inputs_from_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model needs the batch's labels to make the inputs of its decoder."""
    given = any(batch.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return _is_encoder_decoder(_wrapped(model)) and batch.get("labels") is not None and not given


# -- lines to paste ----------------------------------------------------------------------------------------------------


def target_like(entries: Iterable[Any]) -> str:
    """The entry (of a mapping, a dataclass, a named tuple) that by its name holds the targets."""
    known = set(map(str, entries))
    return next((key for key in TARGETS if key in known), "...")


def lines_of_mapping(model: nn.Module, mapping: Mapping[Any, Any], target: str) -> str:
    """The line to paste that says which entries of a mapping are inputs, all that ``forward`` names, and targets."""
    if {"start_positions", "end_positions"} <= set(mapping) and target == "...":  # the ends of an answer in a text
        return (
            "forward=lambda model, batch: (torch.stack([(out := model(**batch)).start_logits, out.end_logits], 1), "
            'torch.stack([batch["start_positions"], batch["end_positions"]], 1))'
        )
    tensors = [str(key) for key, value in mapping.items() if isinstance(value, Tensor) and key != target]
    taken = [key for key in tensors if key in _named_inputs(model)]
    if len(taken) > 1:
        inputs = _entries(taken)
    else:
        floats = [key for key in tensors if mapping[key].is_floating_point()]
        inputs = f"batch[{_quoted((taken or floats or tensors or ['...'])[0])}]"
    return _line(model, inputs, f"batch[{_quoted(target)}]", target == "shift_labels")


def by_name(keys: Sequence[str], named: str = "batch") -> str:
    """Entries of a mapping as keyword arguments, to be pasted; the mapping stands at ``named``."""
    return f"**{_entries(keys, named)}"


def _entries(keys: Sequence[str], named: str = "batch") -> str:
    several = ", ".join(map(_quoted, keys)) + ("," if len(keys) == 1 else "")
    return f"{{key: {named}[key] for key in ({several})}}"


def lines_of(model: nn.Module, batch: Any) -> str:
    """The same for any other batch: a tuple of tensors, a named tuple, a dataclass, an object."""
    inputs, targets = "batch.x", "batch.y"
    fields = [field.name for field in dataclasses.fields(batch)] if dataclasses.is_dataclass(batch) else None
    fields = list(getattr(batch, "_fields", ())) or fields
    if fields:
        target = target_like(fields)
        target = fields[-1] if target == "..." else target
        rest = [name for name in fields if name != target]
        taken = [name for name in rest if name in _named_inputs(model)]
        inputs, targets = f"batch.{(taken or rest or ['x'])[0]}", f"batch.{target}"
        if len(taken) > 1:
            inputs = "{" + ", ".join(f"{_quoted(name)}: batch.{name}" for name in taken) + "}"
    elif isinstance(batch, (tuple, list)):
        inputs, targets = "batch[0]", "batch[1]"
        first, second = (*batch, None, None)[:2]
        alike = isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() > 1
        if len(batch) > 2 and alike and first.shape == second.shape:  # tokens and their mask, or their kinds
            inputs, targets = "batch[:-1]", "batch[-1]"
    return _line(model, inputs, targets)


def _line(model: nn.Module, inputs: str, targets: str, shifted: bool = False) -> str:
    if shifted or not is_causal(model):
        return f"inputs=lambda batch: {inputs}, targets=lambda batch: {targets}"
    moved = f"torch.nn.functional.pad({targets}[:, 1:], (0, 1), value={IGNORED})"
    return f"inputs=lambda batch: {inputs}, targets=lambda batch: {moved} (or, of labels that are shifted, {targets})"


def _quoted(name: str) -> str:
    return f'"{name}"'


def _named_inputs(model: nn.Module) -> set[str]:
    """What the ``forward`` of the model, or of the one inside an adapter's wrapper, names."""
    found: set[str] = set()
    for module in (model, _wrapped(model)):
        with suppress(TypeError, ValueError):
            found |= set(inspect.signature(module.forward).parameters)
    return found
