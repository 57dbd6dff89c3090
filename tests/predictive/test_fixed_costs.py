"""What a prediction need not do again: checks of layer rules, passes over the network, copies of random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.operators import spectral
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.predictive import quadratic
from laplace_kf.randomness import same_foreign_states, same_random_states
from laplace_kf.tape import Observation
from laplace_kf.tape import checked as check


class Square(torch.autograd.Function):
    """``(x Wᵀ)²`` elementwise, of which no rule sees the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        inner = 2 * grad * (x @ weight.T)
        return inner @ weight, inner.T @ x


class Net(nn.Module):
    """``(N, 3)`` in, ``(N, 2)`` out; with the flag, a second use of the first weight that no rule sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.hidden, self.twice, self.act = False, False, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.first(x) * (2.0 if self.twice else 1.0)))
        if self.hidden:
            h = h + Square.apply(x, self.first.weight)
        return self.second(h)


def fitted(structure: str = "kron") -> tuple[Net, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(5, 3).double()
    return model, lk.LaplacePosterior(model, "gaussian", structure).fit((x, torch.randn(5, 2).double())), x


def oracle(model: nn.Module, posterior: Any, x: Tensor) -> Tensor:
    """Variances ``(N, C)`` of the linearised outputs, one gradient an output."""
    weights = list(model.parameters())
    outputs = model(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, weights, retain_graph=True)])
        for out in outputs.flatten()
    ]
    jacobian = torch.stack(rows)
    inverse = torch.linalg.inv(posterior.precision.dense())
    return torch.einsum("ap,pq,aq->a", jacobian, inverse, jacobian).reshape(outputs.shape)


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """How often a method is called inside."""
    calls, plain = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield calls


def checked(posterior: Any, x: Tensor) -> bool:
    """Whether a prediction checks layer rules against autograd (their rounding errors are asked for then)."""
    with counted(check, "coarsest") as calls:
        posterior.predict(x, method="linearized")
    return calls[0] > 0


def test_rules_are_checked_once_for_passes_that_are_wired_in_the_same_way() -> None:
    _, posterior, x = fitted()
    assert checked(posterior, x[:3]), "inputs of another shape than those of the fit"
    assert not checked(posterior, x[:3])
    assert not checked(posterior, x[:3] + 1), "numbers have no say in it"
    assert checked(posterior, x[:4])
    assert checked(fitted()[1], x[:3]), "another model"


CHANGES = {
    "values of parameters": (lambda model: model.first.weight.data.mul_(1.5), False),
    "buffer": (lambda model: model.norm.running_var.fill_(2.0), False),
    "mode": (lambda model: model.train(), False),
    "plain number": (lambda model: setattr(model, "twice", True), True),
    "function": (lambda model: setattr(model, "act", torch.sigmoid), True),
    "use that no rule sees": (lambda model: setattr(model, "hidden", True), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_never_becomes_stale(change: str) -> None:
    model, posterior, x = fitted()
    posterior.predict(x[:3], method="linearized")
    alter, again = CHANGES[change]
    alter(model)
    assert checked(posterior, x[:3]) == again
    model.load_state_dict(posterior.mean, strict=False)
    found = posterior.predict(x[:3], method="linearized").epistemic_variance
    torch.testing.assert_close(found, oracle(model.eval(), posterior, x[:3]))


def test_a_replaced_layer_is_checked_again() -> None:
    model, posterior, x = fitted()
    posterior.predict(x[:3], method="linearized")
    model.second = nn.Bilinear(4, 4, 2).double()
    with pytest.raises(lk.errors.LaplaceKFError):
        posterior.predict(x[:3], method="linearized")
    other = nn.Linear(4, 2).double()
    model.second = other
    assert not checked(posterior, x[:3]), "another layer of the same kind is used in the same way"
    model.load_state_dict(posterior.mean, strict=False)
    found = posterior.predict(x[:3], method="linearized").epistemic_variance
    torch.testing.assert_close(found, oracle(model, posterior, x[:3]))


def test_gradients_that_vanish_are_no_proof() -> None:
    """A network whose outputs do not depend on a weight at these inputs shows nothing about its rule."""

    class Own(nn.Sequential):
        """Not torch's own class, whose rules need no check."""

    torch.manual_seed(0)
    model = Own(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.rand(5, 3).double()
    model[0].bias.data.fill_(-1e9)
    posterior = lk.LaplacePosterior(model, "gaussian").fit((x, torch.randn(5, 2).double()))
    assert checked(posterior, x[:3])
    assert checked(posterior, x[:3])


@pytest.mark.parametrize(("count", "passes"), [(3, 1), (20, 1), (2000, 3)])
def test_few_inputs_take_one_pass_over_the_network(count: int, passes: int) -> None:
    _, posterior, x = fitted()
    x = x[torch.arange(count) % len(x)]
    posterior.predict(x, method="linearized")
    with counted(Net, "forward") as calls:
        found = posterior.predict(x, method="linearized").epistemic_variance
    assert calls[0] >= passes if passes > 1 else calls[0] == 1
    torch.testing.assert_close(found[:5], posterior.predict(x[:5], method="linearized").epistemic_variance[:5])


def test_a_last_layer_takes_one_pass_over_the_backbone_and_none_over_itself() -> None:
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(5, 3).double()
    posterior = lk.LaplacePosterior(model, "gaussian", parameters="last_layer").fit((x, torch.randn(5, 2).double()))
    posterior.predict(x, method="linearized")
    with counted(Net, "forward") as passes, counted(Observation, "signals") as signals:
        found = posterior.predict(x, method="linearized")
    assert (passes[0], signals[0]) == (1, 0)
    with torch.no_grad():
        h = torch.tanh(model.norm(model.first(x)))
    row = torch.cat([torch.kron(torch.eye(2).double(), h[0][None]), torch.eye(2).double()], 1)
    wanted = (row @ torch.linalg.inv(posterior.precision.dense()) @ row.T).diagonal()
    torch.testing.assert_close(found.epistemic_variance[0], wanted)


def states() -> tuple[Any, ...]:
    kind, key, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, key.tolist(), *rest), random.getstate()


def draw() -> None:
    torch.rand(3), np.random.rand(3), np.random.randn(3), random.random()


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_random_states_are_put_back(nested: int) -> None:
    draw()
    before = states()
    with same_random_states():
        draw()
        if nested:
            inner = states()
            with same_random_states():
                if nested == 2:
                    draw()
            after = states()
            assert after[0] == inner[0]
            assert after[1][1:3] == inner[1][1:3]
            assert after[2] == inner[2]
        draw()
    assert states() == before


def test_torch_moves_on_where_only_foreign_states_are_kept() -> None:
    before = states()
    with same_foreign_states():
        draw()
    after = states()
    assert after[1:] == before[1:]
    assert after[0] != before[0]


def test_other_generators_of_numpy_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "get_bit_generator", lambda: None, raising=False)
    before = states()
    with same_random_states(), same_random_states():
        draw()
    assert states() == before


def test_variances_of_one_output_take_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to those by runs and pairs of columns, which do not run."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(5, 3).double()
    posterior = lk.LaplacePosterior(model, "gaussian").fit((x, torch.randn(5, 1).double()))
    with monkeypatch.context() as slow:
        slow.setattr(quadratic, "WORKING", 1)
        wanted = posterior.functional_covariance(x)
    torch.testing.assert_close(wanted[..., 0], oracle(model, posterior, x), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(quadratic, "_runs", lambda *given: pytest.fail("by runs"))
    monkeypatch.setattr(quadratic, "_pairs", lambda *given: pytest.fail("by pairs"))
    torch.testing.assert_close(posterior.functional_covariance(x), wanted, rtol=1e-12, atol=1e-14)


def test_a_precision_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is positive; one that is not is refused every time, also after a good one."""
    _, posterior, x = fitted()
    first = posterior.predict(x, "linearized").mean
    with monkeypatch.context() as once:
        once.setattr(spectral, "require_positive", lambda *given: pytest.fail("looked at again"))
        torch.testing.assert_close(posterior.predict(x, "linearized").mean, first, rtol=0, atol=0)
    for bad in (0.0, float("nan"), float("inf"), -1.0):
        grid = torch.ones(1, 2, 3).index_fill(2, torch.tensor(1), bad)
        matrix = spectral.Spectral(spectral.Basis.identity(), spectral.Basis.identity(), grid, "bad")
        for _ in range(2):
            with pytest.raises(lk.errors.NotPositiveDefinite):
                matrix.require_positive()


class Shrinking(nn.Module):
    """Writes into its weights whenever it is called, as weight clipping in ``forward`` does, once it begins to."""

    def __init__(self) -> None:
        super().__init__()
        self.shrinks = False  # a fit refuses it by name
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.shrinks:
            with torch.no_grad():
                self.first.weight.mul_(0.9)
                self.second.weight.mul_(0.9)
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("parameters", ["all", "last_layer"])
@pytest.mark.parametrize("method", ["mc", "linearized", "map", "probit"])
def test_a_prediction_never_writes_into_the_posterior(method: str, parameters: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    posterior = lk.LaplacePosterior(Shrinking().double(), "categorical", parameters=parameters).fit((x, y))
    posterior.model.shrinks = True
    before = {name: value.clone() for name, value in posterior.mean.items()}
    posterior.predict(x, method, generator=torch.Generator().manual_seed(0))
    for name, value in posterior.mean.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_only_a_sequence_reads_the_mean_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    copied, plain = [], Fitted.mean_by_name
    monkeypatch.setattr(
        Fitted,
        "mean_by_name",
        lambda self, copy=True: copied.append(copy) or plain(self, copy),  # type: ignore[func-returns-value]
    )
    for model in (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), Net().double().eval()):
        posterior = lk.LaplacePosterior(model, "gaussian").fit((x, y))
        copied.clear()
        posterior.predict(x, "linearized")
        assert copied[0] is isinstance(model, Net)
