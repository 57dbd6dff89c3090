"""Faults that a review of this package found; each test is one of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import linalg
from laplace_kf.structures.kron import Kronecker
from tests import oracles
from tests.cases import CATEGORICAL, build, labels, normal
from tests.oracles import jacobian

STRUCTURES = ("diag", "full")
DOUBLE = {"dtype": torch.float64}


def data(n: int = 6, inputs: int = 3, classes: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, inputs, generator=rng, **DOUBLE), torch.arange(n) % classes


def net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for k in range(len(widths) - 1):
            layers += [nn.Linear(widths[k], widths[k + 1], **DOUBLE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def seeded(module: type[nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args).double()


def dense(model: nn.Module, x: Any, names: list[str] | None = None) -> Tensor:
    """The mean Gauss-Newton matrix of a softmax classifier, one example at a time by plain autograd."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names or parameters]
    count = len(x[0]) if isinstance(x, tuple) else len(x)
    total: Any = 0
    for n in range(count):
        outputs = model(*(t[n : n + 1] for t in x)) if isinstance(x, tuple) else model(x[n : n + 1])
        rows = []
        for c in range(outputs.shape[1]):
            grads = torch.autograd.grad(outputs[0, c], weights, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in filled]))
        p = outputs[0].detach().softmax(-1)
        j = torch.stack(rows)
        total = total + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return total / count


def agrees(model: nn.Module, x: Any, y: Tensor) -> None:
    truth = dense(model, x)
    for structure in STRUCTURES:
        found = lk.curvature.estimate(model, "categorical", (x, y), structure).mean()
        expected = truth if structure == "full" else torch.diag(truth.diagonal())
        torch.testing.assert_close(found.dense(), expected, rtol=1e-9, atol=1e-13)


def test_overlapping_prior_patterns_survive_saving(tmp_path: Path) -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision={"2.*": 5.0, "*": 0.5}).fit((x, y))
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())


class SharedBias(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
        self.b1, self.b2 = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "one bias for two weights":
            return F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w2, self.b1) + 0 * self.b2
        if self.kind == "one weight with two biases":
            return F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w1, self.b2) + 0 * self.w2[0]
        h = torch.tanh(F.linear(x, self.w1, self.b1))
        return F.linear(torch.tanh(F.linear(h, self.w1)), self.w2, self.b2)


@pytest.mark.parametrize(
    "kind", ["one bias for two weights", "one weight with two biases", "one weight with and without a bias"]
)
def test_a_parameter_in_two_calls_with_other_partners(kind: str) -> None:
    agrees(seeded(SharedBias, kind), *data())


def test_a_shared_bias_alone_on_a_chain() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
            self.b = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.tanh(F.linear(x, self.w1, self.b)), self.w2, self.b)

    model, (x, y) = seeded(Net), data()
    agrees(model, x, y)
    with pytest.raises(lk.errors.UnsupportedLayer, match="'b'"):
        lk.curvature.estimate(model, "categorical", (x, y), "kron", "recursive")


class TimeMajor(nn.Module):
    """Picks one time step of each sequence, in time-major layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, length: Tensor, gate: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x.transpose(0, 1)))
        return self.head(h[length - 1, torch.arange(len(length))] * gate[:, None])


@pytest.mark.parametrize("gate", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_rows_of_a_time_major_layer_whatever_the_gradients(gate: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 2, generator=rng, **DOUBLE)
    inputs = (x, torch.tensor([1, 2, 3, 4]), torch.tensor(gate, **DOUBLE))
    agrees(seeded(TimeMajor), inputs, torch.arange(4) % 3)


class Masked(nn.Module):
    """A head on the masked positions of all examples together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        out = h.new_zeros(*mask.shape, 3)
        out[mask] = self.head(h[mask])
        return out.sum(1)


def test_rows_in_no_regular_order_go_through_per_example_gradients() -> None:
    x = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(0), **DOUBLE)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])  # as many rows as examples
    agrees(seeded(Masked), (x, mask), torch.arange(3))


class Energy(nn.Module):
    """Its output is a gradient that the forward pass takes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.out(torch.tanh(self.layer(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_gradient_taken_in_the_forward_pass() -> None:
    model, (x, y) = seeded(Energy), data()
    truth = dense(model, x)
    found = lk.curvature.estimate(model, "categorical", (x, y), "full").mean().dense()
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-13)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class WithFunction(nn.Module):
    def __init__(self, also_linear: bool) -> None:
        super().__init__()
        self.also_linear = also_linear
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = Opaque.apply(x, self.w)
        return F.linear(torch.tanh(h), self.w) if self.also_linear else h


@pytest.mark.parametrize("also_linear", [False, True])
def test_a_weight_inside_a_custom_function(also_linear: bool) -> None:
    agrees(seeded(WithFunction, also_linear), *data())


class ChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.layer(x)


def test_a_model_that_changes_its_input() -> None:
    model, (x, y) = seeded(ChangesInput), data()
    before = x.clone()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    posterior.n_data = 1e14
    drawn = posterior.predict(x, method="mc", samples=7).probs
    torch.testing.assert_close(drawn, posterior.predict(x, method="map").probs, rtol=1e-5, atol=1e-6)
    posterior.tune((x, y), n_data=[6.0], prior_precision=[1.0], method="mc", samples=2)
    assert torch.equal(x, before)


class SharedVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.stack([self.layer(x * v)]).sum(0)


def test_importance_with_a_shared_tensor_as_long_as_the_minibatch() -> None:
    model, (x, y) = seeded(SharedVector), data(inputs=6)
    v = torch.linspace(0.1, 2, 6, **DOUBLE)
    found = []
    for factor in (v, v.expand(6, 6).clone()):  # the second one belongs to the examples, row by row
        rng = torch.Generator().manual_seed(0)
        batch = [((x, factor), y)]
        found.append(lk.curvature.estimate(model, "categorical", batch, "kron", "importance", generator=rng))
    torch.testing.assert_close(found[0].mean().dense(), found[1].mean().dense(), rtol=1e-12, atol=1e-15)


def test_a_zero_in_a_prior_by_patterns_is_not_silent() -> None:
    model, (x, y) = net(4, 5, 3), data(20, 4)
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision={"*weight": 0.0, "*bias": 1.0}).fit((x, y))
    expected = posterior.n_data * posterior.curvature.dense()
    place = {name: k for k, name in enumerate(posterior.mean)}
    prior = [torch.full((v.numel(),), float("bias" in name), **DOUBLE) for name, v in posterior.mean.items()]
    expected = expected + torch.diag(torch.cat(prior))
    assert len(place) == 4
    torch.testing.assert_close(posterior.precision.dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", ["tanh(input=h)", "an integer", "vmap"])
def test_elementwise_functions_that_are_no_activation(call: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            if call == "tanh(input=h)":
                return torch.tanh(input=h)
            if call == "an integer":
                return h * torch.neg(torch.arange(3))
            return torch.func.vmap(torch.tanh)(h)

    agrees(seeded(Net), *data())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[first] = self.one(x[first])
        out[~first] = self.two(x[~first])
        return out


def test_experts_that_see_any_number_of_examples() -> None:
    x, y = data(8)
    for chosen in (x, x.abs(), torch.where(torch.arange(8)[:, None] % 2 == 0, x.abs(), -x.abs())):
        agrees(seeded(Experts), chosen, y)
        for structure in ("kron", "diag"):
            assert lk.curvature.estimate(seeded(Experts), "categorical", (chosen, y), structure).n_data == 8


def test_sparse_embedding_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).sum(1))

    model, tokens, y = seeded(Net), torch.tensor([[0, 1], [2, 2], [3, 0]]), torch.arange(3)
    assert lk.curvature.estimate(model, "categorical", (tokens, y), "diag").mean().diag().min() >= 0


def test_fit_inside_inference_mode() -> None:
    model, (x, y) = net(3, 4, 3), data()
    expected = lk.LaplacePosterior(model, "categorical").fit((x, y)).precision.dense()
    with torch.inference_mode():
        found = lk.LaplacePosterior(model, "categorical").fit((x.clone(), y.clone())).precision.dense()
    torch.testing.assert_close(found, expected)


def test_options_of_objects_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    posterior = lk.LaplacePosterior(model, "categorical", Kronecker(vector_blocks="full")).fit(data())
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())


def test_load_into_another_type_or_architecture(tmp_path: Path) -> None:
    x, y = data()
    lk.LaplacePosterior(net(3, 4, 3), "categorical").fit((x, y)).save(tmp_path / "p")
    single = lk.LaplacePosterior.load(tmp_path / "p", net(3, 4, 3).float())
    assert single.predict(x.float(), method="mc", samples=3).probs.dtype == torch.float32
    with pytest.raises(lk.errors.ShapeMismatch, match="architecture"):
        lk.LaplacePosterior.load(tmp_path / "p", net(3, 4, 3, 5, 3))


def test_a_likelihood_that_cannot_be_written_down(tmp_path: Path) -> None:
    likelihood = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Categorical(logits=z))
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, likelihood).fit((x, y))
    posterior.save(tmp_path / "p")
    with pytest.raises(lk.errors.IncompatiblePair, match="likelihood"):
        lk.LaplacePosterior.load(tmp_path / "p", model)
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model, likelihood=likelihood)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())


@pytest.mark.parametrize("grid", [np.array([1.0, 10.0]), torch.tensor([1.0, 10.0]), range(1, 3), 5.0])
def test_grids_of_any_kind(grid: Any) -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    result = posterior.tune((x, y), n_data=grid, prior_precision=[1.0, 2.0, 4.0], samples=2, objective="nll")
    assert len(result.table) == 3 * (1 if isinstance(grid, float) else 2)
    with pytest.raises(ValueError, match="empty"):
        posterior.tune((x, y), n_data=[])


def test_the_last_layer_may_be_parametrised_but_not_frozen() -> None:
    model, (x, y) = net(3, 4, 3), data()
    nn.utils.parametrizations.weight_norm(model[2])
    posterior = lk.LaplacePosterior(model, "categorical", "diag", parameters="last_layer").fit((x, y))
    assert set(posterior.mean) == {n for n, _ in model.named_parameters() if n.startswith("2.")}
    frozen = net(3, 4, 3)
    frozen[2].requires_grad_(False)
    with pytest.raises(lk.errors.UnsupportedLayer, match="frozen"):
        lk.LaplacePosterior(frozen, "categorical", parameters="last_layer").fit((x, y))


class Untidy(nn.Module):
    """Counts its calls, remembers features and renormalises an embedding."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 2, max_norm=0.1), nn.LSTM(2, 3, batch_first=True)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.count += 1
        h = self.table(tokens)
        self.features = h
        self.seen.append(h)
        return self.head(h)[0][:, -1]


def test_whatever_the_forward_pass_writes_is_put_back() -> None:
    model, tokens, y = seeded(Untidy), torch.tensor([[0, 1], [2, 2], [3, 0]]), torch.arange(3)
    state = copy.deepcopy(model.state_dict())
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    flat = list(model.head._flat_weights)
    posterior = lk.LaplacePosterior(model, "categorical", "diag").fit((tokens, y))
    posterior.predict(tokens, method="mc", samples=2)
    posterior.tune((tokens, y), n_data=[3.0], prior_precision=[1.0], method="mc", samples=2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == keys
    assert model.seen == []
    assert all(a is b for a, b in zip(model.head._flat_weights, flat, strict=True))
    copy.deepcopy(model)


def test_a_damping_without_effect_is_refused() -> None:
    with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
        lk.LaplacePosterior(net(3, 3), "categorical", "diag", damping="factored")


def test_tune_names_the_bad_validation_batch() -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical").fit((x, y))
    bad = x.clone()
    bad[1, 1] = float("nan")
    with pytest.raises(lk.errors.NonFinite, match="1"):
        posterior.tune([(x, y), (bad, y)], n_data=[1.0], prior_precision=[1.0])


def test_oracle_of_this_file() -> None:
    """The plain loop above equals the oracle that the contract tests use."""
    model, (x, _) = net(3, 4, 3), data()
    j = jacobian(model, x, len(x))
    p = model(x).detach().softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(dense(model, x), torch.einsum("ncp,ncd,ndq->pq", j, h, j) / len(x))


class Elementwise(nn.Module):
    """Elementwise parameters in every form: out of place, in place, repeated, broadcast, scalar, tied to a view."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.vector, self.scalar = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1))
        self.table, self.form = nn.Parameter(torch.randn(1, 6, 4)), form

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.first(x))
        if self.form == "out of place":
            h = (h * self.vector + self.vector) * self.scalar
        elif self.form == "in place":
            h *= self.vector
            h += self.scalar
        elif self.form == "rows of a table":
            h = h + self.table[:, : x.shape[1]]
        elif self.form == "repeated":
            h = torch.cat([self.table[:, :1].expand(x.shape[0], -1, -1), self.vector.expand(x.shape[0], 1, 4), h], 1)
        elif self.form == "both operands":
            h = h + self.vector * self.vector
        elif self.form == "view":
            h = h @ self.table[0, :4] + self.table[0, 4]
        return self.head(h.mean(1))


@pytest.mark.parametrize("form", ["out of place", "in place", "rows of a table", "repeated", "both operands", "view"])
def test_elementwise_parameters_have_their_exact_diagonal(form: str) -> None:
    model = build(lambda: Elementwise(form))
    used = {"out of place": ["vector", "scalar"], "in place": ["vector", "scalar"], "rows of a table": ["table"],
            "repeated": ["table", "vector"], "both operands": ["vector"], "view": ["table"]}[form]  # fmt: skip
    names = [*used, "first.*", "head.*"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in used or "." in name)
    x, y = normal(3, 5, 3), labels(2, 3)
    ggn = oracles.dense_ggn(model, x, y, CATEGORICAL.nll)
    full = lk.curvature.estimate(model, "categorical", [(x, y)], "full", parameters=names).mean().dense()
    torch.testing.assert_close(full, ggn, rtol=1e-9, atol=1e-12)
    kron = lk.curvature.estimate(model, "categorical", [(x, y)], "kron", parameters=names)
    diagonal = kron.layout.split(kron.mean().diag()[None])
    exact = kron.layout.split(ggn.diagonal()[None])
    for name in used:
        torch.testing.assert_close(diagonal[name], exact[name], rtol=1e-9, atol=1e-12)


class Sorted(nn.Module):
    """Puts the examples in an order that the data decide before a layer, and back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.head(torch.tanh(self.first(x))[order])[order.argsort()]


class Mixture(nn.Module):
    """Two experts, each for some of an example's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).flatten(0, 1)
        choice, out = (x[..., 0] > 0).long().flatten(), h.new_zeros(len(h), 3)
        for k, expert in enumerate(self.experts):
            index = torch.where(choice == k)[0]
            out = out.index_add(0, index, expert(h[index]))
        return out.reshape(*x.shape[:2], 3).mean(1)


def _row_orders(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Three examples in regular order, then three in another, with equally many rows."""
    if kind == "sorted":
        x, y = data(6)
        x[:, 0] = torch.tensor([1, 2, 3, 3, 1, 2])
        return seeded(Sorted), x, y
    x = normal(6, 2, 3)
    x[..., 0] = torch.tensor([[1, -1], [1, -1], [1, -1], [1, 1], [-1, -1], [1, -1]])
    return seeded(Mixture), x, torch.arange(6) % 3


@pytest.mark.parametrize("kind", ["sorted", "experts"])
def test_rows_in_an_order_that_the_data_decide_are_never_taken_from_an_earlier_minibatch(kind: str) -> None:
    model, x, y = _row_orders(kind)
    expected = oracles.dense_ggn(model, x, y, CATEGORICAL.nll)
    regular, irregular = (x[:3], y[:3]), (x[3:], y[3:])
    for batches in ([(x, y)], [irregular, regular], [regular, irregular]):
        found = lk.curvature.estimate(model, "categorical", batches, "full").mean().dense()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class SharedMask(nn.Module):
    """Attention with an additive mask ``(T, T)`` in the batch, and a weight that needs per-example gradients."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.head, self.mask = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2), mask

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = torch.tensordot(x, self.weight * self.weight, 1) @ x.transpose(1, 2)
        return self.head((torch.softmax(scores + (self.mask if mask is None else mask), -1) @ x).mean(1))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (4, 4, 2)])
def test_a_mask_as_long_as_the_minibatch_is_not_cut_into_examples(sizes: tuple[int, ...]) -> None:
    x, y, mask = normal(10, 4, 3), labels(2, 10), torch.full((4, 4), -9.0, **DOUBLE).triu(1)
    model = seeded(SharedMask)
    expected = oracles.dense_ggn(seeded(SharedMask, mask), x, y, CATEGORICAL.nll)
    batches = [((a, mask), b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    found = lk.curvature.estimate(model, "categorical", batches, "full").mean().dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    posterior = lk.LaplacePosterior(model, "categorical", "full").fit(batches)
    jac = jacobian(seeded(SharedMask, mask), x[:4], 4)
    expected = jac @ torch.linalg.inv(10 * expected + torch.eye(len(expected), **DOUBLE)) @ jac.mT
    torch.testing.assert_close(posterior.functional_covariance((x[:4], mask)), expected, rtol=1e-8, atol=1e-10)


def test_outputs_that_depend_on_later_minibatches_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(0) if bool((x[:, 0] > 0).any()) else x
            return self.head(torch.tensordot(x, self.weight * self.weight, 1))

    x, y = data(6)
    x[:, 0] = torch.tensor([-1, -1, -1, 1, 1, 1])
    with pytest.raises(lk.errors.UnsupportedLayer, match="other examples"):
        lk.curvature.estimate(seeded(Net), "categorical", [(x[:3], y[:3]), (x[3:], y[3:])], "diag")


def test_the_last_layer_is_one_that_the_outputs_depend_on() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.first(x))
            return {"logits": self.head(h), "other": self.other(h)}

    posterior = lk.LaplacePosterior(seeded(Net), "categorical", parameters="last_layer").fit(data())
    assert set(posterior.mean) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("elementwise_first", [True, False])
def test_a_parameter_that_is_elementwise_in_some_minibatches_only(elementwise_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.first, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x)) * self.scale
            return self.head(h if bool((x[:, 0] > 0).all()) else h @ torch.diag(self.scale))

    model, (x, y) = seeded(Net), data()
    x[:, 0] = torch.tensor([1, 1, 1, -1, -1, -1])
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = lk.curvature.estimate(model, "categorical", parts if elementwise_first else parts[::-1], "full")
    expected = oracles.dense_ggn(model, x, y, CATEGORICAL.nll)
    torch.testing.assert_close(found.mean().dense(), expected, rtol=1e-9, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        part = torch.utils.checkpoint.checkpoint
        return self.head(part(lambda h: torch.tanh(self.middle(h)), self.first(x), use_reentrant=self.reentrant))


def test_gradient_checkpointing() -> None:
    agrees(seeded(Checkpointed, False), *data())
    with pytest.raises(lk.errors.UnsupportedLayer, match="use_reentrant=False"):
        lk.LaplacePosterior(seeded(Checkpointed, True), "categorical").fit(data())


def test_a_batch_without_examples_is_named() -> None:
    model, (x, y) = nn.Sequential(net(3, 4), nn.LayerNorm(4, **DOUBLE), net(4, 3)), data()
    for structure in ("kron", "full"):
        with pytest.raises(lk.errors.ShapeMismatch, match="batch 1 has no examples"):
            lk.LaplacePosterior(model, "categorical", structure).fit([(x, y), (x[:0], y[:0])])


@pytest.mark.parametrize("count", [4, 20])
def test_covariances_with_a_mask_as_long_as_there_are_inputs(count: int) -> None:
    x, y, mask = normal(count, count, 3), labels(2, count), torch.full((count, count), -9.0, **DOUBLE).triu(1)
    model = seeded(SharedMask)
    posterior = lk.LaplacePosterior(model, "categorical", "full").fit([((x, mask), y)])
    jac = jacobian(seeded(SharedMask, mask), x, count)
    expected = jac @ torch.linalg.inv(posterior.precision.dense()) @ jac.mT
    torch.testing.assert_close(posterior.functional_covariance((x, mask)), expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(lk.errors.ShapeMismatch, match="same length"):
        posterior.fit(((x, mask[:2]), y))


class FlatWeights(nn.Module):
    """Weight and bias of a layer are two ranges of one parameter."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(3, 4), nn.Linear(4, 2), form
        self.weight = nn.Parameter(torch.randn(5, 4) if form == "rows" else torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        h, w = torch.tanh(self.first(x)), self.weight
        if self.form == "rows":
            return self.head(torch.tanh(torch.addmm(w[4], h, w[:4])))
        h = torch.tanh(F.linear(h, w[:16].view(4, 4), w[16:20]))
        return self.head(torch.tanh(F.linear(h, w[24:].view(4, 4), w[20:24])))


@pytest.mark.parametrize("form", ["rows", "flat"])
def test_weight_and_bias_in_one_parameter(form: str) -> None:
    model, x, y = build(lambda: FlatWeights(form)), normal(6, 3), labels(2, 6)
    ggn = oracles.dense_ggn(model, x, y, CATEGORICAL.nll)
    for structure in ("diag", "kron", "layer", "full"):
        posterior = lk.LaplacePosterior(model, "categorical", structure).fit((x, y))
        if structure != "kron":
            torch.testing.assert_close(posterior.curvature.diag(), ggn.diagonal(), rtol=1e-9, atol=1e-12)
        jac = jacobian(model, x, 6)
        expected = jac @ torch.linalg.inv(posterior.precision.dense()) @ jac.mT
        torch.testing.assert_close(posterior.functional_covariance(x), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sizes", [(1, 5), (1, 1, 4), (3, 2, 1)])
def test_a_position_table_that_is_read_twice(sizes: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table, self.head = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            table = self.table(torch.arange(5)[None])
            return self.head((torch.tanh(self.first(x) + table) * table).mean(1))

    model, x, y = seeded(Net), normal(6, 5, 3), labels(2, 6)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    if sizes[0] == 1:  # the first minibatch looks as if each example had a table of its own
        with pytest.raises(lk.errors.UnsupportedLayer, match="single example"):
            lk.curvature.estimate(model, "categorical", batches, "full")
        return
    found = lk.curvature.estimate(model, "categorical", batches, "full").mean().dense()
    torch.testing.assert_close(found, oracles.dense_ggn(model, x, y, CATEGORICAL.nll), rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    """``h + b²`` where no tape sees ``b``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(b)
        return h + b**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (b,) = ctx.saved_tensors
        return grad, (grad * 2 * b).sum(0)


class LaterUse(nn.Module):
    """Its first layer's bias is used once more in some minibatches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if bool((x[:, 0] < 0).all()):
            h = Square.apply(h, self.first.bias)
        return self.head(torch.tanh(h))


def test_a_hidden_use_that_starts_in_a_later_minibatch_is_noticed() -> None:
    model, x = build(LaterUse), normal(6, 3)
    x[:3, 0], x[3:, 0] = x[:3, 0].abs(), -x[3:, 0].abs()
    y = labels(2, 6)
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"first\.bias"):
        lk.curvature.estimate(model, "categorical", [(x[:3], y[:3]), (x[3:], y[3:])], "diag")
    late = lk.curvature.estimate(model, "categorical", [(x[3:], y[3:])], "full").mean().dense()
    torch.testing.assert_close(late, oracles.dense_ggn(model, x[3:], y[3:], CATEGORICAL.nll), rtol=1e-9, atol=1e-12)


def test_an_eigensolver_that_gives_nan_in_float32_is_asked_again_in_float64(monkeypatch):
    # seen at 785x785 with finite, well-conditioned input: LAPACK's divide and conquer in single precision
    right = torch.linalg.eigh
    asked = []

    def single_fails(matrix):
        asked.append(matrix.dtype)
        values, vectors = right(matrix)
        return (values, vectors) if matrix.dtype == torch.float64 else (values * torch.nan, vectors * torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", single_fails)
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    values, vectors = linalg.eigh(matrix, "fc")
    assert asked == [torch.float32, torch.float64]
    assert values.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
