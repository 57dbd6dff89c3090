"""Adapters of peft: merged, switched off, exchanged, loaded for inference; prompts in front of causal models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from tests.cases import rng

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 12, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.randint(3, 12, (4, 5), generator=rng(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
BATCH = {**TEXT, "labels": torch.tensor([0, 2, 1, 2])}
LORA = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])


def base() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).double()


def moved(model: nn.Module) -> nn.Module:
    """Its trainable weights away from where they begin (LoRA's B is zero there)."""
    with torch.no_grad():
        for k, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.5 * torch.randn(p.shape, generator=rng(k), dtype=p.dtype))
    return model.double()


def adapted(config: Any = LORA, make: Callable[[], nn.Module] = base) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return moved(peft.get_peft_model(make(), config))


@contextmanager
def merged(model: Any) -> Any:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


@contextmanager
def exchanged(model: Any) -> Any:
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    yield
    model.set_adapter("default")


WAYS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "merged": merged,
    "off": lambda model: model.disable_adapter(),
    "exchanged": exchanged,
}
BACK = 'model.unmerge_adapter(), model.enable_adapter_layers(), model.set_adapter("default")'


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_takes_no_part_is_refused_with_the_way_back(way: str) -> None:
    model = adapted()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", parameters=["*lora*"]).fit([BATCH])
    wanted = posterior.predict(TEXT, method="mc", samples=2, generator=rng(0)).probs
    with WAYS[way](model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merged weights are others
        for method in ("map", "mc", "probit"):
            with pytest.raises(lk.errors.UnsupportedLayer, match="have no influence on the outputs since") as caught:
                posterior.predict(TEXT, method=method)
            assert BACK in str(caught.value)
    # merging and taking it apart rounds
    torch.testing.assert_close(posterior.predict(TEXT, method="mc", samples=2, generator=rng(0)).probs, wanted)


def test_a_fit_of_a_merged_adapter_says_so() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"never took part.*model\.unmerge_adapter\(\)"):
        lk.LaplacePosterior(model, "categorical").fit([BATCH])


@pytest.mark.parametrize("saved", [None, ["classifier"]])
def test_steps_after_an_adapter_was_merged_are_refused(saved: list[str] | None) -> None:
    """They would shrink it by weight decay, and leave the weights as they are."""
    model = adapted(peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=saved))
    optimizer = lk.optim.kfac(model, "categorical", l2=0.1)
    optimizer.step(BATCH)
    model.merge_adapter()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"model\.unmerge_adapter\(\)"):
        optimizer.step(BATCH)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.unmerge_adapter()
    optimizer.step(BATCH)


def test_adapters_that_are_loaded_for_inference(tmp_path: Path) -> None:
    """``PeftModel.from_pretrained`` freezes: enough for a posterior from a file, too little for a fit."""
    model = adapted()
    posterior = lk.LaplacePosterior(model, "categorical", parameters=["*lora*"]).fit([BATCH])
    posterior.save(tmp_path / "posterior")
    model.save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    found = lk.LaplacePosterior.load(tmp_path / "posterior", frozen).predict(TEXT)
    torch.testing.assert_close(found.probs, posterior.predict(TEXT).probs)
    for parameters in ("all", ["*lora*"]):
        with pytest.raises(lk.errors.UnsupportedLayer, match=r"from_pretrained\(base, path, is_trainable=True\)"):
            lk.LaplacePosterior(frozen, "categorical", parameters=parameters)


# ------------------------------------------------------------------------------------------------------------- prompts


def causal() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_positions=9, n_embd=4, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).double()


PROMPTS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "ptuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),  # in the cache: no outputs
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_in_front_of_a_causal_model_have_no_labels(kind: str) -> None:
    model = adapted(PROMPTS[kind], causal).eval()
    labels = IDS.clone()
    labels[0, 3:], labels[2] = -100, -100
    batch = {**TEXT, "labels": labels}
    own = model(**batch)
    front = own.logits.shape[1] - labels.shape[1]
    assert front == {"prompt": 2, "ptuning": 3, "prefix": 0}[kind]
    targets = nn.functional.pad(nn.functional.pad(labels, (front, 0), value=-100)[:, 1:], (0, 1), value=-100)
    kept = targets != -100
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.zeros(sum(p.numel() for p in weights), dtype=torch.float64)
    p = own.logits.detach()[kept].softmax(-1)  # (counted positions, C)
    columns = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).double()
    values, vectors = torch.linalg.eigh(columns)
    roots = vectors * values.clamp_min(0).sqrt()[:, None]
    for row in range(len(IDS)):
        at = [k for k, (n, _) in enumerate(kept.nonzero().tolist()) if n == row]
        for k in at:
            for v in range(p.shape[1]):
                z = own.logits[kept][k] @ roots[k][:, v]
                grads = torch.autograd.grad(z, weights, retain_graph=True)
                wanted += torch.cat([g.flatten() for g in grads]).square()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", prior_precision=1e-12).fit([batch])
    assert posterior.n_data == 3  # an example without labels is none
    torch.testing.assert_close(posterior.precision.diag(), wanted, rtol=1e-6, atol=1e-9)
    scores = posterior.predict(TEXT, method="map").log_prob(labels)
    torch.testing.assert_close(-scores.sum(), own.loss.detach().double() * kept.sum(), rtol=1e-5, atol=0)
