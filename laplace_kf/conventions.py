"""What ``labels`` of a mapping batch mean to models that follow the conventions of Hugging Face transformers.

A causal language model shifts its labels inside: its outputs at position t predict label t + 1. An encoder-decoder
model makes the inputs of its decoder from the labels. Both are known by the model's class name and ``config``, so that
transformers need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IGNORED", "decoder_inputs_from_labels", "targets"]

IGNORED = -100  # what transformers and torch.nn.CrossEntropyLoss leave out
CAUSAL = ("ForCausalLM", "LMHeadModel")


def _wrapped(model: nn.Module) -> nn.Module:
    """The model inside an adapter's wrapper (peft)."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def targets(model: nn.Module, labels: Any) -> Any:
    """The targets of the outputs: ``labels (N, T)`` themselves, or for a causal language model label t + 1 at t.

    The last position of a causal language model has no target and is ignored (-100).
    """
    model = _wrapped(model)
    causal = any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__) and not _is_encoder_decoder(model)
    if not causal or not isinstance(labels, Tensor) or labels.dim() < 2:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def decoder_inputs_from_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model needs the batch's labels to make the inputs of its decoder."""
    given = any(batch.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
    return _is_encoder_decoder(_wrapped(model)) and batch.get("labels") is not None and not given
