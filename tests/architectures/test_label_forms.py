"""Labels and outputs of transformers models in less usual forms: tuples, caches, pairs, ends of answers, no labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import laplace_kf as lk
from tests.architectures.test_own_loss import SMALL, causal
from tests.cases import rng

transformers = pytest.importorskip("transformers")


def test_one_whole_number_an_example_is_a_real_label_too() -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=1)).double()
    given = {"input_ids": torch.randint(3, 11, (4, 5), generator=rng(0)), "labels": torch.tensor([1, 5, 3, 2])}
    fits = [
        lk.LaplacePosterior(model, "gaussian", structure="diag").fit([{**given, "labels": y}]).precision.diag()
        for y in (given["labels"], given["labels"].double())
    ]
    assert torch.equal(*fits)


def test_labels_that_are_shifted_already_are_refused_with_the_line() -> None:
    """``shift_labels`` (of sequence parallelism) stand beside the outputs, and the model prefers them."""
    model = causal("gpt2").double()
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    other = torch.randint(3, 11, (3, 5), generator=rng(1))
    settings: dict[str, Any] = {"structure": "diag", "parameters": ["*ln_f*"]}
    with pytest.raises(lk.errors.ShapeMismatch, match=r'targets=lambda batch: batch\["shift_labels"\]'):
        lk.LaplacePosterior(model, "categorical", **settings).fit(
            [{"input_ids": ids, "labels": ids, "shift_labels": other}]
        )
    with pytest.raises(lk.errors.ShapeMismatch, match=r'batch\["input_ids"\], targets=lambda b.*\["shift_labels"\]'):
        lk.LaplacePosterior(model, "categorical", **settings).fit([{"input_ids": ids, "shift_labels": other}])
    beside = {"input_ids": ids, "labels": ids, "shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100)}
    lk.LaplacePosterior(model, "categorical", **settings).fit([beside])  # the same labels


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tuples_of_transformers_models_begin_with_the_logits(name: str) -> None:
    """``return_dict=False``, with the cache or the hidden states behind."""
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    if name == "gpt2":
        model, labels, more = causal("gpt2").double(), ids, {"use_cache": True}
    else:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)).double()
        labels, more = torch.arange(3), {"output_hidden_states": True}
    given = {"input_ids": ids, "labels": labels}
    tuples = {**given, **more, "return_dict": False}
    found, wanted = (
        lk.LaplacePosterior(model, "categorical", structure="diag", unused="prior").fit([each])
        for each in (tuples, given)
    )
    assert torch.equal(found.precision.diag(), wanted.precision.diag())
    assert torch.equal(found.predict(tuples, method="map").probs, wanted.predict(given, method="map").probs)
    both = transformers.BertModel(transformers.BertConfig(**SMALL)).double()
    with pytest.raises(lk.errors.ShapeMismatch, match="returned tuple of 2"):  # hidden states and pooled ones
        lk.LaplacePosterior(both, "categorical").fit([{**given, "return_dict": False}])


def test_the_ends_of_an_answer_by_the_line_of_the_message() -> None:
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL, num_labels=2)).double().eval()
    given = {
        "input_ids": torch.randint(3, 11, (3, 5), generator=rng(0)),
        "start_positions": torch.tensor([0, 1, 3]), "end_positions": torch.tensor([1, 1, 4]),
    }  # fmt: skip
    with pytest.raises(lk.errors.ShapeMismatch, match="forward=lambda model, batch") as caught:
        lk.LaplacePosterior(model, "categorical").fit([given])
    line = str(caught.value).split("or pass forward=")[1]
    forward = eval(line, {"torch": torch})
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", unused="prior", forward=forward).fit(
        [given]
    )
    ends = torch.stack([given["start_positions"], given["end_positions"]], 1)
    own = model(**given).loss.detach()  # a mean over the two
    torch.testing.assert_close(-posterior.predict(given, method="map").log_prob(ends).sum() / 6, own)


def test_a_pair_whose_targets_are_its_inputs_is_refused_for_causal_models() -> None:
    """In a pair targets stand beside the outputs; as labels of transformers they are to be shifted."""
    model = causal("gpt2").double()
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    settings: dict[str, Any] = {"structure": "diag", "parameters": ["*ln_f*"]}
    wanted = lk.LaplacePosterior(model, "categorical", **settings).fit([{"input_ids": ids, "labels": ids}])
    some = ids.clone()
    some[0, 3:] = -100
    for pair in ((ids, ids), (ids, some), ({"input_ids": ids}, ids), ((ids,), ids)):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"the targets of the pair .* are the input_ids themselves"):
            lk.LaplacePosterior(model, "categorical", **settings).fit([pair])
        with pytest.raises(lk.errors.ShapeMismatch, match="the targets of the pair"):
            lk.optim.kfac(model, "categorical").step(*pair)
    right = lk.LaplacePosterior(model, "categorical", **settings).fit([(ids, F.pad(ids[:, 1:], (0, 1), value=-100))])
    assert torch.equal(right.precision.diag(), wanted.precision.diag())
    same = torch.full((3, 5), 4)  # one token over and over: shifted or not
    lk.LaplacePosterior(model, "categorical", **settings).fit([(same, F.pad(same[:, 1:], (0, 1), value=-100))])
    triple = (ids, torch.ones_like(ids), ids)  # the line shifts, too
    with pytest.raises(lk.errors.ShapeMismatch, match="inputs=lambda batch") as caught:
        lk.LaplacePosterior(model, "categorical", **settings).fit([triple])
    line = str(caught.value).partition("targets=")[2].partition(" (or, of labels")[0]
    assert torch.equal(eval(line, {"torch": torch})(triple), F.pad(ids[:, 1:], (0, 1), value=-100))


def test_an_encoder_decoder_without_labels_is_told_so() -> None:
    config = transformers.T5Config(
        vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"is an encoder-decoder.*was given none"):
        lk.LaplacePosterior(model, "categorical").fit([({"input_ids": ids}, ids)])
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag").fit([{"input_ids": ids, "labels": ids}])
    for x in (ids, {"input_ids": ids}):
        with pytest.raises(lk.errors.ShapeMismatch, match='give mappings with "labels"'):
            posterior.predict(x)
    with pytest.raises(lk.errors.ShapeMismatch, match="'labels' of a mapping batch is None"):
        lk.LaplacePosterior(model, "categorical").fit([{"input_ids": ids, "labels": None}])
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"tensors of shape \(5,\).*x\[None\] for one example"):
        lk.LaplacePosterior(bert, "categorical").fit([{"input_ids": ids[0], "labels": torch.arange(1)}])


def test_positions_that_the_model_leaves_out_by_its_mask_are_named() -> None:
    torch.manual_seed(0)
    model = transformers.ElectraForPreTraining(transformers.ElectraConfig(**SMALL, embedding_size=8)).double()
    given = {
        "input_ids": torch.randint(3, 11, (3, 5), generator=rng(0)),
        "attention_mask": (torch.arange(5) < torch.tensor([[5], [2], [3]])).long(),
        "labels": torch.randint(2, (3, 5), generator=rng(1)),
    }
    settings: dict[str, Any] = {"structure": "diag", "parameters": ["discriminator*"]}
    with pytest.raises(lk.errors.ShapeMismatch, match="leaves out the positions that attention_mask does") as caught:
        lk.LaplacePosterior(model, "bernoulli", **settings).fit([given])
    line = str(caught.value).partition("targets=")[2].partition(". To have")[0]
    kept = eval(line)(given)
    assert torch.equal(kept == -100, given["attention_mask"] == 0)
    lk.LaplacePosterior(model, "bernoulli", **settings).fit([{**given, "labels": kept}])


def test_a_cache_in_a_batch_is_not_written_into() -> None:
    """Every pass would lengthen it, and the next one see other inputs."""
    model = causal("gpt2").double().eval()
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :2]).past_key_values
    given = {"input_ids": ids[:, 2:], "past_key_values": cache, "labels": ids[:, 2:]}
    only: dict[str, Any] = {"structure": "full", "parameters": ["*ln_f*"]}  # which no cached key depends on
    found = lk.LaplacePosterior(model, "categorical", **only).fit([given])
    labels = ids.clone()
    labels[:, :3] = -100  # the first of them is the cache's to predict
    wanted = lk.LaplacePosterior(model, "categorical", **only).fit([{"input_ids": ids, "labels": labels}])
    torch.testing.assert_close(found.precision.dense(), wanted.precision.dense())
    assert cache.get_seq_length() == 2
    probs = found.predict({"input_ids": ids[:, 2:], "past_key_values": cache}, method="map").probs
    torch.testing.assert_close(probs, wanted.predict({"input_ids": ids}, method="map").probs[:, 2:])
