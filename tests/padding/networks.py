"""Networks whose outputs at real positions do not see padding, and their data with and without it.

``Padded.batch(extra)`` appends ``extra`` positions of random content whose targets are ignored (or which a mask hides).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IGNORE = -100
VOCABULARY, CLASSES = 7, 3


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def appended(x: Tensor, more: Tensor) -> Tensor:
    """Positions ``more (N, E, ...)`` appended to ``x (N, T, ...)``."""
    return torch.cat([x, more.to(x.dtype)], 1)


def filled(x: Tensor, extra: int, value: float) -> Tensor:
    """``extra`` positions of one value appended to ``x (N, T, ...)``."""
    return torch.cat([x, x.new_full((x.shape[0], extra, *x.shape[2:]), value)], 1)


@dataclass
class Padded:
    """A model and ``batch(extra)``."""

    model: nn.Module
    batch: Callable[[int], Any]
    forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] | None = None
    likelihood: Any = "categorical"


class Masked(nn.Module):
    """Self-attention with a key mask over embedded tokens; a class per token, or one from the first token."""

    def __init__(self, pooled: bool = False, causal: bool = False, width: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.embed, self.pooled, self.causal = nn.Embedding(VOCABULARY, width), pooled, causal
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.further = nn.ModuleList(nn.MultiheadAttention(width, 1, batch_first=True) for _ in range(depth - 1))
        self.norm, self.mix, self.head = nn.LayerNorm(width), nn.Linear(width, 5), nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        size = tokens.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).triu(1) if self.causal else None
        for layer in (self.attention, *self.further):
            x = x + layer(x, x, x, key_padding_mask=mask == 0, attn_mask=causal, need_weights=False)[0]
        x = torch.relu(self.mix(self.norm(x)))
        return self.head(x[:, 0] if self.pooled else x)


class MaskedConvolutions(nn.Module):
    """Convolutions that set what lies outside a mask to 0, as convolutions' own padding does; a class per pixel."""

    def __init__(self, depth: int = 2, width: int = 4, kernel: int = 3, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        sizes = [2, *[width] * (depth - 1), CLASSES]
        self.layers = nn.ModuleList(
            nn.Conv2d(
                one, two, kernel, padding=dilation * (kernel // 2), dilation=dilation,
                groups=groups if one % groups == 0 and two % groups == 0 else 1,
            )
            for one, two in pairwise(sizes)
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, *others = self.layers
        x = first(x * mask)
        for layer in others:
            x = layer(torch.tanh(x) * mask)
        return x


class Steps(nn.Module):
    """A recurrent network with an output at every step: later steps do not touch earlier ones."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, width: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.rnn, self.head = kind(2, width, layers, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def rows(layers: Callable[[], nn.Module], seed: int = 0, count: int = 12, steps: int = 4) -> Padded:
    """A network that acts on every position alone."""
    torch.manual_seed(seed)
    model = layers().double()
    x, y = (
        torch.randn(count, steps, 3, generator=rng(seed)).double(),
        torch.randint(0, CLASSES, (count, steps), generator=rng(seed)),
    )

    def batch(extra: int) -> Any:
        return appended(x, torch.randn(count, extra, 3, generator=rng(9))), filled(y, extra, IGNORE)

    return Padded(model, batch)


def tokens(model: nn.Module, pooled: bool, seed: int = 0, count: int = 10, steps: int = 5) -> Padded:
    """Masked attention; ``pooled`` has one target an example, so that nothing is ignored but what the mask hides."""
    ids = torch.randint(0, VOCABULARY, (count, steps), generator=rng(seed))
    shape = (count,) if pooled else (count, steps)
    y = torch.randint(0, CLASSES, shape, generator=rng(seed + 1))

    def batch(extra: int) -> Any:
        more = torch.randint(0, VOCABULARY, (count, extra), generator=rng(9))
        mask = filled(torch.ones_like(ids), extra, 0)
        return (appended(ids, more), mask), y if pooled else filled(y, extra, IGNORE)

    return Padded(model.double(), batch)


def pixels(seed: int = 0, count: int = 4, **network: int) -> Padded:
    """Images that are padded on two sides; ``network`` are arguments of :class:`MaskedConvolutions`."""
    torch.manual_seed(seed)
    x = torch.randn(count, 2, 4, 3, generator=rng(seed)).double()
    y = torch.randint(0, CLASSES, (count, 4, 3), generator=rng(seed))
    y[0, 0, 0] = IGNORE

    def batch(extra: int) -> Any:
        whole = torch.randn(count, 2, 4 + extra, 3 + extra, generator=rng(9)).double()
        whole[:, :, :4, :3] = x
        mask = torch.zeros(count, 1, 4 + extra, 3 + extra).double()
        mask[:, :, :4, :3] = 1
        target = torch.full((count, 4 + extra, 3 + extra), IGNORE)
        target[:, :4, :3] = y
        return (whole, mask), target

    return Padded(MaskedConvolutions(**network).double(), batch)


def steps(kind: type[nn.RNNBase] = nn.GRU, seed: int = 0, **network: int) -> Padded:
    torch.manual_seed(seed)
    x = torch.randn(9, 4, 2, generator=rng(seed)).double()
    y = torch.randint(0, CLASSES, (9, 4), generator=rng(seed))

    def batch(extra: int) -> Any:
        return appended(x, torch.randn(9, extra, 2, generator=rng(9))), filled(y, extra, IGNORE)

    return Padded(Steps(kind, **network).double(), batch)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


SMALL: dict[str, Callable[[], Padded]] = {
    "rows": lambda: rows(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, CLASSES))),
    "rows in place": lambda: rows(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES))),
    "attention": lambda: tokens(seeded(Masked), False),
    "causal attention": lambda: tokens(seeded(lambda: Masked(causal=True)), False),
    "first token": lambda: tokens(seeded(lambda: Masked(pooled=True)), True),
    "pixels": pixels,
    "steps": steps,
}


def _large(make: Callable[[], Any], keys: Callable[[Tensor, Tensor], dict[str, Tensor]], target: Any) -> Padded:
    """A model of transformers: mask and labels as its collators pad them."""
    count, length = 4, 5
    ids = torch.randint(1, VOCABULARY, (count, length), generator=rng(0))
    per_token = target != "example"
    y = torch.randint(
        0,
        CLASSES if target != "vocabulary" else VOCABULARY,
        (count, length) if per_token else (count,),
        generator=rng(1),
    )

    def batch(extra: int) -> Any:
        padded = appended(ids, torch.randint(0, VOCABULARY, (count, extra), generator=rng(9)))
        mask = filled(torch.ones_like(ids), extra, 0)
        return {**keys(padded, mask), "targets": filled(y, extra, IGNORE) if per_token else y}

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(**{k: v for k, v in batch.items() if k != "targets"}).logits, batch["targets"]

    return Padded(seeded(make).double().eval(), batch, forward)


SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 6, "max_position_embeddings": 12, "num_labels": CLASSES}


def _mask(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask}


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 4, "n_layer": 2, "n_head": 2, "n_positions": 12}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    )


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    )


def _decoder(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {**_mask(ids, mask), "decoder_input_ids": ids, "decoder_attention_mask": mask}


LARGE: dict[str, Callable[[], Padded]] = {
    "BERT, one class": lambda: _large(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), _mask, "example"
    ),
    "BERT, a class per token": lambda: _large(
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SIZES)), _mask, "token"
    ),
    "GPT-2": lambda: _large(_gpt2, _mask, "vocabulary"),
    "T5": lambda: _large(_t5, _decoder, "vocabulary"),
}
