"""Networks drawn piece by piece, with data and a likelihood: what ``test_random_networks.py`` compares with loops.

A :class:`Plan` is a few words and numbers, so that a failing one can be read, shrunk and pasted. There are four
worlds: ``vectors (N, W)``, ``sequences (N, T, W)``, ``tokens (N, T)`` and ``images (N, C, H, W)``. A step is a
module that keeps its world and its width, so that any order of steps is a network. In-place operations, weights used
twice, weights of one layer in another, products of parameters, bare parameters, branches and masks are steps, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracles
from tests.cases import BERNOULLI, CATEGORICAL, GAUSSIAN, POISSON, Likelihood

WIDTH, POSITIONS, SIDE, VOCABULARY = 4, 3, 4, 5
LIKELIHOODS: dict[str, Likelihood] = {one.name: one for one in (CATEGORICAL, BERNOULLI, GAUSSIAN, POISSON)}


class Step(nn.Module):
    """A function of parameters of its own and of what comes in."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / max(shape[-1], 1) ** 0.5)


def linear(bias: bool = True, inside: int = WIDTH, outside: int = WIDTH) -> nn.Linear:
    return nn.Linear(inside, outside, bias=bias)


def _masked(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x) + 0.1
    y[..., 0].mul_(0.5)
    return y.masked_fill_(y > 0.9, 0.9)


def _recurrent(m: Any, x: Tensor) -> Tensor:
    return m.cell(x)[0]


def _attention(m: Any, x: Tensor) -> Tensor:
    size = x.shape[1]
    mask = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1) if m.causal else None
    return x + m.mix(x, x, x, attn_mask=mask, need_weights=False)[0]


def _heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.all(x).chunk(3, -1)
    weights = (q @ k.mT / WIDTH**0.5).softmax(-1)
    return x + weights @ v


FEATURES: dict[str, Callable[[], nn.Module]] = {  # the last axis is the width, whatever lies before it
    "linear": linear,
    "linear without bias": lambda: linear(False),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu in place": lambda: nn.Sequential(linear(), nn.SiLU(inplace=True)),
    "softplus": nn.Softplus,
    "dropout": lambda: nn.Dropout(0.5),
    "residual": lambda: Step(lambda m, x: x + torch.tanh(m.inner(x)), inner=linear()),
    "in-place residual": lambda: Step(lambda m, x: torch.tanh(m.inner(x).add_(x)), inner=linear()),
    "gate": lambda: Step(lambda m, x: torch.sigmoid(m.a(x)) * m.b(x), a=linear(), b=linear(False)),
    "used twice": lambda: Step(lambda m, x: m.inner(torch.tanh(m.inner(x))), inner=linear()),
    "transposed too": lambda: Step(lambda m, x: F.linear(torch.tanh(m.inner(x)), m.inner.weight.T), inner=linear()),
    "two of one weight": lambda: Step(lambda m, x: m.a(x) + torch.tanh(m.b(x)), **_tied()),
    "scale": lambda: Step(lambda m, x: x * m.scale, scale=bare(WIDTH)),
    "shift": lambda: Step(lambda m, x: x + m.shift, shift=bare(WIDTH)),
    "one number": lambda: Step(lambda m, x: x * torch.exp(m.number), number=nn.Parameter(torch.zeros(()))),
    "bare weight": lambda: Step(lambda m, x: F.linear(x, m.weight), weight=bare(WIDTH, WIDTH)),
    "matmul": lambda: Step(lambda m, x: x @ m.weight, weight=bare(WIDTH, WIDTH)),
    "einsum": lambda: Step(lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), weight=bare(WIDTH, WIDTH)),
    "low rank": lambda: Step(lambda m, x: F.linear(x, m.a @ m.b), a=bare(WIDTH, 2), b=bare(2, WIDTH)),
    "halves": lambda: Step(
        lambda m, x: torch.cat([m.a(x[..., :2]), m.b(x[..., 2:])], -1), a=linear(True, 2, 2), b=linear(False, 2, 2)
    ),
    "masked": lambda: Step(_masked),
    "frozen": lambda: linear().requires_grad_(False),
    "squared weight": lambda: Step(lambda m, x: F.linear(x, m.weight.square()), weight=bare(WIDTH, WIDTH)),
    "prelu": lambda: Step(lambda m, x: F.prelu(x, m.slope), slope=nn.Parameter(torch.tensor([0.2]))),
    "feed forward": lambda: nn.Sequential(linear(True, WIDTH, 6), nn.GELU(), linear(True, 6, WIDTH)),
}
ROWS: dict[str, Callable[[], nn.Module]] = {  # vectors only
    "batch norm": lambda: _seen(nn.BatchNorm1d(WIDTH)),
    "bilinear": lambda: Step(lambda m, x: m.both(x, torch.tanh(x)), both=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
}
MIXERS: dict[str, Callable[[], nn.Module]] = {  # sequences only
    "attention": lambda: Step(_attention, mix=nn.MultiheadAttention(WIDTH, 2, batch_first=True), causal=False),
    "causal attention": lambda: Step(_attention, mix=nn.MultiheadAttention(WIDTH, 1, batch_first=True), causal=True),
    "own attention": lambda: Step(_heads, all=linear(True, WIDTH, 3 * WIDTH)),
    "gru": lambda: Step(_recurrent, cell=nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "lstm": lambda: Step(_recurrent, cell=nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "rnn": lambda: Step(_recurrent, cell=nn.RNN(WIDTH, WIDTH, batch_first=True)),
    "convolution": lambda: Step(lambda m, x: m.conv(x.mT).mT, conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "depthwise": lambda: Step(lambda m, x: m.conv(x.mT).mT, conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "positions": lambda: Step(lambda m, x: x + m.table, table=bare(POSITIONS, WIDTH)),
    "sums so far": lambda: Step(lambda m, x: m.inner(x.cumsum(1)), inner=linear()),
    "over positions": lambda: Step(lambda m, x: m.inner(x.mT).mT, inner=linear(True, POSITIONS, POSITIONS)),
    "reversed": lambda: Step(lambda m, x: x + m.inner(x.flip(1)), inner=linear()),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True, dropout=0.1),
}
PICTURES: dict[str, Callable[[], nn.Module]] = {  # images only
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
    "dilated": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular"),
    "groups": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "transposed conv": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "image batch norm": lambda: _seen(nn.BatchNorm2d(WIDTH)),
    "relu in place": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU(inplace=True)),
    "image residual": lambda: Step(
        lambda m, x: x + m.b(torch.tanh(m.a(x))), a=nn.Conv2d(WIDTH, 2, 1), b=nn.Conv2d(2, WIDTH, 3, padding=1)
    ),
    "conv twice": lambda: Step(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
    "channel scale": lambda: Step(lambda m, x: x * m.scale[:, None, None], scale=bare(WIDTH)),
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
    "image tanh": nn.Tanh,
}
WORLDS = {
    "vectors": {**FEATURES, **ROWS},
    "sequences": {**FEATURES, **MIXERS},
    "tokens": {**FEATURES, **MIXERS},
    "images": PICTURES,
}
HEADS = ("pooled", "each", "two", "tied")


def _tied() -> dict[str, nn.Module]:
    a, b = linear(), linear()
    b.weight = a.weight
    return {"a": a, "b": b}


def _seen(norm: Any) -> nn.Module:
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    return norm


@dataclass(frozen=True)
class Plan:
    """A network and its data: ``Plan(...).made()``."""

    world: str
    steps: tuple[str, ...]
    head: str
    likelihood: str
    outputs: int
    examples: int
    seed: int

    def made(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Model in float64 and eval mode, inputs, targets."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = Network(self).double().eval()
            x = self._inputs()
            with torch.no_grad():
                y = self._targets(model(x))
        return model, x, y

    def _inputs(self) -> Tensor:
        n = self.examples
        if self.world == "tokens":
            return torch.randint(VOCABULARY, (n, POSITIONS))
        shape = {"vectors": (WIDTH,), "sequences": (POSITIONS, WIDTH), "images": (WIDTH, SIDE, SIDE)}[self.world]
        return torch.randn(n, *shape, dtype=torch.float64)

    def _targets(self, z: Tensor) -> Tensor:
        if self.likelihood == "categorical":
            return torch.randint(z.shape[-1], z.shape[:-1])
        if self.likelihood == "gaussian":
            return torch.randn_like(z)
        if self.likelihood == "bernoulli":
            return torch.randint(2, z.shape).to(z)
        return torch.poisson(torch.ones_like(z))


class Network(nn.Module):
    """The steps of a plan, and its head."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.world, self.kind = plan.world, plan.head
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if plan.world == "tokens" else None
        self.body = nn.Sequential(*(WORLDS[plan.world][name]() for name in plan.steps))
        outputs = VOCABULARY if self._tied else plan.outputs
        self.head = nn.Linear(WIDTH, outputs, bias=not self._tied)
        self.other = nn.Linear(WIDTH, outputs) if plan.head == "two" else None
        if self._tied:
            self.head.weight = self.embed.weight  # type: ignore[union-attr]

    @property
    def _tied(self) -> bool:
        return self.kind == "tied" and self.world == "tokens"

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x if self.embed is None else self.embed(x))
        if self.world == "images":
            h = h.mean((2, 3))
        elif h.dim() == 3 and self.kind in ("pooled", "two"):
            h = h.mean(1)
        h = 0.5 * torch.tanh(h)
        z = self.head(h)
        return z if self.other is None else torch.cat([z, self.other(h.square())], -1)


@st.composite
def plans(draw: Any) -> Plan:
    """Plans; hypothesis makes a failing one smaller."""
    world = draw(st.sampled_from(sorted(WORLDS)))
    return Plan(
        world,
        tuple(draw(st.lists(st.sampled_from(sorted(WORLDS[world])), min_size=1, max_size=4))),
        draw(st.sampled_from(HEADS)),
        draw(st.sampled_from(sorted(LIKELIHOODS))),
        draw(st.sampled_from([2, 4])),  # never as many as positions: which axis is which would have to be said
        draw(st.integers(1, 4)),
        draw(st.integers(0, 2**16)),
    )


def dense(plan: Plan, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobian ``(N, C, P)`` and mean Gauss-Newton matrix ``(P, P)``, one example and one output at a time."""
    jacobian = oracles.jacobian(model, x, len(y))
    curvature = LIKELIHOODS[plan.likelihood].curvature
    terms = [
        j.T @ curvature(z, y[i : i + 1]) @ j
        for i, (j, z) in enumerate(zip(jacobian, oracles.outputs(model, x, len(y)), strict=True))
    ]
    return jacobian, torch.stack(terms).mean(0)
