"""Fine-tuning by adapters: peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.models.language import ROWS as LANGUAGE
from benchmarks.models.language import build, causal
from benchmarks.models.problem import Problem, Row

__all__ = ["ROWS"]


def _perturbed(model: nn.Module) -> nn.Module:
    """LoRA's second matrices start at zero, where the first ones have no curvature."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _lora(base: Callable[[], nn.Module], task: str, **options: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, task_type=task, **options)
    return _perturbed(peft.get_peft_model(base(), config))


def _llama() -> nn.Module:
    return build("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=1)


def _bert() -> Problem:
    problem = next(row for row in LANGUAGE if row.name.startswith("BERT, class")).make()
    model = problem.model
    problem.model = _lora(lambda: model, "SEQ_CLS", target_modules=["query", "value"])
    return problem


def _ia3() -> nn.Module:
    import peft

    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    return peft.get_peft_model(_llama(), config).eval()


_ATTENTION = ["q_proj", "v_proj"]
ROWS = [
    Row("peft", "Llama + LoRA", lambda: causal(_lora(_llama, "CAUSAL_LM", target_modules=_ATTENTION))),
    Row("peft", "Llama + DoRA", lambda: causal(_lora(_llama, "CAUSAL_LM", target_modules=_ATTENTION, use_dora=True))),
    Row("peft", "BERT + LoRA", _bert),
    Row("peft", "Llama + IA³", lambda: causal(_ia3())),
]
