"""Models of transformers, built from small random configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS", "build", "causal"]

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: str, model: str, **changes: Any) -> nn.Module:
    """A model of random weights in eval mode; ``changes`` of ``None`` take a size away."""
    import transformers

    sizes = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    settings: Any = found.config
    settings._experts_implementation = "eager"  # grouped products of experts exist in float32 only
    return found.eval()


def _tokens(labels: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(3, 11, (3, 5))
    mask = torch.ones_like(ids)
    ids[1, 3:], mask[1, 3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _classifier(config: str, model: str, **changes: Any) -> Callable[[], Problem]:
    return lambda: Problem(build(config, model, num_labels=3, **changes), _tokens(torch.arange(3)))


def _tagger(config: str, model: str) -> Callable[[], Problem]:
    def make() -> Problem:
        batch = _tokens(torch.randint(3, (3, 5)))
        batch["labels"][1, 3:] = -100
        return Problem(build(config, model, num_labels=3), batch, counted=batch["labels"] != -100)

    return make


def causal(model: nn.Module) -> Problem:
    """A causal language model with the batch that transformers' collators make: labels are the tokens."""
    batch = _tokens(torch.zeros(3, 5))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    counted = torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(3, 1, dtype=torch.bool)], 1)
    return Problem(model, batch, counted=counted)


def _causal(config: str, model: str, **changes: Any) -> Callable[[], Problem]:
    return lambda: causal(build(config, model, **changes))


def _seq2seq(config: str, model: str, **changes: Any) -> Callable[[], Problem]:
    def make() -> Problem:
        batch = _tokens(torch.randint(3, 11, (3, 4)))
        found = build(config, model, decoder_start_token_id=0, **changes)
        return Problem(found, batch, logits=lambda m, b: m(**b).logits)

    return make


def _pixels(config: str, model: str, **changes: Any) -> Callable[[], Problem]:
    def make() -> Problem:
        found = build(config, model, image_size=8, patch_size=4, num_labels=3, vocab_size=None, **changes)
        return Problem(found, {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.arange(3)})

    return make


_GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
_BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": 2}
_MOE = {"num_local_experts": 2, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def _named(name: str, make: Callable[[], Problem], passed: str = "nothing") -> Row:
    return Row("transformers", name, make, passed)


ROWS = [
    _named("BERT, classification", _classifier("BertConfig", "BertForSequenceClassification")),
    _named("BERT, tagging with ignored labels", _tagger("BertConfig", "BertForTokenClassification")),
    _named("DistilBERT", _classifier("DistilBertConfig", "DistilBertForSequenceClassification", dim=8, hidden_dim=12)),
    _named("RoBERTa", _classifier("RobertaConfig", "RobertaForSequenceClassification")),
    _named("ALBERT", _classifier("AlbertConfig", "AlbertForSequenceClassification", embedding_size=4)),
    _named("ELECTRA", _classifier("ElectraConfig", "ElectraForSequenceClassification", embedding_size=4)),
    _named(
        "ModernBERT",
        _classifier("ModernBertConfig", "ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2),
    ),
    _named("GPT-2, language model", _causal("GPT2Config", "GPT2LMHeadModel", **_GPT2)),
    _named("Llama, language model", _causal("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=1)),
    _named("Mistral, language model", _causal("MistralConfig", "MistralForCausalLM", num_key_value_heads=1)),
    _named("Qwen 2, language model", _causal("Qwen2Config", "Qwen2ForCausalLM", num_key_value_heads=1)),
    _named("Mixtral (both experts reached)", _causal("MixtralConfig", "MixtralForCausalLM", **_MOE)),
    _named("T5", _seq2seq("T5Config", "T5ForConditionalGeneration", **_T5)),
    _named("BART", _seq2seq("BartConfig", "BartForConditionalGeneration", **_BART)),
    _named("ViT (transformers)", _pixels("ViTConfig", "ViTForImageClassification")),
    _named("DeiT (transformers)", _pixels("DeiTConfig", "DeiTForImageClassification")),
]
