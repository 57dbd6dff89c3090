"""Named problems that feed the contract tests: a tiny float64 model, data, a likelihood, and what to expect.

``CASES`` is a list of :class:`Case`; ``case.make()`` builds a fresh :class:`Problem` each time (tests may ruin it) and
:func:`truth` keeps the dense references of a case, computed once. Nothing of ``laplace_kf`` is imported: a likelihood
is named, and ``problem.likelihood.build(lk)`` makes the object from the imported package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracles
from tests.oracles import Block, Nll, OutputMatrix

# ------------------------------------------------------------------------------------------------ likelihoods


@dataclass(frozen=True)
class Likelihood:
    """A likelihood by name, with references of its own.

    ``curvature`` is the positive semi-definite output curvature the package should use, ``fisher`` the expectation of
    the score's outer product under the model (what sampled targets estimate).
    """

    name: str
    build: Callable[[Any], Any]
    nll: Nll
    curvature: OutputMatrix
    fisher: OutputMatrix


def _natural(name: str, nll: Nll, build: Callable[[Any], Any] | None = None) -> Likelihood:
    hessian = oracles.output_hessian(nll)
    return Likelihood(name, build or (lambda lk: name), nll, hessian, hessian)


CATEGORICAL = _natural("categorical", oracles.categorical_nll)
BERNOULLI = _natural("bernoulli", oracles.bernoulli_nll)
GAUSSIAN = _natural("gaussian", oracles.gaussian_nll(1.0))
POISSON = _natural("poisson", oracles.poisson_nll)
HETEROSCEDASTIC = Likelihood(
    "heteroscedastic",
    lambda lk: lk.likelihoods.HeteroscedasticGaussian(),
    oracles.heteroscedastic_nll,
    oracles.heteroscedastic_fisher,
    oracles.heteroscedastic_fisher,
)


def gaussian(scale: float) -> Likelihood:
    """Gaussian with a known noise scale."""
    return _natural(f"gaussian({scale})", oracles.gaussian_nll(scale), lambda lk: lk.likelihoods.Gaussian(scale=scale))


def mixture(mode: str) -> Likelihood:
    """The two-classifier mixture with one of its curvature readings."""
    return Likelihood(
        f"mixture({mode})",
        lambda lk: lk.likelihoods.BernoulliMixture(curvature=mode),
        oracles.mixture_nll,
        oracles.mixture_curvature(mode),
        oracles.mixture_fisher,
    )


# ------------------------------------------------------------------------------------------------ problems


@dataclass
class Problem:
    """One model with data.

    ``x`` is what the model takes (tensor, tuple of positional inputs or dict of keyword inputs), ``y`` the targets.
    ``kron`` says what a Kronecker posterior owes: ``"blocks"`` - the oracle's factors for Linear, convolutions and
    Embedding and the exact diagonal of the rest; ``"single"`` - the contract leaves open whether a parameter gets
    factors or its diagonal, but both have the exact diagonal when there is one example; ``"open"`` - nothing beyond
    shape, symmetry and sign.
    """

    model: nn.Module
    x: Any
    y: Tensor
    likelihood: Likelihood
    kron: str = "blocks"
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = oracles.all_names(self.model)

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.y.shape[0]

    @property
    def size(self) -> int:
        """Number of selected parameters P."""
        return sum(p.numel() for name, p in self.model.named_parameters() if name in self.names)

    def batch(self, index: Any = slice(None)) -> Any:
        """One batch of the form that ``fit`` accepts."""
        x, y = oracles.take(self.x, index), self.y[index]
        if isinstance(x, dict):
            return {**x, "labels": y}
        return (x, y)

    def batches(self, sizes: Sequence[int]) -> list[Any]:
        """Consecutive minibatches of the given sizes."""
        out, start = [], 0
        for size in sizes:
            out.append(self.batch(slice(start, start + size)))
            start += size
        return out

    def uneven(self) -> list[Any]:
        """The data as two minibatches of different size (the last of one example)."""
        return self.batches([self.n - 1, 1])

    def at(self, index: Any) -> Problem:
        """The same problem with some of the examples."""
        return Problem(self.model, oracles.take(self.x, index), self.y[index], self.likelihood, self.kron)


@dataclass(frozen=True)
class Case:
    """A named thunk."""

    name: str
    make: Callable[[], Problem]
    tags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


class Truth:
    """Dense references of one case, each computed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def _args(self) -> tuple[Any, ...]:
        p = self.problem
        return p.model, p.x, p.y, p.likelihood.nll, p.names

    @functools.cached_property
    def passes(self) -> oracles.Passes:
        """Jacobian and outputs of every example by itself."""
        p = self.problem
        return oracles.passes(p.model, p.x, p.n, p.names)

    @functools.cached_property
    def ggn(self) -> Tensor:
        """(P, P)."""
        return oracles.dense_ggn(*self._args(), curvature=self.problem.likelihood.curvature, seen=self.passes)

    @functools.cached_property
    def fisher(self) -> Tensor:
        """(P, P), expectation over targets drawn from the model."""
        return oracles.dense_ggn(*self._args(), curvature=self.problem.likelihood.fisher, seen=self.passes)

    @functools.cached_property
    def empirical(self) -> Tensor:
        """(P, P)."""
        return oracles.empirical_fisher(*self._args())

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """(N, C', P), outputs of an example flattened."""
        return self.passes[0]

    @functools.cached_property
    def outputs(self) -> Tensor:
        """Of all examples, each run by itself."""
        return torch.cat(self.passes[1])

    def blocks(self, curvature: OutputMatrix | None = None) -> list[Block]:
        """Kronecker factors and diagonals."""
        p = self.problem
        return oracles.kron_blocks(p.model, p.x, p.y, curvature or p.likelihood.curvature, p.names, self.passes)

    @functools.cached_property
    def kron_blocks(self) -> list[Block]:
        """The blocks under the likelihood's own curvature."""
        return self.blocks()

    @functools.cached_property
    def kron(self) -> Tensor:
        """(P, P)."""
        return oracles.assemble(self.kron_blocks, self.problem.size)

    def structured(self, structure: str) -> Tensor:
        """The mean curvature of a structure, dense."""
        if structure == "full":
            return self.ggn
        if structure == "diag":
            return torch.diag(self.ggn.diagonal())
        if structure == "ekfac":
            return self.corrected
        if structure == "layer":
            return oracles.layer_blocks(self.ggn, oracles.flat_index(self.problem.model, self.problem.names))
        if structure == "lowrank":
            return oracles.low_rank_plus_diagonal(self.ggn, min(20, self.problem.size))
        return self.kron

    @functools.cached_property
    def corrected(self) -> Tensor:
        """(P, P), eigenvalue-corrected."""
        p = self.problem
        return oracles.eigenvalue_corrected(
            p.model, p.x, p.y, p.likelihood.curvature, self.kron_blocks, p.names, self.passes
        )

    def precision(self, structure: str, n: float, prior: Tensor, damping: str = "exact") -> Tensor:
        """Λ of a structure, dense; ``prior (P,)``."""
        if structure == "kron":
            return oracles.kron_precision(self.kron_blocks, n, prior, damping)
        return oracles.dense_precision(self.structured(structure), n, prior)

    @functools.cached_property
    def theta(self) -> Tensor:
        """(P,) selected parameters."""
        return oracles.flat_parameters(self.problem.model, self.problem.names)

    @functools.cached_property
    def log_likelihood(self) -> float:
        """Sum over examples."""
        p = self.problem
        return oracles.log_likelihood(p.model, p.x, p.y, p.likelihood.nll)


@functools.cache
def truth(case: Case) -> Truth:
    """References of a case (shared between tests: do not modify)."""
    return Truth(case.make())


# ------------------------------------------------------------------------------------------------ building blocks


class Experts(nn.Module):
    """Uses one of two layers, depending on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 3, dtype=torch.float64), nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if bool(x.sum() > 0) else self.two(x)


def rng(seed: int = 0) -> torch.Generator:
    """A private generator."""
    return torch.Generator().manual_seed(seed)


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in eval mode with seeded weights and non-trivial norm parameters and running statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234 + seed)
        model = make().double()
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 data."""
    return torch.randn(*shape, generator=rng(77 + seed), dtype=torch.float64)


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    """Integer targets."""
    return torch.randint(classes, shape, generator=rng(99 + seed))


def binary(*shape: int, seed: int = 0) -> Tensor:
    """0/1 targets in float64."""
    return labels(2, *shape, seed=seed).double()


def counts(*shape: int, seed: int = 0) -> Tensor:
    """Non-negative integer targets in float64."""
    return labels(4, *shape, seed=seed).double()


class Lambda(nn.Module):
    """A module from a function of its named children."""

    def __init__(self, fn: Callable[..., Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.fn(self, *args, **kwargs)


class Scale(nn.Module):
    """Elementwise scale and shift of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(size))
        self.shift = nn.Parameter(0.3 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class RawMatmul(nn.Module):
    """A weight used through ``x @ w``."""

    def __init__(self, inputs: int, outs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class RawLinear(nn.Module):
    """A weight and a bias used through ``F.linear`` in a module that is no ``nn.Linear``."""

    def __init__(self, inputs: int, outs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outs, inputs) / inputs**0.5)
        self.offset = nn.Parameter(torch.randn(outs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel, self.offset)


class TupleNet(nn.Module):
    """Two positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(first) * self.right(second)))


class DictNet(nn.Module):
    """Keyword inputs, as of a tokenised text batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(self.head.weight.dtype)
        pooled = (torch.tanh(self.embed(input_ids)) * weight).sum(1) / weight.sum(1)
        return self.head(pooled)


class GRUNet(nn.Module):
    """A fused recurrent call in front of a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)
        return self.head(hidden[:, -1])


class AttentionNet(nn.Module):
    """Self-attention: packed projection and ``out_proj`` used without a module call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(mixed.mean(1))


class TiedDecoder(nn.Module):
    """The embedding matrix is the output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.mix = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 4, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.mix(self.embed(tokens))))


class TiedLinear(nn.Module):
    """Two Linear modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp(inputs: int, hidden: int, outs: int, act: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Module:
    """Linear - activation - Linear."""
    return nn.Sequential(nn.Linear(inputs, hidden, bias=bias), act(), nn.Linear(hidden, outs, bias=bias))


def _sequence_targets(classes: int, n: int, t: int) -> Tensor:
    y = labels(classes, n, t, seed=5)
    y[0, -1] = oracles.IGNORE
    y[-1, 0] = oracles.IGNORE
    return y


def _freeze(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def _inplace_functional() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x), inplace=True)
        h = m.b(h)
        h *= 1.5
        h.tanh_()
        return m.c(h)

    return Lambda(forward, a=nn.Linear(2, 4), b=nn.Linear(4, 3), c=nn.Linear(3, 2))


def _inplace_residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h += torch.tanh(m.b(torch.tanh(h)))
        return m.c(h)

    return Lambda(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))


def _flatten_positions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, c = x.shape
        h = torch.tanh(m.a(x.reshape(n * t, c))).reshape(n, t, -1)
        return m.b(h.mean(1))

    return Lambda(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 2))


def _sequence_first() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x.transpose(0, 1)))  # (T, N, C)
        return m.b(torch.tanh(h).sum(0))

    return Lambda(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 2))


def _reused() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(torch.tanh(m.a(x)))))

    return Lambda(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2))


def _unrolled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.stack([torch.tanh(m.a(x[:, t])) for t in range(x.shape[1])]).mean(0))

    return Lambda(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 2))


def _residual() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.c(h + torch.tanh(m.b(h)))

    return Lambda(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 2))


def _bilinear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x, x)))

    return Lambda(forward, a=nn.Bilinear(2, 2, 3), b=nn.Linear(3, 2))


def _pooled(conv: nn.Module, channels: int, outs: int) -> nn.Module:
    """Convolution - tanh - mean over positions - Linear."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.conv(x)).flatten(2).mean(2))

    return Lambda(forward, conv=conv, head=nn.Linear(channels, outs))


def _small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )


def _attention_layer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layer(x).mean(1))

    layer = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.1, batch_first=True)
    return Lambda(forward, layer=layer, head=nn.Linear(2, 2))


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.Tanh(), nn.Linear(3, 2))


def _token_batch(seed: int = 0) -> dict[str, Tensor]:
    ids = labels(5, 4, 3, seed=seed)
    ids[0, 1] = ids[0, 0]  # a token twice in one example
    mask = torch.ones(4, 3, dtype=torch.long)
    mask[1, 2] = mask[3, 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _tokens(vocabulary: int, n: int, t: int, seed: int = 0) -> Tensor:
    ids = labels(vocabulary, n, t, seed=seed)
    ids[0, 1] = ids[0, 0]
    return ids


CASES: list[Case] = []


def _case(
    name: str,
    make: Callable[[], nn.Module],
    data: Callable[[], tuple[Any, Tensor]],
    likelihood: Likelihood,
    kron: str = "blocks",
    tags: Sequence[str] = (),
    seed: int = 0,
) -> None:
    CASES.append(Case(name, lambda: Problem(build(make, seed), *data(), likelihood, kron), frozenset(tags)))


# --- likelihoods and dense nets
_case(
    "linear-gaussian",
    lambda: nn.Linear(3, 2),
    lambda: (normal(5, 3), normal(5, 2, seed=1)),
    gaussian(0.7),
    tags=["core"],
)
_case(
    "linear-net-categorical",
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
    lambda: (normal(5, 3), labels(3, 5)),
    CATEGORICAL,
    tags=["chain", "linear"],
)
_case(
    "linear-net-gaussian",
    lambda: nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3), nn.Linear(3, 2)),
    lambda: (normal(5, 3), normal(5, 2, seed=1)),
    gaussian(1.3),
    tags=["chain", "linear"],
)
_case(
    "tanh-mlp-categorical",
    lambda: mlp(3, 4, 3),
    lambda: (normal(5, 3), labels(3, 5)),
    CATEGORICAL,
    tags=["core", "chain", "hessian"],
)
_case(
    "relu-mlp-bernoulli",
    lambda: mlp(3, 4, 2, nn.ReLU),
    lambda: (normal(5, 3), binary(5, 2)),
    BERNOULLI,
    tags=["chain", "hessian"],
)
_case(
    "deep-tanh-mlp-gaussian",
    lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)),
    lambda: (normal(5, 2), normal(5, 2, seed=1)),
    gaussian(0.7),
    tags=["core", "chain", "hessian"],
)
_case(
    "gaussian-unit-scale", lambda: mlp(2, 3, 1), lambda: (normal(4, 2), normal(4, 1, seed=1)), GAUSSIAN, tags=["chain"]
)
_case(
    "tanh-mlp-poisson", lambda: mlp(2, 3, 2), lambda: (normal(5, 2), counts(5, 2)), POISSON, tags=["chain", "hessian"]
)
_case(
    "tanh-mlp-heteroscedastic",
    lambda: mlp(2, 3, 2),
    lambda: (normal(5, 2), normal(5, 1, seed=1)),
    HETEROSCEDASTIC,
    tags=["hessian"],
)
for _mode in ("clip", "abs", "fisher", "em"):
    _case(
        f"tanh-mlp-mixture-{_mode}",
        lambda: mlp(2, 3, 3),
        lambda: (normal(6, 2), binary(6, 1)),
        mixture(_mode),
        tags=["hessian"] if _mode == "clip" else [],
    )
_case("one-example", lambda: mlp(3, 3, 3), lambda: (normal(1, 3), labels(3, 1)), CATEGORICAL, tags=["chain"])
_case(
    "no-bias-mlp",
    lambda: mlp(3, 4, 2, bias=False),
    lambda: (normal(4, 3), labels(2, 4)),
    CATEGORICAL,
    tags=["chain", "core"],
)
_case(
    "inplace-relu-module",
    lambda: nn.Sequential(
        nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)
    ),
    lambda: (normal(5, 2), labels(2, 5)),
    CATEGORICAL,
    tags=["chain"],
)
_case("inplace-functional", _inplace_functional, lambda: (normal(5, 2), normal(5, 2, seed=1)), gaussian(0.5))
_case("inplace-residual-add", _inplace_residual, lambda: (normal(5, 2), labels(2, 5)), CATEGORICAL)
_case("residual", _residual, lambda: (normal(5, 2), labels(2, 5)), CATEGORICAL, tags=["hessian"])
_case(
    "dropout-off",
    lambda: nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)),
    lambda: (normal(4, 2), labels(2, 4)),
    CATEGORICAL,
)

# --- positions that share a weight
_case(
    "sequence-linear-pooled",
    lambda: Lambda(lambda m, x: m.b(torch.tanh(m.a(x)).mean(1)), a=nn.Linear(2, 3), b=nn.Linear(3, 2)),
    lambda: (normal(4, 3, 2), labels(2, 4)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "sequence-outputs-ignored",
    lambda: mlp(2, 3, 3),
    lambda: (normal(4, 2, 2), _sequence_targets(3, 4, 2)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "sequence-outputs-gaussian", lambda: mlp(2, 3, 2), lambda: (normal(3, 3, 2), normal(3, 3, 2, seed=1)), gaussian(0.6)
)
_case("flattened-positions", _flatten_positions, lambda: (normal(4, 3, 2), labels(2, 4)), CATEGORICAL)
_case("sequence-first-inside", _sequence_first, lambda: (normal(4, 3, 2), labels(2, 4)), CATEGORICAL)
_case("reused-module", _reused, lambda: (normal(4, 3), labels(2, 4)), CATEGORICAL, tags=["reused"])
_case("unrolled-loop", _unrolled, lambda: (normal(4, 3, 2), labels(2, 4)), CATEGORICAL, tags=["reused"])
_case("tied-linear", TiedLinear, lambda: (normal(4, 3), labels(2, 4)), CATEGORICAL, tags=["reused"])
_case(
    "tied-embedding-decoder",
    TiedDecoder,
    lambda: (_tokens(4, 3, 2), _sequence_targets(4, 3, 2)),
    CATEGORICAL,
    "open",
    tags=["reused"],
)

# --- convolutions
_case(
    "conv1d-stride-dilation",
    lambda: _pooled(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), 3, 2),
    lambda: (normal(3, 2, 7), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv2d",
    lambda: _pooled(nn.Conv2d(2, 3, (2, 3), padding=(1, 0)), 3, 2),
    lambda: (normal(3, 2, 3, 4), labels(2, 3)),
    CATEGORICAL,
    tags=["core", "hessian"],
)
_case(
    "conv2d-stride-rectangular",
    lambda: _pooled(nn.Conv2d(1, 2, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 1)), 2, 2),
    lambda: (normal(3, 1, 4, 4), labels(2, 3)),
    CATEGORICAL,
)
for _padding in ("reflect", "replicate", "circular"):
    _case(
        f"conv2d-{_padding}",
        lambda mode=_padding: _pooled(nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode=mode), 2, 2),
        lambda: (normal(3, 1, 3, 4), labels(2, 3)),
        CATEGORICAL,
    )
_case(
    "conv1d-circular",
    lambda: _pooled(nn.Conv1d(1, 2, 3, padding=2, padding_mode="circular"), 2, 2),
    lambda: (normal(3, 1, 5), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv2d-same-even-kernel",
    lambda: _pooled(nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(1, 2)), 2, 2),
    lambda: (normal(3, 1, 3, 4), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv1d-same-reflect",
    lambda: _pooled(nn.Conv1d(1, 2, 4, padding="same", padding_mode="reflect"), 2, 2),
    lambda: (normal(3, 1, 6), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv2d-groups",
    lambda: _pooled(nn.Conv2d(4, 4, 2, groups=2), 4, 2),
    lambda: (normal(3, 4, 3, 3), labels(2, 3)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "conv2d-depthwise",
    lambda: _pooled(nn.Conv2d(2, 4, 2, groups=2, padding=1), 4, 2),
    lambda: (normal(3, 2, 3, 3), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv2d-no-bias",
    lambda: _pooled(nn.Conv2d(2, 2, 2, bias=False), 2, 2),
    lambda: (normal(3, 2, 3, 3), normal(3, 2, seed=1)),
    gaussian(0.8),
)
_case(
    "conv3d",
    lambda: _pooled(nn.Conv3d(1, 2, 2, padding=(1, 0, 0)), 2, 2),
    lambda: (normal(3, 1, 2, 3, 2), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv-transpose1d",
    lambda: _pooled(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 3, 2),
    lambda: (normal(3, 2, 4), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv-transpose1d-dilation",
    lambda: _pooled(nn.ConvTranspose1d(2, 2, 2, dilation=2), 2, 2),
    lambda: (normal(3, 2, 3), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "conv-transpose2d-groups",
    lambda: _pooled(nn.ConvTranspose2d(4, 4, (2, 3), stride=(2, 1), padding=(0, 1), groups=2), 4, 2),
    lambda: (normal(3, 4, 2, 3), labels(2, 3)),
    CATEGORICAL,
)
_case("small-cnn", _small_cnn, lambda: (normal(4, 1, 4, 4), labels(3, 4)), CATEGORICAL)
_case(
    "pixel-outputs",
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)),
    lambda: (normal(3, 1, 2, 3), _sequence_targets(3, 3, 6).view(3, 2, 3)),
    CATEGORICAL,
)
_case(
    "pixel-outputs-gaussian",
    lambda: nn.Conv2d(1, 2, 2),
    lambda: (normal(3, 1, 3, 3), normal(3, 2, 2, 2, seed=1)),
    gaussian(0.9),
)

# --- embeddings
_case(
    "embedding",
    lambda: Lambda(lambda m, x: m.head(torch.tanh(m.embed(x)).mean(1)), embed=nn.Embedding(5, 3), head=nn.Linear(3, 2)),
    lambda: (_tokens(5, 4, 3), labels(2, 4)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "embedding-padding",
    lambda: Lambda(
        lambda m, x: m.head(torch.tanh(m.embed(x)).mean(1)),
        embed=nn.Embedding(4, 3, padding_idx=1),
        head=nn.Linear(3, 2),
    ),
    lambda: (_tokens(4, 4, 3, seed=2), labels(2, 4)),
    CATEGORICAL,
)

# --- normalisation
_case(
    "batchnorm1d",
    lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)),
    lambda: (normal(4, 2), labels(2, 4)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "batchnorm2d",
    lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2)
    ),
    lambda: (normal(4, 1, 3, 3), labels(2, 4)),
    CATEGORICAL,
)
_case(
    "layernorm",
    lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)),
    lambda: (normal(4, 2), labels(2, 4)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "layernorm-sequence",
    lambda: Lambda(
        lambda m, x: m.b(torch.tanh(m.norm(m.a(x))).mean(1)), a=nn.Linear(2, 3), norm=nn.LayerNorm(3), b=nn.Linear(3, 2)
    ),
    lambda: (normal(4, 3, 2), labels(2, 4)),
    CATEGORICAL,
)
_case(
    "layernorm-multidim",
    lambda: Lambda(
        lambda m, x: m.b(torch.tanh(m.norm(m.a(x))).mean(1)),
        a=nn.Linear(2, 3),
        norm=nn.LayerNorm((3, 3)),
        b=nn.Linear(3, 2),
    ),
    lambda: (normal(4, 3, 2), labels(2, 4)),
    CATEGORICAL,
)
_case(
    "groupnorm",
    lambda: nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ),
    lambda: (normal(3, 1, 3, 3), labels(2, 3)),
    CATEGORICAL,
)
_case(
    "instancenorm",
    lambda: nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    ),
    lambda: (normal(3, 1, 5), labels(2, 3)),
    CATEGORICAL,
)
if hasattr(nn, "RMSNorm"):
    _case(
        "rmsnorm",
        lambda: nn.Sequential(nn.Linear(2, 3), nn.RMSNorm(3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: (normal(4, 2), labels(2, 4)),
        CATEGORICAL,
    )

# --- everything else
_case(
    "frozen-weight-and-bias",
    lambda: _freeze(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
        "0.weight",
        "0.bias",
        "2.bias",
    ),
    lambda: (normal(4, 2), labels(2, 4)),
    CATEGORICAL,
    tags=["core"],
)
_case(
    "own-scale",
    lambda: nn.Sequential(nn.Linear(2, 3), Scale(3), nn.Tanh(), nn.Linear(3, 2)),
    lambda: (normal(4, 2), labels(2, 4)),
    CATEGORICAL,
)
_case(
    "own-scale-sequence",
    lambda: Lambda(
        lambda m, x: m.b(torch.tanh(m.scale(m.a(x))).mean(1)), a=nn.Linear(2, 3), scale=Scale(3), b=nn.Linear(3, 2)
    ),
    lambda: (normal(4, 3, 2), labels(2, 4)),
    CATEGORICAL,
)
_case(
    "raw-matmul",
    lambda: nn.Sequential(RawMatmul(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    lambda: (normal(4, 3), labels(2, 4)),
    CATEGORICAL,
    "single",
)
_case(
    "raw-functional-linear",
    lambda: nn.Sequential(RawLinear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    lambda: (normal(4, 3), labels(2, 4)),
    CATEGORICAL,
    "single",
)
_case(
    "prelu",
    lambda: nn.Sequential(nn.Linear(2, 4), nn.PReLU(), nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 2)),
    lambda: (normal(5, 2), labels(2, 5)),
    CATEGORICAL,
)
_case("bilinear", _bilinear, lambda: (normal(4, 2), labels(2, 4)), CATEGORICAL)
_case("gru", GRUNet, lambda: (normal(3, 3, 2), labels(2, 3)), CATEGORICAL, "open")
_case("attention", AttentionNet, lambda: (normal(3, 3, 4), labels(2, 3)), CATEGORICAL, "open")
_case("transformer-layer", _attention_layer, lambda: (normal(3, 3, 2), labels(2, 3)), CATEGORICAL, "open")
_case("weight-norm", _weight_norm, lambda: (normal(4, 2), labels(2, 4)), CATEGORICAL, "single")
_case(
    "tuple-inputs", TupleNet, lambda: ((normal(4, 2), normal(4, 3, seed=3)), labels(2, 4)), CATEGORICAL, tags=["core"]
)
_case("dict-batch", DictNet, lambda: (_token_batch(), labels(3, 4)), CATEGORICAL, tags=["core"])
_case(
    "nested-names",
    lambda: nn.Sequential(
        nn.ModuleDict({"in": nn.Linear(2, 3)})["in"],
        nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
        nn.Linear(3, 2),
    ),
    lambda: (normal(4, 2), binary(4, 2)),
    BERNOULLI,
)

BY_NAME = {case.name: case for case in CASES}


def tagged(tag: str) -> list[Case]:
    """Cases with a tag.

    ``core``: posterior tests; ``chain``: a Sequential of Linear and elementwise layers; ``linear``: a linear chain;
    ``hessian``: small and smooth enough for the dense Hessian; ``reused``: a weight with several calls.
    """
    return [case for case in CASES if tag in case.tags]
