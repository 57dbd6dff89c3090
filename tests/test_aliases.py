"""Weights that the forward pass reaches another way than as attributes of their modules: refused by name, or right.

Draws, linearised predictions, loaded means and trial steps put tensors in the place of parameters. A network that reads
a parameter from somewhere else would not see them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import laplace_kf as lk
from laplace_kf import substitution
from laplace_kf.errors import UnsupportedLayer
from tests.cases import binary, labels, normal, rng
from tests.checks import close
from tests.optim.test_citizen import MAKERS


class Plain(nn.Module):
    """The same function as all others here, weights read as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(normal(6, 4, seed=1)), nn.Parameter(normal(3, 6, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1.T) @ self.w2.T


class InList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1, self.w2]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.ws[0].T) @ self.ws[1].T


class InDict(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.ws = {"first": self.w1}

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.ws["first"])) @ self.w2.T


class Closure(Plain):
    def __init__(self) -> None:
        super().__init__()
        w1, w2 = self.w1, self.w2
        self.f = lambda x: torch.tanh(x @ w1.T) @ w2.T

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Partial(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.out = functools.partial(F.linear, weight=self.w2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.w1.T))


class Unregistered(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)]
        self.layers[0].weight, self.layers[1].weight = self.w1, self.w2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class Transposed(Plain):
    """A view with its graph, made once."""

    def __init__(self) -> None:
        super().__init__()
        self.wt = self.w1.t()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.wt) @ self.w2.T


class Detached(Plain):
    """A view without a graph, beside a use of the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wt = self.w1.detach().t()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.wt + self.w1.T) / 2) @ self.w2.T


class Row(Plain):
    """A part of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.row = self.w2[1]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.w1.T)
        return torch.stack([h @ self.w2[0], h @ self.row, h @ self.w2[2]], 1)


class Buffer(Plain):
    """The parameter itself under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", self.w1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.held.T) @ self.w2.T


class SharedBuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", self.w1.data)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (0.5 * self.held.T + 0.5 * self.w1.T)) @ self.w2.T


class InNoGrad(Plain):
    """Read without a graph only, beside the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.ws[0].norm()
        return torch.tanh(x @ self.w1.T / norm) @ self.w2.T


class AsNumber(Plain):
    """Read as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1.T * float(self.ws[0].detach()[0, 0])) @ self.w2.T


class Sometimes(Plain):
    """The attribute in one place, a list in another."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1.T + 0.1 * (x @ self.ws[0].T)) @ self.w2.T


class CustomFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class InCustomFunction(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(CustomFunction.apply(x, self.ws[0]) + x @ self.w1.T) @ self.w2.T


class TrainingOnly(Plain):
    """Aliased in training mode, which optimisers run in."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.ws[0] if self.training else self.w1).T) @ self.w2.T


ALIASED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {  # with the parameters that are to be named
    "list": (InList, {"w1", "w2"}),
    "dict": (InDict, {"w1"}),
    "closure": (Closure, {"w1", "w2"}),
    "partial": (Partial, {"w2"}),
    "unregistered": (Unregistered, {"w1", "w2"}),
    "transposed": (Transposed, {"w1"}),
    "detached": (Detached, {"w1"}),
    "row": (Row, {"w2"}),
    "shared-buffer": (SharedBuffer, {"w1"}),
    "no-grad": (InNoGrad, {"w1"}),
    "number": (AsNumber, {"w1"}),
    "sometimes": (Sometimes, {"w1"}),
    "custom-function": (InCustomFunction, {"w1"}),
}


def data() -> tuple[Tensor, Tensor]:
    return normal(12, 4, seed=3), labels(3, 12, seed=4)


def refusal(names: set[str]) -> str:
    return f"reaches parameters? {', '.join(repr(name) for name in sorted(names))} in another way"


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("kind", ALIASED)
def test_a_fit_names_them_and_changes_nothing(kind: str, structure: str) -> None:
    make, names = ALIASED[kind]
    model = make().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure)
    with pytest.raises(UnsupportedLayer, match=refusal(names)) as caught:
        posterior.fit(data())
    path = sorted(names)[0]
    assert f"self.{path}" in str(caught.value) and "nn.ParameterList" in str(caught.value)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(lk.errors.NotFitted):
        _ = posterior.precision


PREDICTIONS: dict[str, Callable[[lk.LaplacePosterior, Tensor], Any]] = {
    "mc": lambda p, x: p.predict(x, "mc", samples=3, space="weights"),
    "activations": lambda p, x: p.predict(x, "mc", samples=3, space="activations"),
    "auto": lambda p, x: p.predict(x, samples=3),
    "linearized": lambda p, x: p.predict(x, "linearized"),
    "probit": lambda p, x: p.predict(x, "probit"),
    "map": lambda p, x: p.predict(x, "map"),
    "covariance": lambda p, x: p.functional_covariance(x),
    "variances": lambda p, x: p.functional_covariance(x, diagonal_only=True),
    "joint": lambda p, x: p.functional_covariance(x, joint=True),
    "predictor": lambda p, x: p.predictor(3)(x),
    "tune": lambda p, x: p.tune((x, data()[1]), samples=3),
    "tune-linearized": lambda p, x: p.tune((x, data()[1]), method="linearized"),
    "update": lambda p, x: p.update((x, data()[1])),
    "refit": lambda p, x: p.fit((x, data()[1])),
}


@pytest.mark.parametrize("kind", ["list", "closure", "unregistered", "detached"])
def test_a_loaded_posterior_does_not_answer_with_other_weights(kind: str, tmp_path: Path) -> None:
    make, names = ALIASED[kind]
    fitted = lk.LaplacePosterior(Plain(), "categorical").fit(data())
    fitted.save(tmp_path / "plain.safetensors")
    model = make()
    with torch.no_grad():
        model.get_parameter("w1").mul_(2)
    loaded = lk.LaplacePosterior.load(tmp_path / "plain.safetensors", model)
    before = loaded.n_data, loaded.prior_precision
    for predict in PREDICTIONS.values():
        with pytest.raises(UnsupportedLayer, match=refusal(names)):
            predict(loaded, data()[0])
    assert (loaded.n_data, loaded.prior_precision) == before
    good = lk.LaplacePosterior.load(tmp_path / "plain.safetensors", Plain())
    close(good.predict(data()[0], "map").probs, Plain()(data()[0]).softmax(-1).detach())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in MAKERS for kind in ("list", "training")), *(("kfac", kind) for kind in ALIASED)],
)
def test_every_optimiser_names_them_and_moves_nothing(name: str, kind: str) -> None:
    make, names = ALIASED.get(kind, (TrainingOnly, {"w1"}))
    model = make().train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    opt = MAKERS[name](model, generator=rng())
    with pytest.raises(UnsupportedLayer, match=refusal(names)):
        opt.step(*data())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert torch.equal(random, torch.get_rng_state()) and model.training and opt.steps == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("learner", [lk.continual.OnlineLaplace, lk.continual.NonOnlineLaplace, lk.continual.EWC])
def test_continual_learners_name_them(learner: Any) -> None:
    for make, names in (ALIASED["list"], ALIASED["transposed"]):
        with pytest.raises(UnsupportedLayer, match=refusal(names)):
            learner(make(), "categorical").after_task(data())


def test_path_integral_importances_need_no_substitution() -> None:
    """Synaptic Intelligence looks at the parameters themselves and at their gradients, wherever they are read."""
    found = []
    for model in (Plain(), InList()):
        learner = lk.continual.SynapticIntelligence(model, "categorical")
        opt = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            opt.step()
            learner.after_step()
        learner.after_task(data())
        with torch.no_grad():
            model.w1.add_(0.1)
        found.append(learner.penalty().detach())
    close(found[1], found[0])


def test_products_are_right_wherever_the_weights_are_read() -> None:
    v = normal(42, seed=5)
    for product in (lk.curvature.ggn_vector_product, lk.curvature.hessian_vector_product):
        wanted = product(Plain(), "categorical", data(), v)
        for kind in ("list", "closure", "unregistered", "transposed"):
            close(product(ALIASED[kind][0](), "categorical", data(), v), wanted)


def test_two_parameters_in_one_memory_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight.data = model[0].weight.data
    with pytest.raises(UnsupportedLayer, match=r"'0.weight' and '2.weight' are two parameters in the same memory"):
        lk.LaplacePosterior(model, "categorical").fit(data())
    with pytest.raises(UnsupportedLayer, match="in the same memory"):
        lk.optim.kfac(model, "categorical").step(*data())
    flat = normal(40, seed=1)  # parameters side by side in one memory are none of that
    model[0].weight.data, model[2].weight.data = flat[:16].view(4, 4), flat[16:32].view(4, 4)
    lk.LaplacePosterior(model, "categorical").fit(data())


def test_a_copy_whose_closure_reads_the_original_is_refused() -> None:
    """``copy.deepcopy`` copies lists, not what functions hold."""
    with pytest.raises(UnsupportedLayer, match="never took part in the forward pass: w1, w2"):
        lk.LaplacePosterior(copy.deepcopy(Closure()), "categorical").fit(data())
    with pytest.raises(UnsupportedLayer, match=refusal({"w1", "w2"})):
        lk.LaplacePosterior(copy.deepcopy(InList()), "categorical").fit(data())


def test_a_cached_parametrization_is_refused() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3)).double()
    with parametrize.cached():
        layer(data()[0])
        with pytest.raises(UnsupportedLayer, match=r"parametrizations.weight.original0', 'parametrizations"):
            lk.LaplacePosterior(layer, "categorical").fit(data())
    lk.LaplacePosterior(layer, "categorical").fit(data())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_wrapped_models_are_looked_into(wrap: str) -> None:
    wrapper: Any = torch.compile if wrap == "compiled" else nn.DataParallel
    with pytest.raises(UnsupportedLayer, match=refusal({"w1", "w2"})):
        lk.LaplacePosterior(wrapper(InList()), "categorical").fit(data())


# ------------------------------------------------------------------------------------------------------- right


class Registered(nn.Module):
    """The containers that the message names."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([normal(6, 4, seed=1)])
        self.named = nn.ParameterDict({"out": nn.Parameter(normal(3, 6, seed=2))})
        self.layers = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](torch.tanh(x @ self.ws[0].T) @ self.named["out"].T)


class TiedByAssignment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.again = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x))) + self.again))


class RegisteredTwice(nn.Module):
    """One layer at two places, and a module of several under two names."""

    def __init__(self) -> None:
        super().__init__()
        layer, self.encoder = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.layers, self.twin, self.head = nn.ModuleList([layer, layer]), self.encoder, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[1](torch.tanh(self.layers[0](x)))
        return self.head(torch.tanh(self.twin(x)) * self.encoder(h))


class Looks(Plain):
    """Takes the type, the device and the shape of a parameter from a list, not its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [self.w1]

    def forward(self, x: Tensor) -> Tensor:
        w = self.ws[0]
        x = x.to(w.dtype).to(w.device) + torch.zeros_like(w)[0] + w.new_zeros(w.shape[1])
        return super().forward(x)


class Inside(Plain):
    """Makes lists and views anew in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        ws = [self.w1.t(), dict(self.named_parameters())["w2"]]
        f = lambda h: torch.tanh(h @ ws[0])  # noqa: E731
        return f(x) @ ws[1].T


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(len(x), 2, 2))[0][:, -1])


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "attributes": Plain,
    "containers": Registered,
    "buffer": Buffer,
    "tied": TiedByAssignment,
    "registered-twice": RegisteredTwice,
    "looks": Looks,
    "inside": Inside,
    "recurrent": Recurrent,
    "weight-norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
    "copy": lambda: copy.deepcopy(Registered()),
}


DRAWS = 150  # the logarithm of a ratio of two variances then has an error of 0.16


@pytest.mark.parametrize("kind", RIGHT)
def test_registered_weights_move_with_every_draw(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RIGHT[kind]().double().eval()
    x, y = data()
    posterior = lk.LaplacePosterior(model, "categorical", structure="diag", prior_precision=5.0).fit((x, y))
    found = posterior.predict(x, "mc", samples=DRAWS, space="weights", generator=rng(), keep_samples=True).samples
    draws, other = posterior.sample(DRAWS, generator=rng(1)), copy.deepcopy(model)
    wanted = torch.zeros(DRAWS, 12, 3, dtype=x.dtype)
    with torch.no_grad():
        for k in range(DRAWS):
            for name, value in draws.items():
                other.get_parameter(name).copy_(value[k])
            wanted[k] = other(x)
    assert found is not None
    gap = (found.mean(0) - wanted.mean(0)) / ((found.var(0) + wanted.var(0)) / DRAWS).sqrt()
    assert float(gap.abs().max()) < 5
    assert float((found.var(0) / wanted.var(0)).log().abs().max()) < 1  # held weights would have no share in it


def test_only_what_is_replaced_has_to_be_in_its_place() -> None:
    """A backbone read from a list is no obstacle to a posterior over the rest; it stays as it is in every draw."""
    model, other = InDict(), Plain()
    for structure in ("kron", "full"):
        one, two = (
            lk.LaplacePosterior(m, "categorical", structure=structure, parameters=["w2"]).fit(data())
            for m in (model, other)
        )
        close(one.precision.dense(), two.precision.dense())
        for method in ("mc", "linearized"):
            found, wanted = (p.predict(data()[0], method, generator=rng()).probs for p in (one, two))
            close(found, wanted, 1e-9)
        close(one.functional_covariance(data()[0]), two.functional_covariance(data()[0]))


# ----------------------------------------------------------------------------------------------- how often it is asked


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    original = substitution._Watch

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(substitution, "_Watch", counted)
    return calls


def test_a_posterior_asks_once(asked: list[Any], tmp_path: Path) -> None:
    x, y = data()
    model = Plain()
    posterior = lk.LaplacePosterior(model, "categorical").fit([(x, y), (x, y)])
    assert len(asked) == 1
    for method in ("mc", "linearized", "probit", "map"):
        posterior.predict(x, method, samples=5)
    posterior.functional_covariance(x)
    posterior.predictor(5)(x)
    posterior.tune((x, y), samples=2)
    assert len(asked) == 1
    posterior.save(tmp_path / "file")
    loaded = lk.LaplacePosterior.load(tmp_path / "file", Plain())
    for _ in range(3):
        loaded.predict(x, samples=5)
    assert len(asked) == 2
    with torch.no_grad():
        model.w1 = nn.Parameter(model.w1 * 2)  # another object in its place
    posterior.predict(x, samples=5)
    assert len(asked) == 3


def test_an_optimiser_asks_before_its_first_step_only(asked: list[Any]) -> None:
    opt = lk.optim.kfac(Plain(), "categorical", generator=rng())
    for _ in range(3):
        opt.step(*data())
    assert 1 <= len(asked) <= 2  # in the mode of the steps, and on the tape in eval mode


def test_values_stand_for_the_call_only() -> None:
    model = Plain()
    x = data()[0]
    before = model(x)
    found = substitution.substituted(model, {"w2": torch.zeros_like(model.w2)}, lambda: model(x))
    assert not found.any() and torch.equal(model(x), before)
    close(found.new_zeros(1) + 0, torch.zeros(1, dtype=found.dtype))
    assert torch.equal(functional_call(model, {"w2": torch.zeros_like(model.w2)}, (x,)), found)


def test_a_module_at_two_places_gets_its_own_weights_back() -> None:
    """``torch.func.functional_call`` leaves the other values in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RegisteredTwice().double()
    x, y = data()
    own = dict(model.named_parameters())
    posterior = lk.LaplacePosterior(model, "categorical", structure="full").fit((x, y))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), own.values())])
        for a, b in zip(x, y, strict=True)
    ]
    wanted = torch.stack(rows) @ posterior.precision.solve(torch.stack(rows).T)
    close(lk.attribution.influence(posterior, (x, y), (x, y)), wanted)
    opt = lk.optim.kfac(model, "categorical", l2=0.0)
    assert float(opt.step(x, y)) > float(opt.step(x, y))
    assert all(p is own[name] for name, p in model.named_parameters())


def test_binary_outputs_refuse_as_well() -> None:
    model = InList()
    with pytest.raises(UnsupportedLayer, match=refusal({"w1", "w2"})):
        lk.LaplacePosterior(model, "bernoulli").fit((data()[0], binary(12, 3)))


# ------------------------------------------------------------------------------------------------ buffers of a network


class Running(nn.Module):
    """A network that counts in a buffer, multiplies by another one that it writes anew, and has a sparse one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("mask", torch.ones(5))
        self.register_buffer("sparse", torch.eye(5).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.mask[:] = torch.arange(5) < 4
        return self.two(torch.tanh(self.one(x)) * self.mask)


def test_a_network_may_write_into_its_buffers() -> None:
    """The question is asked beside the pass that is in use, whose tensors it must not touch; predictions neither."""
    model = Running().double()
    x, y = data()
    keep = (torch.arange(5) < 4).to(x)

    def by_hand(w: Tensor) -> Tensor:
        return model.two(torch.tanh(x @ w.T + model.one.bias) * keep)

    found = lk.LaplacePosterior(model, "categorical", structure="full").fit((x, y))
    assert float(model.passes) == 0
    jacobian = torch.func.jacrev(by_hand)(model.one.weight.detach())
    p = by_hand(model.one.weight).softmax(-1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("ncoi,ncd,ndpj->oipj", jacobian, hessian, jacobian).reshape(20, 20) / len(x)
    start = list(dict(model.named_parameters())).index("one.weight") * 20
    close(found.curvature.dense()[start : start + 20, start : start + 20], dense)
    found.predict(x, "mc", samples=3)
    assert float(model.passes) == 0 and bool((model.mask == 1).all())
