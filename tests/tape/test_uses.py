"""Parameters that a network uses in unusual ways: shared, hidden, elementwise, in parts, in some minibatches only."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.tape import sharing
from laplace_kf.tape.examples import ExampleGradients
from laplace_kf.tape.made import MadeTensors
from tests import oracles
from tests.cases import CATEGORICAL, build, labels, normal
from tests.classifiers import DOUBLE, agrees, data, dense, seeded
from tests.oracles import jacobian


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


class Physics(nn.Module):
    """Derivatives by the inputs, as physics-informed networks take them: the layers run inside of torch.func's."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.layer, self.out = of, nn.Linear(3, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        field = lambda r: self.out(torch.tanh(self.layer(r)))  # noqa: E731
        if self.of == "jvp":
            return torch.func.jvp(field, (x,), (torch.ones_like(x),))[1] + self.layer(x)[:, :3]
        single = {
            "grad": torch.func.grad(lambda r: field(r).sum()),
            "jacobian": lambda r: torch.func.jacrev(field)(r).sum(0),
            "laplacian": lambda r: torch.func.hessian(field)(r).diagonal(0, 1, 2).sum(-1),
        }
        return torch.vmap(single[self.of])(x)


@pytest.mark.parametrize("of", ["jvp", "grad", "jacobian", "laplacian"])
def test_layers_inside_of_torch_func(of: str) -> None:
    model, (x, y) = seeded(Physics, of), data()
    agrees(model, x, y)
    posterior = lk.LaplacePosterior(model, "categorical", structure="full").fit(x, y)
    jacobians = jacobian(model, x, len(x))
    expected = jacobians @ torch.linalg.inv(posterior.precision.dense()) @ jacobians.mT
    torch.testing.assert_close(posterior.functional_covariance(x), expected)
    assert bool(posterior.predict(x, method="mc", samples=2).probs.isfinite().all())
    before = float(lk.optim.kflr(model, "categorical").step(x, y))
    assert float(F.cross_entropy(model(x), y)) < before


def test_a_gradient_that_needs_the_callers_gradients_is_refused() -> None:
    class Forces(Energy):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.out(torch.tanh(self.layer(x))).sum(), x, create_graph=True)[0]

    with pytest.raises(lk.errors.UnsupportedLayer, match=r"Forces takes a derivative .*torch\.enable_grad"):
        lk.curvature.estimate(seeded(Forces), "categorical", data(), "diag")


class Solved(nn.Module):
    """Torch's vectorised derivative of ``solve`` is wrong, for all examples but some, where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.linalg.solve(self.w @ self.w.T + torch.eye(3, dtype=x.dtype), x.T).T)


def test_a_weight_inside_a_solve() -> None:
    model, (x, y) = seeded(Solved), data()
    agrees(model, x, y)
    posterior = lk.LaplacePosterior(model, "categorical", structure="full").fit(x, y)
    wanted = jacobian(model, x, len(x))
    expected = wanted @ torch.linalg.inv(posterior.precision.dense()) @ wanted.mT
    torch.testing.assert_close(posterior.functional_covariance(x), expected)


def test_a_vectorised_gradient_that_is_wrong_for_some_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    vectorised = ExampleGradients._vectorised

    def wrong(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
        gradients, alone = vectorised(self, *args)
        gradients[:, 3] *= 1.5
        return gradients, alone

    monkeypatch.setattr(ExampleGradients, "_vectorised", wrong)
    agrees(seeded(Solved), *data())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", ["gradient", "function"])
def test_hidden_uses_in_half_precision(hidden: str, dtype: torch.dtype) -> None:
    """What rounding may do to a gradient is less than what a rule leaves out that does not see all uses."""
    model = (seeded(Energy) if hidden == "gradient" else seeded(WithFunction, True)).to(dtype)
    x, y = data()
    x = x.to(dtype)
    expected = dense(copy.deepcopy(model).double(), x.double())
    for structure in ("full", "diag"):
        found = lk.curvature.estimate(model, "categorical", (x, y), structure).mean().diag()
        assert float((found - expected.diagonal()).norm() / expected.diagonal().norm()) < 0.03


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


def test_sparse_embedding_gradients() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).sum(1))

    model, tokens, y = seeded(Net), torch.tensor([[0, 1], [2, 2], [3, 0]]), torch.arange(3)
    assert lk.curvature.estimate(model, "categorical", (tokens, y), "diag").mean().diag().min() >= 0


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
    hidden = lk.curvature.estimate(seeded(Checkpointed, True), "categorical", data(), "full").mean().dense()
    plain = lk.curvature.estimate(seeded(Checkpointed, False), "categorical", data(), "full").mean().dense()
    torch.testing.assert_close(hidden, plain, rtol=0, atol=0)
    step = torch.utils.checkpoint.checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=True)
    assert type(step.grad_fn).__name__ == "CheckpointFunctionBackward"  # for others it is what it was


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
        return grad, (grad * 2 * b).flatten(0, -2).sum(0)


class TakenOut(nn.Module):
    """A bias beside a weight without a rule; its gradient is rounding, or it also acts where no tape sees it."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden, self.conv, self.head = hidden, nn.Conv1d(2, 4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(x, self.conv.weight / self.conv.weight.norm(), self.conv.bias)
        h = Square.apply(h.mT, self.conv.bias) if self.hidden else F.instance_norm(h).mT
        return self.head(torch.tanh(h).mean(1))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_bias_that_fails_or_shows_nothing_beside_a_weight_without_a_rule(hidden: bool) -> None:
    model, x = seeded(TakenOut, hidden), normal(6, 2, 5)
    agrees(model, x, labels(3, 6))
    blocks = lk.curvature.estimate(model, "categorical", (x, labels(3, 6)), "diag").blocks
    assert set(blocks) == ({"conv", "head"} if hidden else {"conv.weight", "conv.bias", "head"})


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


def test_memory_that_data_were_written_into_is_known_by_more_than_its_place() -> None:
    """An activation written in place is freed, and a product of parameters may lie where it lay: it is no data."""
    tensors = MadeTensors([])
    for _ in range(50):
        activation = torch.randn(4, 4).view(16)
        tensors.wrote(activation)
        assert not tensors.is_constant(activation)
        del activation
        product = torch.randn(4, 4)
        tensors.add(product, {"a": 16}, [], False)
        assert tensors.get(product) is not None
    held = torch.zeros(4, 4)
    tensors.add_constants([held])
    assert tensors.is_constant(held)
    tensors.wrote(held)
    assert not tensors.is_constant(held)


def test_copies_that_share_a_layer_are_read_alike() -> None:
    """However many there are, and in whatever order they came."""
    one, two, three = (SimpleNamespace(source=None, covers=()) for _ in range(3))
    a, b, c, d = (SimpleNamespace(source=object(), covers=covers) for covers in ((one,), (two,), (one, two), (three,)))
    groups = list(sharing._groups([one, two, three, a, b, c, d]))  # type: ignore[list-item]
    found = {frozenset(map(id, copies)): frozenset(map(id, layers)) for copies, layers in groups}
    assert found == {frozenset(map(id, (a, b, c))): frozenset(map(id, (one, two))), frozenset({id(d)}): {id(three)}}
