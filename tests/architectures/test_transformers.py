"""Attention, transformers and recurrent networks against dense references, from the fit to files.

The Kronecker references are networks written out with ``nn.Linear`` modules that hold the same numbers; the oracle's
hooks see those.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import laplace_kf as lk
from tests import oracles
from tests.cases import CATEGORICAL, build, labels, normal, rng
from tests.checks import close

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 8,
}
IDS = torch.randint(1, 11, (3, 5), generator=rng(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


class Logits(nn.Module):
    """The output tensor of a model that returns more than that."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.model(*args, **kwargs)
        return out if isinstance(out, Tensor) else out.logits


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask, the fast path of which would skip every module."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first, norm_first=norm_first)
        self.embed, self.encoder = nn.Embedding(11, 4), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x.mean(1 if self.batch_first else 0))


class Decoder(nn.Module):
    """``nn.TransformerDecoder``: causal self-attention, and queries from elsewhere than keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6), 1)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)
        return self.head(self.decoder(x[:4], x, tgt_mask=mask).transpose(0, 1))


class Separate(nn.Module):
    """Attention with separate projections of queries, keys and values of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.head(self.attention(q, k, v)[0].mean(1))


class Positions(nn.Module):
    """A small GPT written by hand: position table looked up once, causal attention, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 4), nn.Embedding(8, 4)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        y = self.norm(x)
        mask = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
        return self.head(x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0])


class Cells(nn.Module):
    """A recurrent cell called in a loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Recurrent(nn.Module):
    """A fused recurrent layer in front of a Linear."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(2, 3, **options)
        width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
        self.head, self.batch_first = nn.Linear(width, 3), bool(options.get("batch_first"))

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x if self.batch_first else x.transpose(0, 1))
        return self.head(out[:, -1] if self.batch_first else out[-1])


def classifier(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A classifier of ``transformers`` from its config: nothing is downloaded."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**sizes)
        head = {"GPT2": "LMHeadModel", "ViT": "ForImageClassification", "Llama": "ForCausalLM"}
        return getattr(transformers, f"{name}{head.get(name, 'ForSequenceClassification')}")(config)

    return make


TEXT = {"input_ids": IDS, "attention_mask": MASK}
NEXT = torch.cat([IDS[:, 1:], torch.full((3, 1), -100)], 1)
SEQUENCE = normal(3, 4, 2)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "bert": (classifier("Bert", **SIZES, num_labels=3), TEXT, labels(3, 3)),
    "distilbert": (
        classifier(
            "DistilBert", vocab_size=11, dim=4, n_layers=1, n_heads=2, hidden_dim=6, max_position_embeddings=8,
            num_labels=3,
        ),
        TEXT,
        labels(3, 3),
    ),
    "gpt2": (classifier("GPT2", vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8), {"input_ids": IDS}, NEXT),
    "llama": (classifier("Llama", **SIZES), {"input_ids": IDS}, NEXT),
    "vit": (
        classifier(
            "ViT", hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, image_size=4,
            patch_size=2, num_labels=3,
        ),
        {"pixel_values": normal(3, 3, 4, 4)},
        labels(3, 3),
    ),
    "encoder": (Encoder, TEXT, labels(3, 3)),
    "encoder-time-first": (lambda: Encoder(False, True), TEXT, labels(3, 3)),
    "decoder": (Decoder, IDS, labels(3, 3, 4)),
    "separate-projections": (
        Separate, (normal(3, 2, 4), normal(3, 4, 3, seed=1), normal(3, 4, 5, seed=2)), labels(3, 3)
    ),
    "hand-written-gpt": (Positions, IDS, NEXT),
    "rnn": (lambda: Recurrent("RNN"), SEQUENCE, labels(3, 3)),
    "rnn-relu": (lambda: Recurrent("RNN", nonlinearity="relu", bias=False), SEQUENCE, labels(3, 3)),
    "gru": (lambda: Recurrent("GRU", num_layers=2, batch_first=True), SEQUENCE, labels(3, 3)),
    "lstm": (lambda: Recurrent("LSTM", bidirectional=True, batch_first=True), SEQUENCE, labels(3, 3)),
    "rnn-cell": (lambda: Cells("RNNCell"), SEQUENCE, labels(3, 3)),
    "gru-cell": (lambda: Cells("GRUCell"), SEQUENCE, labels(3, 3)),
    "lstm-cell": (lambda: Cells("LSTMCell"), SEQUENCE, labels(3, 3)),
    "lstm-projected": (lambda: Recurrent("LSTM", proj_size=2, num_layers=2), SEQUENCE, labels(3, 3)),
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def problem(family: str) -> tuple[nn.Module, Any, Tensor, Any]:
    make, x, y = FAMILIES[family]
    model = build(make)
    # y is aligned with the outputs; "labels" of a causal model would be those of the inputs, which it shifts itself
    batch = {**x, "labels": y} if isinstance(x, dict) and family not in ("gpt2", "llama") else (x, y)
    return model, x, y, batch


@families
def test_curvature_is_the_dense_ggn(family: str) -> None:
    model, x, y, batch = problem(family)
    ggn = oracles.dense_ggn(Logits(model), x, y, CATEGORICAL.nll)
    tolerance = 1e-6 if family == "llama" else 1e-10  # its RMSNorm computes in float32 whatever the model's type
    for structure, wanted in (("full", ggn), ("diag", torch.diag(ggn.diagonal()))):
        curvature = lk.curvature.estimate(model, "categorical", [batch], structure).mean()
        close(curvature.dense(), wanted, tolerance)


@families
def test_fit_predict_and_save(family: str, tmp_path: Path) -> None:
    model, x, _, batch = problem(family)
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision=30.0).fit([batch])
    covered = {name for row in posterior.summary() for name in row.parameters}
    assert covered == {name for name, _ in model.named_parameters()}
    norms = {name for row in posterior.summary() if row.structure == "diag" for name in row.parameters}
    kinds = (nn.LayerNorm, nn.RMSNorm)
    allowed = [m for m in model.modules() if isinstance(m, kinds) or "Norm" in type(m).__name__]
    extra = ("cls_token", "position_embeddings", "bias_k", "bias_v")
    for name in norms:
        owner = model.get_submodule(name.rpartition(".")[0])
        assert owner in allowed or name.endswith(extra), f"{name} has no Kronecker factors"
    prediction = posterior.predict(x, method="mc", samples=3, generator=rng(1))
    total = prediction.probs.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    posterior.save(tmp_path / "posterior.safetensors")
    again = lk.LaplacePosterior.load(tmp_path / "posterior.safetensors", model).predict(
        x, method="mc", samples=3, generator=rng(1)
    )
    assert torch.equal(prediction.probs, again.probs)


@families
def test_kronecker_blocks_keep_the_trace_of_what_they_stand_for(family: str) -> None:
    """One example at one position has exact blocks; the trace of the sum over examples is bounded by the positions."""
    model, x, y, batch = problem(family)
    kron = lk.curvature.estimate(model, "categorical", [batch], "kron").mean().diag()
    assert bool(torch.isfinite(kron).all())
    reached = oracles.dense_ggn(Logits(model), x, y, CATEGORICAL.nll).diagonal() > 1e-12
    assert bool((kron[reached] > 0).all()), "a parameter with curvature has none in the Kronecker matrix"


# ------------------------------------------------------------------------------- the same numbers in nn.Linear modules


class PlainAttention(nn.Module):
    """Multi-head attention, ``queries`` from ``source`` rows and the rest from all rows, in plain modules."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        if packed:
            self.qkv = nn.Linear(4, 12)
        else:
            self.q, self.kv = nn.Linear(4, 4), nn.Linear(4, 8)
        self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, (k, v) = self.q(x[:, :2]), self.kv(x).chunk(2, -1)

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (2, 2)).transpose(1, 2)

        weights = torch.softmax(heads(q) @ heads(k).transpose(-1, -2) / 2**0.5, -1)
        return self.head(self.out((weights @ heads(v)).transpose(1, 2).flatten(2)).mean(1))


class FusedAttention(nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x if self.packed else x[:, :2], x, x)[0].mean(1))


class PlainRecurrent(nn.Module):
    """One layer of a recurrent network, cell by cell, in plain modules."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, gates = kind, {"RNN": 1, "GRU": 3, "LSTM": 4}[kind]
        self.x, self.h, self.head = nn.Linear(2, 3 * gates), nn.Linear(3, 3 * gates), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        h, c = inputs.new_zeros(inputs.shape[0], 3), inputs.new_zeros(inputs.shape[0], 3)
        for t in range(inputs.shape[1]):
            x, r = self.x(inputs[:, t]), self.h(h)
            if self.kind == "RNN":
                h = torch.tanh(x + r)
            elif self.kind == "GRU":
                (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), r.chunk(3, -1)
                z = torch.sigmoid(xz + hz)
                h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
            else:
                i, f, g, o = (x + r).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


def check_same_blocks(fused: nn.Module, plain: nn.Module, same: dict[str, tuple[str, slice]], x: Tensor) -> None:
    """Kronecker matrices of two networks with the same numbers; ``same`` maps plain names to fused rows."""
    with torch.no_grad():
        for name, (other, rows) in same.items():
            plain.get_parameter(name).copy_(fused.get_parameter(other)[rows])
    torch.testing.assert_close(fused(x), plain(x))
    y = torch.arange(x.shape[0]) % 2
    expected = oracles.assemble(
        oracles.kron_blocks(plain, x, y, CATEGORICAL.curvature),
        sum(p.numel() for p in plain.parameters()),
    )
    index = oracles.flat_index(fused)
    order = torch.cat([index[other][rows].reshape(-1) for other, rows in same.values()])
    names = [name for name, _ in plain.named_parameters()]
    assert names == list(same), "the mapping has to follow the plain network's order"
    actual = lk.curvature.estimate(fused, "categorical", [(x, y)], "kron").mean().dense()
    close(actual[order[:, None], order[None, :]], expected)


ALL = slice(None)


def test_self_attention_has_the_blocks_of_its_projections() -> None:
    same = {
        "qkv.weight": ("attention.in_proj_weight", ALL),
        "qkv.bias": ("attention.in_proj_bias", ALL),
        "out.weight": ("attention.out_proj.weight", ALL),
        "out.bias": ("attention.out_proj.bias", ALL),
        "head.weight": ("head.weight", ALL),
        "head.bias": ("head.bias", ALL),
    }
    check_same_blocks(build(lambda: FusedAttention(True)), build(lambda: PlainAttention(True)), same, normal(3, 5, 4))


def test_rows_of_a_packed_projection_that_read_other_inputs_are_blocks_of_their_own() -> None:
    same = {
        "q.weight": ("attention.in_proj_weight", slice(0, 4)),
        "q.bias": ("attention.in_proj_bias", slice(0, 4)),
        "kv.weight": ("attention.in_proj_weight", slice(4, 12)),
        "kv.bias": ("attention.in_proj_bias", slice(4, 12)),
        "out.weight": ("attention.out_proj.weight", ALL),
        "out.bias": ("attention.out_proj.bias", ALL),
        "head.weight": ("head.weight", ALL),
        "head.bias": ("head.bias", ALL),
    }
    check_same_blocks(build(lambda: FusedAttention(False)), build(lambda: PlainAttention(False)), same, normal(3, 5, 4))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_weights_are_shared_over_time(kind: str) -> None:
    same = {
        "x.weight": ("rnn.weight_ih_l0", ALL),
        "x.bias": ("rnn.bias_ih_l0", ALL),
        "h.weight": ("rnn.weight_hh_l0", ALL),
        "h.bias": ("rnn.bias_hh_l0", ALL),
        "head.weight": ("head.weight", ALL),
        "head.bias": ("head.bias", ALL),
    }
    fused = build(lambda: Recurrent(kind, batch_first=True))
    check_same_blocks(fused, build(lambda: PlainRecurrent(kind)), same, normal(3, 4, 2))


def test_packed_sequences_go_through_per_example_gradients() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][0][-1])

    model, x, lengths, y = build(Packed), normal(3, 4, 2), torch.tensor([4, 2, 3]), labels(2, 3)
    ggn = oracles.dense_ggn(model, (x, lengths), y, CATEGORICAL.nll)
    estimate = lk.curvature.estimate(model, "categorical", [((x, lengths), y)], "diag")
    close(estimate.mean().diag(), ggn.diagonal())
    close(
        lk.curvature.estimate(model, "categorical", [((x, lengths), y)], "kron").mean().diag()[:-8], ggn.diagonal()[:-8]
    )


# --------------------------------------------------------------------------------------------------- tied weights


def traces(model: nn.Module, batch: Any, structure: str) -> dict[str, float]:
    """Trace of the curvature by parameter name."""
    statistics = lk.curvature.estimate(model, "categorical", [batch], structure)
    diagonal = statistics.mean().diag()
    return {name: float(part.sum()) for name, part in statistics.layout.split(diagonal[None]).items()}


class Untied(Positions):
    """The same network with a copy of the embedding as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 11, bias=False)


def test_a_tied_embedding_has_the_curvature_of_both_uses() -> None:
    """Its Kronecker trace is the sum of the untied net's, so the ratio to the dense trace is that of the untied net."""
    tied, untied = build(Positions), build(Untied)
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.token.weight.detach().clone()})
    batch = (IDS, NEXT)
    one, two = traces(tied, batch, "kron"), traces(untied, batch, "kron")
    assert one["token.weight"] == pytest.approx(two["token.weight"] + two["head.weight"], rel=1e-10)
    for name in one:
        if name != "token.weight":
            assert one[name] == pytest.approx(two[name], rel=1e-10)
    posterior = lk.LaplacePosterior(tied, "categorical").fit([batch])
    assert sum(name == "token.weight" for row in posterior.summary() for name in row.parameters) == 1
    dense = posterior.precision.dense()
    close(dense, (posterior.curvature.dense() * 3 + torch.eye(len(dense), dtype=dense.dtype)))
    close(posterior.precision.solve(dense), torch.eye(len(dense), dtype=dense.dtype), 1e-8)


def test_the_sum_of_two_factor_pairs_is_exact_where_they_commute() -> None:
    """In the shared eigenbases of the marginals nothing is lost."""
    g = torch.linalg.qr(normal(4, 4))[0]
    a = torch.linalg.qr(normal(3, 3, seed=1))[0]
    diag = [torch.diag(torch.rand(n, generator=rng(k), dtype=torch.float64)) for k, n in enumerate((4, 3, 4, 3))]
    terms = [(g @ diag[0] @ g.T, a @ diag[1] @ a.T), (g @ diag[2] @ g.T, a @ diag[3] @ a.T)]
    block = lk.operators.SpectralBlock.of_sum([(p[None], q[None]) for p, q in terms], "tied")
    close(block.dense(), sum(torch.kron(p, q) for p, q in terms))


# ---------------------------------------------------------------------------------------- weight sharing, wide factors


def test_reduce_takes_the_mean_input_and_the_summed_gradient() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = normal(3, 5, 3), labels(2, 3, 5)
    statistics = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", sharing="reduce")
    a, g, positions = statistics.sums["0"]
    inputs, gradients = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for n in range(3):
        mean = torch.cat([x[n].mean(0), torch.ones(1, dtype=torch.float64)])
        inputs += torch.outer(mean, mean)
        hidden = model[0](x[n]).detach().requires_grad_()
        z = model[2](torch.tanh(hidden))
        for t in range(5):
            values, vectors = torch.linalg.eigh(CATEGORICAL.curvature(z[t : t + 1].detach(), y[n, t : t + 1]))
            root = vectors * values.clamp_min(0).sqrt()
            for column in root.T:
                (grad,) = torch.autograd.grad(z[t] @ column, hidden, retain_graph=True)
                gradients += torch.outer(grad.sum(0), grad.sum(0))
    close(a[0], inputs)
    close(g[0], gradients)
    assert float(positions) == 3  # a row per example
    with pytest.raises(lk.errors.UnknownName, match="expand"):
        lk.curvature.estimate(model, "categorical", [(x, y)], "kron", sharing="mean")


def test_factors_wider_than_max_side_keep_their_diagonal() -> None:
    model, x, y = build(lambda: nn.Linear(3, 6)), normal(5, 3), labels(6, 5)
    whole = lk.curvature.estimate(model, "categorical", [(x, y)], "kron")
    narrow = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", max_side=5)
    ((_, factor, *_),) = narrow.sums.values()
    assert factor.shape == (1, 6)
    close(narrow.mean().diag(), whole.mean().diag())
    posterior = lk.LaplacePosterior(model, "categorical", max_side=5).fit([(x, y)])
    dense = posterior.precision.dense()
    close(posterior.precision.solve(dense), torch.eye(len(dense), dtype=dense.dtype), 1e-8)
    draws = posterior.precision.sample(20000, generator=rng(0))
    close(draws.T @ draws / 20000, torch.linalg.inv(dense), 0.05)
