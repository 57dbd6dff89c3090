"""What ``labels`` of a mapping batch mean to models that follow the conventions of Hugging Face transformers.

A causal language model shifts its labels inside: its outputs at position t predict label t + 1. An encoder-decoder
model makes the inputs of its decoder from the labels. Both are known by the model's class name and ``config``, so that
transformers need not be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "IGNORED",
    "adapter_lines",
    "arguments",
    "channels_are_last",
    "decoder_inputs_from_labels",
    "frozen_adapter_line",
    "is_causal",
    "takes_labels",
    "target_key",
    "targets",
]

IGNORED = -100  # what transformers and torch.nn.CrossEntropyLoss leave out
CAUSAL = ("ForCausalLM", "LMHeadModel")


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


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a causal language model of transformers, bare or inside an adapter's wrapper."""
    model = _wrapped(model)
    return any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__) and not _is_encoder_decoder(model)


def targets(model: nn.Module, labels: Any) -> Any:
    """The targets of the outputs: ``labels (N, T)`` themselves, or for a causal language model label t + 1 at t.

    The last position of a causal language model has no target and is ignored (-100). Real labels ``(N,)`` of a model
    of transformers with one output (regression) are ``(N, 1)``.
    """
    config = getattr(_wrapped(model), "config", None)
    if isinstance(labels, Tensor) and labels.dim() == 1 and labels.is_floating_point():
        one = getattr(config, "model_type", None) is not None and getattr(config, "num_labels", None) == 1
        return labels[:, None] if one else labels
    if not isinstance(labels, Tensor) or labels.dim() < 2 or not is_causal(model):
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


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
