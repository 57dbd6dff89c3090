"""Conventions of batches: labels of language models, rows of predictions."""

import pytest
import torch
from torch import nn

import laplace_kf as lk

transformers = pytest.importorskip("transformers")


def _own_loss(model, batch):
    """Mean -log p over the counted labels, of the package's outputs and targets."""
    outputs, targets = lk.batches.run(model, batch, None)
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=7, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


def _bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        )
    )  # fmt: skip


def _bert():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )


@pytest.mark.parametrize("build", [_gpt2, _llama, _t5, _bart, _bert])
def test_labels_of_a_batch_give_the_loss_of_the_model_itself(build):
    torch.manual_seed(0)
    model = build().double().eval()
    ids = torch.randint(3, 11, (3, 7))
    labels = ids.clone()
    labels[0, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    own = model(**batch).loss
    # transformers itself computes the loss of causal models in float32
    torch.testing.assert_close(_own_loss(model, batch).float(), own.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("outputs", [3, 20])
def test_a_tensor_that_forward_reads_as_a_batch_is_refused(outputs):
    """With 20 outputs the first example's look like one row for each of the 20 examples."""
    model = nn.Linear(4, outputs)
    x, y, w = torch.randn(20, 4), torch.randint(0, outputs, (20,)), torch.rand(20)
    posterior = lk.LaplacePosterior(model, "categorical", forward=lambda m, batch: (m(batch[0]), batch[1]))
    posterior.fit([(x, y, w)])
    for method in ("map", "linearized", "mc"):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"predict\(\(x, None\)\)"):
            posterior.predict(x, method=method)
    probs = posterior.predict((x, None), method="map").probs
    torch.testing.assert_close(probs, model(x).softmax(-1).detach())
