"""Tensors made of parameters alone that every example shares: exact, and by the cheap path.

Each block is checked against dense per-example Jacobians, and for *which path ran*: nothing here may need the network
to be run once more for every example, and what does need it must be vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.tape.examples import ExampleGradients
from tests import oracles

N, T, D = 5, 4, 6


class PositionBias(nn.Module):
    """Attention with a bias looked up by relative position: T5 (per head) and Swin (a table indexed by a buffer)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.head = kind, nn.Linear(D, 3 * D, bias=False), nn.Linear(D, 3)
        where = torch.arange(T)
        self.register_buffer("index", where[:, None] - where[None] + T - 1)
        if kind == "embedding":
            self.bias = nn.Embedding(2 * T - 1, 2)
        elif kind == "network":  # Swin V2: continuous positions through two linear layers
            self.bias = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
        else:
            self.table = nn.Parameter(torch.randn(2 * T - 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "embedding":
            bias = self.bias(self.index).permute(2, 0, 1)[None]
        elif self.kind == "network":
            places = torch.arange(2 * T - 1, dtype=x.dtype)[:, None] / T
            bias = 2 * torch.sigmoid(self.bias(places)[self.index].permute(2, 0, 1))[None]
        else:
            bias = self.table[self.index.view(-1)].view(T, T, 2).permute(2, 0, 1).contiguous()[None]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.transpose(-1, -2)
            scores += bias
            mixed = scores.softmax(-1) @ v
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class LayerScale(nn.Module):
    """``gamma`` on the channels of images (ConvNeXt), by one of several spellings."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.gamma = how, nn.Parameter(torch.rand(4))
        self.stem, self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.how(self.gamma, self.conv(x))).tanh().mean((2, 3)))


class Tokens(nn.Module):
    """A class token, positional parameters and learned queries (ViT, DETR, perceivers)."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, T + 1, D))
        self.query, self.mix, self.head = nn.Parameter(torch.randn(2, D)), nn.Linear(D, D), nn.Linear(2 * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        x = self.mix(x).tanh()
        weights = (self.query.expand(len(x), -1, -1) @ x.transpose(1, 2)).softmax(-1)
        return self.head((weights @ x).flatten(1))


class Numerical(nn.Module):
    """One weight per feature (FT-Transformer's tokens) and periodic embeddings with a linear map per feature."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.bias = kind, nn.Parameter(torch.randn(T, D)), nn.Parameter(torch.randn(T, D))
        self.frequency, self.maps = nn.Parameter(torch.randn(T, 3)), nn.Parameter(torch.randn(T, 6, D))
        self.head = nn.Linear(D, 3)
        for name in ("frequency", "maps") if kind == "tokens" else ("weight",):
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tokens":
            x = x[..., None] * self.weight + self.bias[None]
        else:
            x = 2 * torch.pi * self.frequency * x[..., None]
            x = torch.cat([x.cos(), x.sin()], -1)
            if self.kind == "einsum":
                x = torch.einsum("nti,tio->nto", x, self.maps)
            elif self.kind == "bmm":
                x = torch.bmm(x.transpose(0, 1), self.maps).transpose(0, 1)
            else:
                x = (x[..., None, :] @ self.maps).squeeze(-2)
            x = x + self.bias
        return self.head(x.tanh().mean(1))


class Gate(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.w, self.head = function, nn.Parameter(torch.rand(shape) + 0.5), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x, self.w).sin())


class Projections(nn.Module):
    """Queries, keys and values in one weight; the bias is joined from two parameters and a buffer, or one of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.w, self.head = kind, nn.Parameter(torch.randn(3 * D, D) / 2), nn.Linear(D, 3)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.register_buffer("k_bias", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        weight = self.w / self.w.norm(dim=1, keepdim=True) if self.kind == "weight, too" else self.w
        q, k, v = (
            F.linear(input=x, weight=weight, bias=bias) if self.kind == "named" else F.linear(x, weight, bias)
        ).chunk(3, -1)
        x = v if x.dim() == 2 else (q @ k.mT).softmax(-1) @ v
        return self.head(x.tanh() if x.dim() == 2 else x.mean(1) + q.sin()[:, 0])


SEQUENCES, IMAGES, ROWS, TABLE = (N, T, D), (N, 2, 3, 3), (N, D), (N, T)
SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"bias {k}": (lambda k=k: PositionBias(k), SEQUENCES) for k in ("embedding", "network", "table", "fused")},
    "scale view": (lambda: LayerScale(lambda g, x: g.view(-1, 1, 1) * x), IMAGES),
    "scale reshape": (lambda: LayerScale(lambda g, x: x.mul(g.reshape(1, -1, 1, 1))), IMAGES),
    "scale index": (lambda: LayerScale(lambda g, x: x * g[None, :, None, None]), IMAGES),
    "scale in place": (lambda: LayerScale(lambda g, x: x.mul_(g[:, None, None])), IMAGES),
    "tokens": (Tokens, SEQUENCES),
    **{f"numerical {k}": (lambda k=k: Numerical(k), TABLE) for k in ("tokens", "einsum", "bmm", "matmul")},
    "einsum gate": (lambda: Gate(lambda x, w: torch.einsum("nd,d->nd", x, w), D), ROWS),
    "einsum without a result": (lambda: Gate(lambda x, w: torch.einsum("bi,ij", x, w), D, D), ROWS),
    "matrix from the right": (lambda: Gate(lambda x, w: w.sin().__rmatmul__(x), D, D), ROWS),
    "einsum matrix": (lambda: Gate(lambda x, w: torch.einsum("...d,de->...e", x, w), D, D), ROWS),
    "scalar gate": (lambda: Gate(lambda x, w: x * torch.sigmoid(w)), ROWS),
    "power": (lambda: Gate(lambda x, w: x.abs().clamp_min(1e-3) ** w, D), ROWS),
    "weight norm": (lambda: Gate(lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)), D, D), ROWS),
    **{f"joined bias {k}".strip(): (lambda k=k: Projections(k), SEQUENCES) for k in ("", "named", "weight, too")},
    "joined bias on rows": (lambda: Projections("rows"), ROWS),
    "matrix of parameters": (lambda: Gate(lambda x, w: x @ torch.linalg.inv(w + 3 * torch.eye(D)), D, D), ROWS),
}


def inputs(shape: tuple[int, ...], seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.arange(shape[0]) % 3


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        return build().double().eval()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often per-example gradients were asked for, and by which path they came."""
    counts = {"asked": 0, "looped": 0, "vectorised": 0}

    def counted(name: str, key: str) -> None:
        original = getattr(ExampleGradients, name)

        def wrapper(self: ExampleGradients, *args: Any) -> Any:
            counts[key] += 1
            return original(self, *args)

        monkeypatch.setattr(ExampleGradients, name, wrapper)

    for name, key in (("__call__", "asked"), ("_one_by_one", "looped"), ("_vectorised", "vectorised")):
        counted(name, key)
    return counts


@pytest.mark.share(2)
@pytest.mark.parametrize("name", SHARED)
def test_shared_tensors_are_exact_without_running_single_examples(name: str, runs: dict[str, int]) -> None:
    build, shape = SHARED[name]
    model, (x, y) = make(build), inputs(shape)
    expected = oracles.diag_ggn(model, x, y, oracles.categorical_nll)
    for split in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])], [(x[:4], y[:4]), (x[4:], y[4:])]):
        found = lk.curvature.estimate(model, "categorical", split, structure="diag").mean().diag()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert runs["asked"] == 0, "the network was run again for single examples"


@pytest.mark.parametrize(
    "name", ["bias embedding", "bias network", "scale view", "numerical einsum", "weight norm", "joined bias"]
)
@pytest.mark.parametrize("structure", ["kron", "ekfac", "full"])
def test_structures_agree_with_the_dense_blocks(name: str, structure: str, runs: dict[str, int]) -> None:
    build, shape = SHARED[name]
    model, (x, y) = make(build), inputs(shape)
    dense = oracles.dense_ggn(model, x, y, oracles.categorical_nll)
    found = lk.curvature.estimate(model, "categorical", (x, y), structure=structure).mean().dense()
    if structure == "full":
        torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-12)
    index = oracles.flat_index(model)
    shared = [n for n in index if n.split(".")[0] in ("bias", "table", "gamma", "frequency", "maps", "w")]
    shared = [n for n in index if n in ("q_bias", "v_bias")] or shared
    for parameter in shared:  # no Kronecker pair describes these: their own diagonal is exact
        own = index[parameter]
        torch.testing.assert_close(found.diag()[own], dense.diag()[own], rtol=1e-9, atol=1e-12)
    assert runs["asked"] == 0


def test_what_has_no_rule_is_vectorised_not_looped(runs: dict[str, int]) -> None:
    model = make(lambda: Gate(lambda x, w: torch.tensordot(x, w * w, 1), D, D))
    x, y = inputs(ROWS)
    found = (
        lk.curvature.estimate(model, "categorical", [(x[:3], y[:3]), (x[3:], y[3:])], structure="diag").mean().diag()
    )
    expected = oracles.diag_ggn(model, x, y, oracles.categorical_nll)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert runs == {"asked": runs["asked"], "looped": 0, "vectorised": runs["asked"]}
    assert runs["asked"] >= 2


def test_what_cannot_be_vectorised_is_looped_and_exact(runs: dict[str, int]) -> None:
    def branch(x: Tensor, w: Tensor) -> Tensor:
        mixed = torch.tensordot(x, w * w, 1)
        return mixed if float(mixed.detach().sum()) > -1e9 else x

    model, (x, y) = make(lambda: Gate(branch, D, D)), inputs(ROWS)
    found = lk.curvature.estimate(model, "categorical", (x, y), structure="diag").mean().diag()
    expected = oracles.diag_ggn(model, x, y, oracles.categorical_nll)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert runs["looped"] == runs["asked"] > 0


class Whole(nn.Module):
    """A tensor made of parameters that meets data of one example only in some places, or data written into it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.w, self.head = how, nn.Parameter(torch.rand(D, D) + 0.5), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "written":  # data go into a tensor that was made of parameters
            own = self.w.tanh().repeat(len(x), 1, 1)
            own[:, 0] = x
            return self.head(own.sum(1).sin())
        if self.how == "both":  # read by a layer of its own and through a function of it
            return self.head((F.linear(x, self.w) + x * self.w.diagonal()).sin())
        if self.how == "twice":  # one tensor meets data at two places
            scale = self.w.exp().mean(0)
            return self.head(((x * scale).sin() * scale).cos())
        buffer = torch.zeros(len(x), D, dtype=x.dtype)  # a state of zeros through a layer has a row for every example
        return self.head(torch.tanh(F.linear(buffer, self.w, self.w[0]) + x))


@pytest.mark.parametrize("how", ["written", "both", "twice", "state"])
def test_neighbours_that_only_look_shared(how: str) -> None:
    model, (x, y) = make(lambda: Whole(how)), inputs(ROWS)
    dense = oracles.dense_ggn(model, x, y, oracles.categorical_nll)
    for split in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        for structure in ("full", "diag"):
            found = lk.curvature.estimate(model, "categorical", split, structure=structure).mean()
            torch.testing.assert_close(found.diag(), dense.diag(), rtol=1e-9, atol=1e-12)
            if structure == "full":
                torch.testing.assert_close(found.dense(), dense, rtol=1e-9, atol=1e-12)


def test_products_that_torch_refuses_are_refused_in_its_words() -> None:
    model, (x, y) = make(lambda: Gate(lambda x, w: x @ w)), inputs(ROWS)
    with pytest.raises(RuntimeError, match="at least 1D"):
        model(x)
    with pytest.raises(lk.errors.ShapeMismatch, match="at least 1D"):
        lk.curvature.estimate(model, "categorical", (x, y), structure="diag")
