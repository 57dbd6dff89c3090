"""Steps that would ruin the loss of their own minibatch, steps that fail half-way, and arguments out of range."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import LaplaceKFError, NotPositiveDefinite
from laplace_kf.optim.base import RETRIES
from tests.cases import rng
from tests.checks import of_every
from tests.optim import reference as ref
from tests.optim.test_citizen import MAKERS


def relu_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))


def data(n: int = 256) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        relu_net()
        return torch.randn(n, 10), torch.randint(0, 5, (n,))


def objective(model: nn.Module, x: Tensor, y: Tensor, l2: float) -> float:
    with torch.no_grad():
        square = sum(float(p.double().square().sum()) for p in model.parameters())
        return float(F.cross_entropy(model(x).double(), y)) + l2 / 2 * square


@pytest.mark.share(2)
@pytest.mark.parametrize(("size", "damping"), [(64, 1e-4), (256, 1e-8)])  # of 256, K-FAC looks at 128
@pytest.mark.parametrize("name", MAKERS)
def test_no_step_ruins_its_own_minibatch(name: str, size: int, damping: float) -> None:
    model, (x, y) = relu_net(), data()
    more = {} if name == "natural-gradient" or (name == "hessian-free") else {"zeta": damping}
    opt = MAKERS[name](model, tau=damping, generator=rng(), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(4 if name.startswith("hessian-free") else 7):
            rows = slice(size * (step % (256 // size)), size * (step % (256 // size)) + size)
            before = objective(model, x[rows], y[rows], opt.l2)
            opt.step(x[rows], y[rows])
            # 0.5 of the mean loss; rounding
            assert objective(model, x[rows], y[rows], opt.l2) <= 1.5 * before * (1 + 1e-5)
    assert math.isfinite(objective(model, x, y, 0.0))


def test_refused_steps_are_counted_said_and_damped() -> None:
    model, (x, y) = relu_net(), data(64)
    opt = lk.optim.ekfac(model, "categorical", tau=1e-5, zeta=1e-5, generator=rng())
    with pytest.warns(RuntimeWarning, match=r"step 1: \d update\(s\) with a loss that rose too much") as caught:
        opt.step(x, y)
    assert caught[0].filename == __file__
    refused = opt.diagnostics["rejected"]
    assert refused >= 1
    damping = opt.diagnostics["tau"]
    assert damping == pytest.approx(1e-5 * 10**refused) == opt.diagnostics["zeta"]
    free, other = relu_net(), relu_net()
    before = objective(free, x, y, 0.0)
    lk.optim.ekfac(free, "categorical", tau=1e-5, zeta=1e-5, generator=rng(), max_rise=math.inf).step(x, y)
    assert objective(free, x, y, 0.0) > 1.5 * before
    # the step that was made in the end is the one of that damping
    lk.optim.ekfac(other, "categorical", tau=damping, zeta=damping, generator=rng()).step(x, y)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MAKERS if n.startswith(("kfac", "kflr", "diag", "ekfac"))])
def test_hopeless_steps_keep_the_weights(name: str) -> None:
    """A wall around the start: whatever the damping, the loss is a hundred times as high elsewhere."""

    class Wall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            wrong = 300 * torch.tensor([-1.0, 1.0, 0.0])
            return torch.where(self.linear.weight.detach().abs().max() == 0, z, z + wrong)

    model = Wall()
    opt = MAKERS[name](model, parameters="all")
    with pytest.warns(RuntimeWarning, match="unchanged"):
        opt.step(torch.randn(10, 2, generator=rng()), torch.zeros(10).long())
    assert float(model.linear.weight.detach().abs().max()) == 0.0
    assert opt.diagnostics["rejected"] == RETRIES + 1


def passes(opt: Any, model: nn.Module, x: Tensor, y: Tensor) -> list[int]:
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    opt.step(x, y)
    handle.remove()
    return seen


def heard() -> nn.Module:
    """A network that is listened to from the first step on, so that all steps find it in the same way."""
    model = relu_net()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def test_looking_costs_no_pass_unless_the_loss_rose() -> None:
    x, y = data()
    for name, expected in {"kfac": [256, 128], "kflr": [256, 256]}.items():
        model = heard()
        opt = MAKERS[name](model, tau=1.0, generator=rng())
        opt.step(x, y)
        assert passes(opt, model, x, y) == expected  # the gradient's, and one that looks
    model = heard()
    opt = MAKERS["kfac"](model, tau=1.0, generator=rng())
    for _ in range(4):
        opt.step(x, y)
    assert passes(opt, model, x, y) == [256, 256]  # step 5 needs all examples for ρ, and the rule uses them
    assert not math.isnan(opt.diagnostics["rho"])
    model = heard()  # hessian-free: the line search knows the loss after the step
    opt = lk.optim.natural_gradient(model, "categorical", steps=3, tau=10.0)
    opt.step(x, y)
    assert passes(opt, model, x, y) == [256] * 3  # the gradient's, that of the products, the search


def test_where_a_part_rose_all_examples_decide() -> None:
    model, (x, y) = relu_net(), data()
    opt = MAKERS["kfac"](model, tau=1.0, generator=rng())
    opt.step(x, y)
    seen: list[int] = []
    real = opt.objective.loss

    def loss(batches: Any, weights: Any) -> float:
        seen.append(sum(b.count for b in batches))
        return real(batches, weights) + (10.0 if seen[-1] == 128 else 0.0)

    opt.objective.loss = loss
    opt.step(x, y)
    assert seen == [128, 256] and opt.diagnostics["rejected"] == 0


# ------------------------------------------------------------------------------------------------ half-made steps


class Odd(nn.Module):
    """Dropout, batch statistics and a switch that makes it fail after a number of passes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("the model fails")
        return self.two(F.dropout(torch.tanh(self.norm(self.one(x))), 0.2, self.training))


def everything(model: nn.Module, opt: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "opt": opt.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "rng": torch.get_rng_state(),
            "modes": [m.training for m in model.modules()],
        }
    )


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(v, two[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(equal(a, b) for a, b in zip(one, two, strict=True))
    return one == two or (isinstance(one, float) and math.isnan(one) and math.isnan(two))


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "kfra"])  # not a chain
def test_a_step_that_fails_anywhere_changes_nothing(name: str) -> None:
    """The model fails at its first, second, third ... pass of a step, until a step needs no more passes.

    Of the many products of conjugate gradients that follow, at every fourth.
    """
    torch.manual_seed(0)
    model = Odd().train()
    more = {"groups": [{"params": "two.bias", "first_order": True, "lr": 0.1, "momentum": 0.9}]}
    opt = MAKERS[name](model, generator=rng(), averaging=0.9, **more)
    x, y = torch.randn(60, 4, generator=rng()), torch.randint(0, 3, (60,), generator=rng())
    for _ in range(4):  # the next one adapts
        opt.step(x, y)
    for allowed in [*range(20), *range(20, 400, 4)]:
        before = everything(model, opt)
        model.left = allowed
        try:
            opt.step(x, y)
            break
        except ArithmeticError:
            model.left = 10**9
            assert equal(everything(model, opt), before), allowed
    assert 1 < allowed < 396


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kflr", "hessian-free-kronecker"])
def test_factorisations_that_fail_come_out_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ref.net([4, 6, 3])
    opt = MAKERS[name](model, generator=rng())
    x, y = ref.batch(20, 4, 3)
    opt.step(x, y)
    before = everything(model, opt)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    for solver in ("eigh", "cholesky_ex", "solve"):
        monkeypatch.setattr(torch.linalg, solver, fails)
    for refresh in range(4):
        opt.refresh = 1
        if hasattr(opt, "running"):
            opt.running.refresh = 1
        with pytest.raises(NotPositiveDefinite, match="zeta"):
            opt.step(x, y)
        assert equal(everything(model, opt), before), refresh


@pytest.mark.parametrize("name", ["kflr", "ekfac", "diagonal"])
def test_singular_blocks_name_the_knobs(name: str) -> None:
    """Units that are off for every example, no damping at all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias[:3] = -1e3
    opt = MAKERS[name](model, zeta=0.0, l2=0.0)
    before = everything(model, opt)
    with pytest.raises(NotPositiveDefinite, match=r"block '[02].*zeta.*l2"):
        opt.step(*ref.batch(20, 4, 3))
    assert equal(everything(model, opt), before)


@pytest.mark.parametrize("name", ["kfac", "kfra"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_singular_factors_are_refused_or_their_jitter_is_said(name: str) -> None:
    """Factors damped one by one: a jitter of 1e-8 with a warning (methods 5.2), a dead layer is refused."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].bias[:] = -1e3
    opt = MAKERS[name](model, zeta=0.0, l2=0.0)
    with pytest.raises(NotPositiveDefinite, match=r"block '[02].*zeta.*l2"):
        opt.step(*ref.batch(20, 4, 3))
    with torch.no_grad():
        model[0].bias[3:] = 0.5
    with pytest.warns(RuntimeWarning, match="jitter"):
        MAKERS[name](model, zeta=0.0, l2=0.0, max_rise=math.inf).step(*ref.batch(20, 4, 3))


def test_minibatches_before_one_that_fails_in_the_curvature_are_dropped() -> None:
    model = ref.net([4, 6, 3])
    opt = MAKERS["kflr"](model)
    opt.backward(*ref.batch(20, 4, 3))
    real = opt._measure

    def fails(*args: Any) -> None:
        real(*args)
        raise ArithmeticError("half-way")

    opt._measure = fails
    with pytest.raises(ArithmeticError):
        opt.backward(*ref.batch(20, 4, 3))
    with pytest.raises(lk.errors.NotFitted):
        opt.step()


WRONG: list[dict[str, Any]] = [
    {what: value}
    for what in ("l2", "lr", "tau")
    for value in (-1, math.nan, math.inf, "1")
] + [
    {"averaging": -0.1}, {"averaging": math.nan}, {"averaging": 2}, {"max_rise": -1.0}, {"max_rise": math.nan},
    {"curvature_fraction": 0.0}, {"curvature_fraction": math.nan}, {"curvature_fraction": 1.5},
]  # fmt: skip
FACTORS: list[dict[str, Any]] = [
    {"zeta": -1}, {"zeta": math.nan}, {"zeta": math.inf}, {"ema": 1.0}, {"ema": -0.1}, {"ema": math.nan},
    {"refresh": 0}, {"refresh": 1.5}, {"refresh": math.nan}, {"refresh": True},
]  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_wrong_arguments_are_refused_at_construction(name: str) -> None:
    def case(wrong: dict[str, Any]) -> None:
        with pytest.raises(LaplaceKFError, match=next(iter(wrong))):
            lk_make(name)(ref.net([4, 3]), "categorical", **wrong)

    of_every(case, [*WRONG, *FACTORS])


def lk_make(name: str) -> Any:
    key = name.split("-kron")[0].split("-tri")[0].replace("-", "_")
    return getattr(lk.optim, key)


@pytest.mark.parametrize("samples", [0, -1, 1.5, math.nan, "2", True])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "diagonal", "hessian-free-kronecker"])
def test_wrong_numbers_of_samples(name: str, samples: Any) -> None:
    more = {"preconditioner": "kronecker"} if "hessian" in name else {}
    with pytest.raises(LaplaceKFError, match="samples"):
        lk_make(name)(ref.net([4, 3]), "categorical", samples=samples, **more)


@pytest.mark.parametrize(
    "wrong", [{"trust_radius": 0.0}, {"trust_radius": math.nan}, {"structural_damping": -1.0}], ids=str
)
def test_wrong_arguments_of_hessian_free(wrong: dict[str, Any]) -> None:
    with pytest.raises(LaplaceKFError, match=next(iter(wrong))):
        lk.optim.hessian_free(ref.net([4, 3]), "categorical", **wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 2.5}, {"tolerance": -1.0}, {"tolerance": math.nan}], ids=str)
def test_wrong_arguments_of_the_natural_gradient(wrong: dict[str, Any]) -> None:
    with pytest.raises(LaplaceKFError, match=next(iter(wrong))):
        lk.optim.natural_gradient(ref.net([4, 3]), "categorical", **wrong)
