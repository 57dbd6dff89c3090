"""A model's own loss of a batch is the one its posterior is made for, or the batch is refused with the way out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import laplace_kf as lk
from laplace_kf import agreement
from tests.cases import labels, normal, rng

N, T, V, D = 5, 4, 6, 3


class Owner(nn.Module):
    """Outputs by position, and the loss that ``kind`` says, in the container that ``form`` says."""

    def __init__(self, kind: str, form: str = "dict", positions: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind, self.form = nn.Linear(D, V).double(), kind, form
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if kind == "smoothed" else None

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        kind = self.kind
        if kind == "shifted":
            z, y = z[:, :-1], y[:, 1:]
        if kind == "sequence":  # mean of means, of sequences that are not equally long
            return torch.stack([F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]).mean()
        if z.dim() > 2:
            z, y = z.flatten(0, 1), y.flatten()
        if self.criterion is not None:
            return self.criterion(z, y)
        weight = torch.linspace(1, 2, V, dtype=z.dtype) if kind == "weighted" else None
        loss = F.cross_entropy(z, y, weight=weight, reduction="sum" if kind in ("sum", "items") else "mean")
        return loss / 7 if kind == "items" else loss + 0.01 if kind == "router" else loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        z = self.layer(x)
        own = None if labels is None else self.loss(z, labels)
        if self.form == "tuple":
            return (z,) if own is None else (own, z)
        if self.form == "after":
            return z, own
        return {"logits": z} if own is None else {"loss": own, "logits": z}


def batch(ignored: bool = True) -> dict[str, Tensor]:
    y = labels(V, N, T)
    if ignored:
        y[0, 1:] = -100
        y[2, :2] = -100
    return {"x": normal(N, T, D), "labels": y}


@pytest.mark.parametrize("form", ["dict", "tuple", "after"])
@pytest.mark.parametrize("kind", ["mean", "sum", "items"])
def test_a_constant_factor_makes_no_difference(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, inner = [], agreement._difference
    monkeypatch.setattr(agreement, "_difference", lambda *args: seen.append(inner(*args)) or seen[-1])
    model, given = Owner(kind, form), batch()
    found = lk.LaplacePosterior(model, "categorical", structure="full").fit([given, given])
    assert seen == [None]  # compared, once
    wanted = lk.LaplacePosterior(model.layer, "categorical", structure="full").fit([(given["x"], given["labels"])] * 2)
    torch.testing.assert_close(found.precision.dense(), wanted.precision.dense())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shifted", r"one position later: it shifts the labels itself"),
        ("smoothed", r"module 'criterion' has label_smoothing=0.1: Categorical\(label_smoothing="),
        ("weighted", r"class weights"),
        ("sequence", r"another kind of loss"),
        ("router", r"output_router_logits=False"),
    ],
)
@pytest.mark.parametrize("form", ["dict", "tuple", "after"])
def test_another_loss_is_refused_with_the_line_to_paste(kind: str, reason: str, form: str) -> None:
    model, given = Owner(kind, form), batch()
    before = copy.deepcopy(model.state_dict())
    entries = [
        lambda: lk.LaplacePosterior(model, "categorical").fit([given]),
        lambda: lk.curvature.estimate(model, "categorical", [given]),
        lambda: lk.curvature.ggn_vector_product(model, "categorical", [given], torch.zeros(V * D + V).double()),
        lambda: lk.optim.kfac(model, "categorical").step(given),
        lambda: lk.optim.HessianFree(model, "categorical").step(given),
        lambda: lk.continual.EWC(model, "categorical").after_task([given]),
    ]
    for call in entries:
        with pytest.raises(lk.errors.ShapeMismatch, match=reason) as caught:
            call()
        assert 'inputs=lambda batch: {key: batch[key] for key in ("x",)}, targets=' in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # what the message says, pasted
    lk.LaplacePosterior(
        model, "categorical", inputs=lambda batch: {key: batch[key] for key in ("x",)}, targets=lambda b: b["labels"]
    ).fit([given])


def test_the_shifted_line_of_the_message_gives_the_loss_of_the_model() -> None:
    model, given = Owner("shifted"), batch()
    fitted = lk.LaplacePosterior(
        model, "categorical", inputs=lambda b: b["x"],
        targets=lambda batch: torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100),
    ).fit([given])  # fmt: skip
    terms = fitted.predict(given["x"], method="map").log_prob(F.pad(given["labels"][:, 1:], (0, 1), value=-100))
    count = int((given["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(-terms.sum() / count, model(**given)["loss"].detach())


def test_tune_looks_at_its_own_data_too() -> None:
    good, given = Owner("mean"), batch()
    posterior = lk.LaplacePosterior(good, "categorical").fit([given])
    good.kind = "shifted"
    with pytest.raises(lk.errors.ShapeMismatch, match="shifts the labels itself"):
        posterior.tune([given], n_data=[1.0], prior_precision=[1.0])


def test_a_loss_seen_through_forward_is_compared() -> None:
    model, given = Owner("shifted"), batch()
    wrong = lambda m, b: (m(**b)["logits"], b["labels"])  # noqa: E731
    with pytest.raises(lk.errors.ShapeMismatch, match="shifts the labels itself"):
        lk.LaplacePosterior(model, "categorical", forward=wrong).fit([given])
    right = lambda m, b: (m(**b)["logits"][:, :-1], b["labels"][:, 1:])  # noqa: E731
    lk.LaplacePosterior(model, "categorical", forward=right).fit([given])
    assert not model._forward_hooks


def test_outputs_before_their_loss_are_compared_through_forward() -> None:
    """``logits, loss = model(x, y)``, and ``(logits, None)`` without targets."""
    model, given = Owner("smoothed", "after"), batch()
    pair = (given["x"], given["labels"])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"label_smoothing=0\.1"):
        lk.LaplacePosterior(model, "categorical", forward=lambda m, b: (m(*b)[0], b[1])).fit([pair])
    fitted = lk.LaplacePosterior(model, "categorical").fit([pair])  # (z, None): no loss is asked for
    torch.testing.assert_close(fitted.predict(pair[0], method="map").probs, model.layer(pair[0]).softmax(-1).detach())


def test_regression_and_binary_losses() -> None:
    class Other(Owner):
        def loss(self, z: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(z, y) if self.kind == "mse" else F.binary_cross_entropy_with_logits(z, y)

    x = normal(N, D)
    cases = {"mse": ("gaussian", normal(N, V, seed=2)), "bce": ("bernoulli", (normal(N, V, seed=2) > 0).double())}
    for kind, (likelihood, y) in cases.items():
        lk.LaplacePosterior(Other(kind), likelihood).fit([{"x": x, "labels": y}])
    with pytest.raises(lk.errors.ShapeMismatch, match="the likelihood Gaussian"):
        lk.LaplacePosterior(Other("bce"), "gaussian").fit([{"x": x, "labels": cases["bce"][1]}])


def test_a_network_that_fits_its_data_perfectly_is_compared_by_values() -> None:
    """There the gradients are rounding errors."""
    for kind in ("mean", "shifted"):
        model, given = Owner(kind).float(), batch(ignored=False)
        with torch.no_grad():
            model.layer.weight.mul_(0)
            model.layer.bias.mul_(0)
            model.layer.bias[2] = 60.0
        given = {"x": given["x"].float(), "labels": torch.full_like(given["labels"], 2)}
        if kind == "shifted":
            given["labels"][:, 0] = 1
            with pytest.raises(lk.errors.ShapeMismatch, match="own loss"):
                agreement.require_same_loss(model, given, None, lk.likelihoods.Categorical())
        else:
            agreement.require_same_loss(model, given, None, lk.likelihoods.Categorical())


def test_no_loss_no_pass() -> None:
    calls = []

    class Counted(Owner):
        def forward(self, x: Tensor) -> Any:
            calls.append(1)
            return self.layer(x)

    model, given = Counted("mean"), batch()
    agreement.require_same_loss(model, (given["x"], given["labels"]), None, lk.likelihoods.Categorical())
    agreement.require_same_loss(model, given, None, lk.likelihoods.Categorical())
    assert not calls


# ------------------------------------------------------------------------------------------------ transformers

transformers = pytest.importorskip("transformers")


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", "<mask>", *"abcdefgh"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


SMALL = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def causal(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    if name == "opt":
        settings = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**settings, ffn_dim=8, word_embed_proj_dim=8))
    if name == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
        return transformers.MixtralForCausalLM(config)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(causal("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))


def agrees(model: nn.Module, given: dict[str, Tensor], likelihood: str = "categorical") -> None:
    """The package's loss is the model's own, and the guard says so."""
    model.eval()
    own = float(model(**given).loss)
    outputs, targets = lk.batches.run(model, given, None)
    rule = lk.likelihoods.get_likelihood(likelihood)
    mine = -float(rule.log_prob(outputs, targets).sum()) / rule.terms(targets)
    assert mine == pytest.approx(own, rel=1e-5)
    agreement.require_same_loss(model, given, None, rule)


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "llama", "peft"])
def test_causal_models_on_the_batches_of_their_collator(name: str) -> None:
    words = tokenizer()
    collate = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    given = dict(collate([words(text) for text in ("a b c d", "e f", "g h a")]))
    model = causal(name)
    agrees(model, given)
    parameters = {"gpt2": "*ln_f*", "opt": "*final_layer_norm*", "peft": "*lora*"}.get(name, "model.norm*")
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", parameters=[parameters]).fit([given])
    prediction = posterior.predict(given, method="map")
    total = float(model.eval()(**given).loss) * int((given["labels"][:, 1:] != -100).sum())
    assert -float(prediction.log_prob(given["labels"]).sum()) == pytest.approx(total, rel=1e-5)


def test_masked_models_on_the_batches_of_their_collator() -> None:
    words = tokenizer()
    torch.manual_seed(1)
    collate = transformers.DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.5)
    given = dict(collate([words("a b c d e"), words("f g")]))
    agrees(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), given)


def test_classifiers_on_the_batches_of_the_padding_collator() -> None:
    words = tokenizer()
    collate = transformers.DataCollatorWithPadding(words)
    rows = [dict(words(text), label=k) for k, text in enumerate(("a b c", "d", "e f"))]
    given = dict(collate(rows))
    for problem, likelihood, change in [
        (None, "categorical", lambda y: y),
        ("multi_label_classification", "bernoulli", lambda y: F.one_hot(y, 3).float()),
    ]:
        config = transformers.BertConfig(**SMALL, num_labels=3, problem_type=problem)
        model = transformers.BertForSequenceClassification(config)
        agrees(model, {**given, "labels": change(given["labels"])}, likelihood)
    wrong = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_labels=3, problem_type="multi_label_classification")
    )
    y = F.one_hot(given["labels"], 3).float()
    with pytest.raises(lk.errors.ShapeMismatch, match='which is the likelihood "bernoulli"'):
        lk.LaplacePosterior(wrong, "gaussian").fit([{**given, "labels": y}])


def test_the_kind_of_loss_that_a_model_notes_for_its_first_labels_is_not_left_in_its_config() -> None:
    """Soft labels make it ``multi_label_classification``, and whoever trains on would train on that."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3))
    given = {"input_ids": torch.arange(3, 9).reshape(2, 3), "labels": torch.eye(3)[:2]}
    with pytest.raises(lk.errors.ShapeMismatch, match='problem_type="multi_label_classification"'):
        lk.LaplacePosterior(model, "categorical", structure="diag").fit([given])
    with pytest.raises(lk.errors.ShapeMismatch, match='problem_type="multi_label_classification"'):
        lk.optim.kfac(model, "categorical").step(given)
    assert model.config.problem_type is None
    lk.LaplacePosterior(model, "bernoulli", structure="diag").fit([given])
    assert model.config.problem_type is None


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_on_the_batches_of_their_collator(name: str, prepared: bool) -> None:
    torch.manual_seed(0)
    if name == "t5":
        model: Any = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
        )
    else:
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=12, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
            )
        )  # fmt: skip
    words = tokenizer()
    collate = transformers.DataCollatorForSeq2Seq(words, model=model if prepared else None)
    rows = [dict(words(a), labels=words(b)["input_ids"]) for a, b in (("a b c", "d e"), ("f", "g h a b"))]
    given = dict(collate(rows))
    assert ("decoder_input_ids" in given) == prepared
    agrees(model, given)


def test_the_router_loss_of_a_mixture_of_experts_is_refused_by_name() -> None:
    model = causal("mixtral")
    model.config.output_router_logits = True
    given = {"input_ids": torch.arange(3, 9).reshape(2, 3), "labels": torch.arange(3, 9).reshape(2, 3)}
    with pytest.raises(lk.errors.ShapeMismatch, match="output_router_logits=False"):
        lk.LaplacePosterior(model, "categorical", structure="diag", parameters=["lm_head*"]).fit([given])
    lk.LaplacePosterior(model, "categorical", structure="diag", parameters=["lm_head*"]).fit(
        [{**given, "output_router_logits": False}]
    )


def test_a_causal_model_by_another_name_is_refused_with_the_shift() -> None:
    inner = causal("gpt2")

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    with pytest.raises(lk.errors.ShapeMismatch, match="shifts the labels itself"):
        lk.LaplacePosterior(Mine(), "categorical", structure="diag").fit([{"input_ids": ids, "labels": ids}])


def test_a_causal_name_without_a_shift_is_refused_with_the_line() -> None:
    settings = {k: v for k, v in SMALL.items() if k.endswith("token_id")}
    config = transformers.XLNetConfig(vocab_size=12, d_model=8, n_layer=1, n_head=2, d_inner=8, **settings)
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(config).double()
    ids = torch.randint(3, 11, (3, 5), generator=rng(0))
    with pytest.raises(lk.errors.ShapeMismatch, match="compares position t with label t, without a shift"):
        lk.LaplacePosterior(model, "categorical", parameters=["lm_loss*"]).fit([{"input_ids": ids, "labels": ids}])
    pasted = lk.LaplacePosterior(
        model, "categorical", structure="diag", unused="prior", parameters=["lm_loss*"],
        inputs=lambda batch: {key: batch[key] for key in ("input_ids",)}, targets=lambda batch: batch["labels"],
    ).fit([{"input_ids": ids, "labels": ids}])  # fmt: skip
    own = float(model.eval()(input_ids=ids, labels=ids).loss.detach())
    assert -float(pasted.predict({"input_ids": ids}, method="map").log_prob(ids).mean()) / 5 == pytest.approx(own)


@pytest.mark.parametrize("name", ["token", "causal"])
def test_as_many_tokens_as_classes_are_no_question_of_layout(name: str) -> None:
    ids = torch.randint(3, 11, (3, 12), generator=rng(0))
    if name == "token":
        model: Any = transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, num_labels=12))
    else:
        model = causal("gpt2")
        model.transformer.wpe = nn.Embedding(16, 8)
    given = {"input_ids": ids, "labels": ids}
    model = model.double()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", unused="prior").fit([given])
    counted = 3 * (12 if name == "token" else 11)
    own = float(model.eval()(**given).loss) * counted
    assert -float(posterior.predict(given, method="map").log_prob(ids).sum()) == pytest.approx(own, rel=1e-5)


def test_one_real_label_an_example() -> None:
    """As transformers' collators make it for ``num_labels=1``: labels ``(N,)`` beside outputs ``(N, 1)``."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=1)).double()
    given = {"input_ids": torch.randint(3, 11, (4, 5), generator=rng(0)), "labels": normal(4, seed=1)}
    posterior = lk.LaplacePosterior(model, "gaussian", structure="diag").fit([given])
    terms = posterior.predict(given, method="map").log_prob(given["labels"])
    own = model.eval()(**given).loss.detach()
    torch.testing.assert_close(-(terms + 0.5 * torch.log(torch.tensor(2 * torch.pi))).mean().double(), own / 2)


def test_label_lists_and_predictions_of_causal_models() -> None:
    """Labels of a mapping are those of transformers in ``log_prob`` too; of a tensor they stand beside the outputs."""
    model, ids = causal("gpt2").eval(), torch.randint(3, 11, (3, 5), generator=rng(0))
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", parameters=["transformer.ln_f*"])
    posterior.fit([{"input_ids": ids, "labels": ids}])
    beside = F.pad(ids[:, 1:], (0, 1), value=-100)
    own = model(input_ids=ids, labels=ids).loss.detach() * ids[:, 1:].numel()
    for method in ("map", "mc", "probit"):
        given = posterior.predict({"input_ids": ids}, method=method, samples=2, generator=rng(0))
        plain = posterior.predict(ids, method=method, samples=2, generator=rng(0))
        torch.testing.assert_close(given.log_prob(ids), plain.log_prob(beside))
        if method == "map":
            torch.testing.assert_close(-given.log_prob(ids).sum(), own)
    drawn = posterior.predictor(2, rng(0))
    torch.testing.assert_close(drawn({"input_ids": ids}).log_prob(ids), drawn(ids).log_prob(beside))
