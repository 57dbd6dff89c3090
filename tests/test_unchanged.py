"""Nothing that a caller hands over is left changed, whether a call succeeds or raises."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from tests.cases import labels, normal, rng


class Boom(RuntimeError):
    """What the model throws."""


class Trip:
    """Counts down to a failure; kept outside of the model so that the model has no state of its own."""

    forward: int | None = None
    backward: bool = False
    error: type[BaseException] = Boom

    @classmethod
    def reset(cls) -> None:
        cls.forward, cls.backward, cls.error = None, False, Boom


class Raise(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise Trip.error("backward")


class Net(nn.Module):
    """BatchNorm, dropout, an in-place activation, a frozen parameter and an unused buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("counter", torch.zeros(2))
        self.note = {"kept": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        if Trip.forward is not None:
            Trip.forward -= 1
            if Trip.forward < 0:
                raise Trip.error("forward")
        h = self.drop(self.act(self.norm(self.first(x))))
        h = torch.tanh(self.second(h))
        if Trip.backward and h.requires_grad:
            h = Raise.apply(h)
        return self.head(h)


def _user_hook(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook of the caller's."""


def _user_pre_hook(module: nn.Module, args: Any) -> None:
    """A hook of the caller's."""


def _user_tensor_hook(gradient: Tensor) -> None:
    """A hook of the caller's."""


def make() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double()
        model.norm.running_mean.normal_()  # type: ignore[union-attr]
        model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    model.train()
    model.second.eval()  # a mixed state, which "model.train()" at the end would not restore
    model.first.bias.requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        if i % 2 == 0:
            parameter.grad = torch.full_like(parameter, 0.25 * i)
    model.second.register_forward_hook(_user_hook)
    model.norm.register_forward_pre_hook(_user_pre_hook)
    model.head.weight.register_hook(_user_tensor_hook)
    return model


HOOKS = [name for name in nn.Module().__dict__ if "hooks" in name]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that could have been touched; tensors are copied, objects are named by identity."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        state[path, "type"] = type(module)
        state[path, "training"] = module.training
        state[path, "dict"] = {k: id(v) for k, v in module.__dict__.items() if k != "training"}
        state[path, "forward"] = "forward" in module.__dict__
        for hooks in HOOKS:
            value = getattr(module, hooks)
            state[path, hooks] = list(value.items()) if hasattr(value, "items") else value
        state[path, "parameters"] = {k: id(v) for k, v in module._parameters.items()}
        state[path, "buffers"] = {k: id(v) for k, v in module._buffers.items()}
        state[path, "modules"] = {k: id(v) for k, v in module._modules.items()}
    state["note"] = repr(model.note)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name, "value"] = tensor.detach().clone()
        state[name, "data_ptr"] = tensor.data_ptr()
        state[name, "requires_grad"] = tensor.requires_grad
        state[name, "grad"] = None if tensor.grad is None else tensor.grad.clone()
        state[name, "grad id"] = id(tensor.grad)
        state[name, "attributes"] = sorted(tensor.__dict__)
        hooks = tensor._backward_hooks
        state[name, "hooks"] = None if hooks is None else list(hooks.items())
        after = getattr(tensor, "_post_accumulate_grad_hooks", None)
        state[name, "post hooks"] = None if after is None else list(after.items())
        state[name, "version"] = tensor._version
    state["global hooks"] = [
        len(getattr(torch.nn.modules.module, name))
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    ]
    state["torch rng"] = torch.get_rng_state()
    numpy_state: Any = np.random.get_state()
    state["numpy rng"] = (numpy_state[1].tolist(), numpy_state[2:])
    state["python rng"] = random.getstate()
    state["grad mode"] = torch.is_grad_enabled()
    state["dtype"] = torch.get_default_dtype()
    state["threads"] = torch.get_num_threads()
    state["deterministic"] = torch.are_deterministic_algorithms_enabled()
    state["function mode"] = torch.overrides._len_torch_function_stack()
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor) and value.dtype == other.dtype, key
            assert torch.equal(value, other), f"{key} changed"
        else:
            assert value == other, f"{key} changed: {value} -> {other}"


X, Y = normal(12, 3, seed=90), labels(3, 12, seed=91)


def data() -> list[Any]:
    """Three minibatches, the last of one example."""
    return [(X[:6], Y[:6]), (X[6:11], Y[6:11]), (X[11:], Y[11:])]


VALIDATION = (normal(5, 3, seed=92), labels(3, 5, seed=93))
GRIDS: dict[str, Any] = {"n_data": [12.0, 120.0], "prior_precision": [0.1, 1.0, 10.0], "samples": 3}

Operation = Callable[[Any, nn.Module, Path], Any]

FITTED: dict[str, Operation] = {
    "refit": lambda p, m, path: p.fit(data()),
    "refit-with-passes": lambda p, m, path: p.fit(data(), passes=2),
    "tune": lambda p, m, path: p.tune(VALIDATION, **GRIDS),
    "tune-with-generator": lambda p, m, path: p.tune(VALIDATION, generator=rng(0), **GRIDS),
    "tune-linearized": lambda p, m, path: p.tune(VALIDATION, method="linearized", **GRIDS),
    "tune-evidence": lambda p, m, path: p.tune(objective="evidence", **GRIDS),
    "predict": lambda p, m, path: p.predict(X, method="mc", samples=3),
    "predict-weights": lambda p, m, path: p.predict(X, method="mc", samples=3, space="weights", generator=rng(0)),
    "predict-map": lambda p, m, path: p.predict(X, method="map"),
    "predict-linearized": lambda p, m, path: p.predict(X, method="linearized", samples=3),
    "predict-probit": lambda p, m, path: p.predict(X, method="probit"),
    "functional-covariance": lambda p, m, path: p.functional_covariance(X),
    "sample": lambda p, m, path: p.sample(3),
    "precision": lambda p, m, path: (p.precision.dense(), p.precision.sample(2), p.precision.logdet()),
    "penalty": lambda p, m, path: p.penalty(),
    "log-evidence": lambda p, m, path: p.log_evidence(),
    "summary": lambda p, m, path: str(p.summary()),
    "save-and-load": lambda p, m, path: (p.save(path / "p"), lk.LaplacePosterior.load(path / "p", m)),
    "update": lambda p, m, path: p.update(data()),
}
BARE: dict[str, Operation] = {
    **{
        f"estimate-{structure}-{estimator}": (
            lambda p, m, path, s=structure, e=estimator: lk.curvature.estimate(
                m, "categorical", data(), structure=s, estimator=e
            ).mean()
        )
        for structure in ("kron", "diag", "full", "ekfac")
        for estimator in ("exact", "sampled", "projection", "importance", "empirical")
    },
    "ggn-vector-product": lambda p, m, path: lk.curvature.ggn_vector_product(
        m, "categorical", data(), torch.ones(55, dtype=torch.float64)
    ),
    "hessian-vector-product": lambda p, m, path: lk.curvature.hessian_vector_product(
        m, "categorical", data(), torch.ones(55, dtype=torch.float64)
    ),
    "last-layer": lambda p, m, path: lk.LaplacePosterior(m, "categorical", parameters="last_layer").fit(data()),
}


@pytest.fixture(autouse=True)
def _trip() -> Iterator[None]:
    Trip.reset()
    yield
    Trip.reset()


def test_the_example() -> None:
    model = make()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 55
    first, second = snapshot(model), snapshot(model)
    assert_same(first, second)
    model(X)
    with pytest.raises(AssertionError):
        assert_same(first, snapshot(model))  # running statistics and the dropout draw are noticed


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", list(FITTED))
def test_calls_on_a_fitted_posterior(name: str, structure: str, tmp_path: Path) -> None:
    model = make()
    before = snapshot(model)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(data())
    assert_same(before, snapshot(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these grids put the best value on the edge
        FITTED[name](posterior, model, tmp_path)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("name", list(BARE))
def test_calls_without_a_posterior(name: str, tmp_path: Path) -> None:
    model = make()
    before = snapshot(model)
    BARE[name](None, model, tmp_path)
    assert_same(before, snapshot(model))


@pytest.mark.pairs(name=FITTED, structure=["kron", "full"], k=[0, 1, 2])
def test_a_forward_that_raises_after_k_calls(name: str, structure: str, k: int, tmp_path: Path) -> None:
    model = make()
    before = snapshot(model)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(data())
    dense, n, lam = posterior.precision.dense(), float(posterior.n_data), float(posterior.prior_precision)
    Trip.forward = k
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FITTED[name](posterior, model, tmp_path)
    except Boom:
        # A failed call leaves the posterior as it was, too.
        Trip.reset()
        assert torch.equal(posterior.precision.dense(), dense)
        assert float(posterior.n_data) == n and float(posterior.prior_precision) == lam
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("name", list(BARE))
def test_a_forward_that_raises_without_a_posterior(name: str, k: int, tmp_path: Path) -> None:
    model = make()
    before = snapshot(model)
    Trip.forward = k
    with contextlib.suppress(Boom):
        BARE[name](None, model, tmp_path)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_first_fit_raises(structure: str) -> None:
    for k in (0, 1, 2):
        model = make()
        before = snapshot(model)
        posterior = lk.LaplacePosterior(model, "categorical", structure=structure)
        Trip.forward = k
        with pytest.raises(Boom):
            posterior.fit(data())
        assert_same(before, snapshot(model))
        with pytest.raises(lk.errors.NotFitted):
            posterior.sample(1)
        Trip.reset()
        posterior.fit(data())


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_backward_that_raises(structure: str, error: type[BaseException]) -> None:
    model = make()
    before = snapshot(model)
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure)
    Trip.backward, Trip.error = True, error
    with pytest.raises(BaseException):  # noqa: B017, PT011  Ctrl-C must clean up as well
        posterior.fit(data())
    Trip.reset()
    assert_same(before, snapshot(model))
    with pytest.raises(lk.errors.NotFitted):
        posterior.sample(1)


@pytest.mark.parametrize("method", ["mc", "map", "linearized"])
def test_ctrl_c_in_predict(method: str) -> None:
    model = make()
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    before = snapshot(model)
    Trip.forward, Trip.error = 0, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        posterior.predict(X, method=method, samples=3)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    "bad",
    [
        lambda p, m, path: p.save(path / "missing" / "p"),
        lambda p, m, path: p.sample(-1),
        lambda p, m, path: p.predict(X[:, :2]),
        lambda p, m, path: p.fit([(X, Y + 7)]),
        lambda p, m, path: p.fit([(X, Y), (X * float("nan"), Y)]),
        lambda p, m, path: p.tune((X, Y + 7), **GRIDS),
        lambda p, m, path: lk.LaplacePosterior.load(path / "nothing", m),
    ],
    ids=["save", "sample", "predict-shape", "fit-targets", "fit-nan", "tune-targets", "load"],
)
def test_bad_arguments(bad: Operation, tmp_path: Path) -> None:
    model = make()
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    dense = posterior.precision.dense()
    before = snapshot(model)
    with pytest.raises(Exception):  # noqa: B017, PT011  which one is checked in the contract tests
        bad(posterior, model, tmp_path)
    assert_same(before, snapshot(model))
    assert torch.equal(posterior.precision.dense(), dense)


def test_penalty_that_meets_a_changed_model() -> None:
    """A parameter of another shape: an error, and nothing else."""
    model = make()
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    model.head = nn.Linear(4, 5).double()
    before = snapshot(model)
    with pytest.raises(Exception):  # noqa: B017, PT011
        posterior.penalty()
    assert_same(before, snapshot(model))


def test_the_loader_and_its_tensors_are_left_alone() -> None:
    model = make()
    x, y = X.clone().requires_grad_(), Y.clone()
    posterior = lk.LaplacePosterior(model, "categorical").fit([(x, y)])
    posterior.predict(x, method="mc", samples=2)
    assert x.grad is None and torch.equal(x, X) and torch.equal(y, Y) and x.requires_grad


def test_a_shuffling_loader_leaves_the_global_generator() -> None:
    """A shuffling loader draws from the global generator; after ``fit`` that one stands where it stood."""
    dataset = torch.utils.data.TensorDataset(X, Y)

    def state_after(use: Callable[[Any], Any]) -> Tensor:
        torch.manual_seed(3)
        use(torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True))
        return torch.get_rng_state()

    with torch.random.fork_rng(devices=[]):
        untouched = state_after(lambda loader: None)
        plain = state_after(lambda loader: [None for _ in loader])
        fitted = state_after(lambda loader: lk.LaplacePosterior(make(), "categorical").fit(loader))
    assert torch.equal(fitted, untouched) and not torch.equal(plain, untouched)


@pytest.mark.parametrize("method", ["map", "mc"])
def test_a_loader_takes_none_of_the_global_random_numbers(method: str) -> None:
    """It shuffles and seeds its workers from them."""
    model = make()
    posterior = lk.LaplacePosterior(model, "categorical").fit(data())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 2, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        posterior.predict(loader, method=method, samples=3)
        posterior.predict_top_k(loader, 2, method=method)
        assert torch.equal(torch.get_rng_state(), before)
        own = torch.Generator()
        own.set_state(before)
        posterior.predict(X, method="mc", samples=3, space="weights", generator=own)
        posterior.predict(loader, method="mc", samples=3, generator=torch.default_generator)
        assert torch.equal(torch.get_rng_state(), own.get_state())  # where one call would have left it
