"""The optimisers as PyTorch users meet them: groups, schedulers, checkpoints, clipping, accumulation, every layer."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NonFinite, NotFitted, ShapeMismatch, UnknownName, UnsupportedLayer
from tests import oracles
from tests.cases import CASES, rng
from tests.optim import reference as ref

MAKERS: dict[str, Any] = {
    "kfac": lambda m, **k: lk.optim.kfac(m, "categorical", **k),
    "kfac-tridiagonal": lambda m, **k: lk.optim.kfac(m, "categorical", inverse="block_tridiagonal", refresh=3, **k),
    "kfra": lambda m, **k: lk.optim.kfra(m, "categorical", averaging=0.95, **k),
    "kflr": lambda m, **k: lk.optim.kflr(m, "categorical", damping="exact", **k),
    "diagonal": lambda m, **k: lk.optim.diagonal(m, "categorical", **k),
    "ekfac": lambda m, **k: lk.optim.ekfac(m, "categorical", **{"refresh": 4, **k}),
    "natural-gradient": lambda m, **k: lk.optim.natural_gradient(m, "categorical", **k),
    "hessian-free": lambda m, **k: lk.optim.hessian_free(m, "categorical", **k),
    "hessian-free-kronecker": lambda m, **k: lk.optim.hessian_free(
        m, "categorical", preconditioner="kronecker", ema=0.9, refresh=4, **k
    ),
}


def big(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=rng(seed))
    return x, (x @ torch.randn(4, 3, generator=rng(9))).argmax(1)


def small_net() -> nn.Sequential:
    return ref.net([4, 6, 3]).float()


@pytest.mark.parametrize("name", MAKERS)
def test_state_reproduces_the_next_steps_bit_for_bit(name: str) -> None:
    model = small_net()
    opt = MAKERS[name](model, generator=rng())
    for seed in range(6):
        opt.step(*big(seed=seed))
    buffer = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = small_net()
    other.load_state_dict(saved["model"])
    again = MAKERS[name](other, generator=rng(77))
    again.load_state_dict(saved["opt"])
    assert again.diagnostics == opt.diagnostics or any(math.isnan(v) for v in opt.diagnostics.values())
    for seed in range(6, 9):
        assert torch.equal(opt.step(*big(seed=seed)), again.step(*big(seed=seed)))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_loading_the_state_of_another_optimiser_is_refused() -> None:
    model = small_net()
    with pytest.raises(ShapeMismatch, match="second_order"):
        MAKERS["kfac"](model).load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_same_generator_same_run_and_the_callers_numbers_stay() -> None:
    runs = []
    for _ in range(2):
        model = small_net()
        opt = MAKERS["kfac"](model, generator=rng(3))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for seed in range(3):
            opt.step(*big(seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(oracles.flat_parameters(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", ["kflr", "hessian-free"])  # the others draw, or are not additive over examples
def test_accumulated_minibatches_are_one_minibatch(name: str) -> None:
    found = []
    for cut in ((0, 60), (0, 25, 60)):
        model = ref.net([4, 6, 3])
        opt = MAKERS[name](model, generator=rng())
        x, y = (t.double() if t.is_floating_point() else t for t in big(60))
        opt.zero_grad()
        for start, stop in itertools.pairwise(cut):
            loss = opt.backward(x[start:stop], y[start:stop])
        assert torch.allclose(loss, opt.step().to(loss))
        found.append(oracles.flat_parameters(model))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


def test_a_step_on_a_minibatch_drops_those_that_were_taken_in_before() -> None:
    x, y = (t.double() if t.is_floating_point() else t for t in big(30))
    found = []
    for before in (False, True):
        model = ref.net([4, 6, 3])
        opt = lk.optim.kflr(model, "categorical", l2=0.1)
        if before:
            opt.backward(x.flip(0) + 1, y)
        found.append((float(opt.step(x, y)), oracles.flat_parameters(model)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("low_rank", [False, True])
def test_gradients_that_are_clipped_before_the_first_step_are_used(low_rank: bool) -> None:
    """Also where the factors of a gradient are at hand: they are those of the gradient as it was."""
    x, y = (t.double() if t.is_floating_point() else t for t in big(4))
    moved = []
    for scale in (1.0, 0.25):
        model = ref.net([4, 40, 40, 3])
        theta = oracles.flat_parameters(model)
        opt = lk.optim.kflr(model, "categorical", l2=0.0, adapt_tau=False, adapt_zeta=False, low_rank=low_rank)
        opt.backward(x, y)
        for p in model.parameters():
            p.grad.mul_(scale)
        opt.step()
        moved.append(oracles.flat_parameters(model) - theta)
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-7, atol=1e-12)


def test_gradient_of_the_regularised_loss_and_clipping() -> None:
    model = ref.net([4, 6, 3])
    x, y = (t.double() if t.is_floating_point() else t for t in big(30))
    opt = lk.optim.kflr(model, "categorical", l2=0.1, adapt_tau=False, adapt_zeta=False)
    loss = opt.backward(x, y)
    theta = oracles.flat_parameters(model)
    expected = ref.gradient(model, x, y, oracles.categorical_nll) + 0.1 * theta
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(found, expected)
    assert float(loss) == pytest.approx(
        ref.mean_nll(model, x, y, oracles.categorical_nll) + 0.05 * float(theta @ theta)
    )
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    clipped = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    opt.step()
    moved = oracles.flat_parameters(model) - theta
    other = ref.net([4, 6, 3])
    plain = lk.optim.kflr(other, "categorical", l2=0.1, adapt_tau=False, adapt_zeta=False)
    plain.step(x, y)
    whole = oracles.flat_parameters(other) - theta
    # the direction is linear in the gradient, and so is the optimal step
    torch.testing.assert_close(moved, whole * float(clipped.norm() / expected.norm()), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["kfac", "hessian-free"])
def test_schedulers_and_learning_rates(name: str) -> None:
    x, y = big()
    model = small_net()
    opt = MAKERS[name](model, lr=0.5, generator=rng())
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    before = oracles.flat_parameters(model)
    opt.step(x, y)
    schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)
    half = oracles.flat_parameters(model) - before
    other = small_net()
    MAKERS[name](other, generator=rng()).step(x, y)
    torch.testing.assert_close(half, 0.5 * (oracles.flat_parameters(other) - before), rtol=1e-4, atol=1e-6)


def test_model_decrease_counts_learning_rates() -> None:
    """One rate for all, or one a group: the model is evaluated at the step that is made."""
    x, y = (t.double() if t.is_floating_point() else t for t in big(20))
    for groups, lr in (((), 0.5), (({"params": "0.*", "lr": 0.3},), 1.0)):
        model = ref.net([4, 3, 3])
        theta = oracles.flat_parameters(model)
        opt = lk.optim.kflr(model, "categorical", l2=0.1, tau=0.7, zeta=0.2, lr=lr, groups=groups)
        g = ref.gradient(model, x, y, oracles.categorical_nll) + 0.1 * theta
        c = oracles.dense_ggn(model, x, y, oracles.categorical_nll) + 0.8 * torch.eye(len(theta)).double()
        opt.step(x, y)
        delta = oracles.flat_parameters(model) - theta
        assert opt.diagnostics["model_decrease"] == pytest.approx(-float(g @ delta + 0.5 * delta @ c @ delta), rel=1e-7)


def test_first_order_groups_take_heavy_ball_steps() -> None:
    model = ref.net([4, 6, 3])
    x, y = (t.double() if t.is_floating_point() else t for t in big(20))
    group = {"params": ["0.*"], "first_order": True, "lr": 0.1, "momentum": 0.9}
    opt = lk.optim.kflr(model, "categorical", groups=[group], l2=0.0)
    assert opt.layout.names == ("2.weight", "2.bias")
    velocity = torch.zeros(4 * 6 + 6).double()
    for _ in range(3):
        theta = oracles.flat_parameters(model)
        g = ref.gradient(model, x, y, oracles.categorical_nll)[:30]
        opt.step(x, y)
        velocity = 0.9 * velocity - 0.1 * g
        moved = oracles.flat_parameters(model) - theta
        torch.testing.assert_close(moved[:30], velocity)
        assert float(moved[30:].abs().max()) > 0
    with pytest.raises(UnsupportedLayer, match="first_order"):
        lk.optim.kflr(model, "categorical", groups=[{"params": "*", "first_order": True}])
    with pytest.raises(UnknownName):
        lk.optim.kflr(model, "categorical", groups=[{"params": "nothing.*"}])


def test_frozen_and_left_out_parameters_stay() -> None:
    model = ref.net([4, 6, 3])
    model[0].bias.requires_grad_(False)
    kept = model[0].bias.clone(), model[2].bias.clone()
    opt = lk.optim.kflr(model, "categorical", parameters=["*.weight"])
    for _ in range(2):
        opt.step(*(t.double() if t.is_floating_point() else t for t in big(20)))
    assert torch.equal(model[0].bias, kept[0]) and torch.equal(model[2].bias, kept[1])


class Explosive(nn.Module):
    """Finite near where it starts, infinite a little further."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return torch.where(z.detach().abs() < 0.01, z, torch.inf)


@pytest.mark.parametrize("name", ["kfac", "kflr", "hessian-free"])
def test_steps_that_lose_finiteness_are_refused(name: str) -> None:
    model = Explosive()
    x, y = torch.randn(10, 2, generator=rng()).double(), torch.zeros(10).long()
    opt = MAKERS[name](model, tau=1e-6, l2=0.0)
    if name == "hessian-free":  # its line search backs off by itself
        before = float(opt.step(x, y))
        assert 0 < opt.diagnostics["alpha"] < 1
    else:
        with pytest.warns(RuntimeWarning, match=r"step 1: \d+ update.* refused; the damping is now tau = "):
            before = float(opt.step(x, y))
        assert opt.diagnostics["rejected"] >= 1 and opt.diagnostics["tau"] > 1e-6
        assert f"rejected {opt.diagnostics['rejected']}" in opt.progress()
    assert bool(torch.isfinite(model(x)).all())
    assert float(opt.step(x, y)) < before


def test_hopeless_steps_leave_the_weights_and_say_so() -> None:
    class Cliff(Explosive):
        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            return torch.where(z.detach() == 0, z, torch.inf)

    model = Cliff()
    x, y = torch.randn(10, 2, generator=rng()).double(), torch.zeros(10).long()
    opt = lk.optim.kflr(model, "categorical")
    with pytest.warns(RuntimeWarning, match="unchanged"):
        opt.step(x, y)
    assert float(model.linear.weight.detach().abs().max()) == 0.0
    assert opt.diagnostics["rejected"] > 5
    assert opt.diagnostics["tau"] == pytest.approx(10.0) == opt.diagnostics["zeta"]  # and not 13 times as much


def test_bad_minibatches_change_nothing() -> None:
    model = small_net()
    opt = MAKERS["kfac"](model)
    x, y = big(20)
    opt.step(x, y)
    before = oracles.flat_parameters(model), opt.diagnostics
    x[3, 1] = math.nan
    with pytest.raises(NonFinite):
        opt.step(x, y)
    with pytest.raises((ShapeMismatch, ValueError)):
        opt.step(big(20)[0], y[:5])
    with pytest.raises(NotFitted, match="minibatch"):
        opt.step()
    assert torch.equal(oracles.flat_parameters(model), before[0]) and opt.diagnostics == before[1]


@pytest.mark.share(2)
@pytest.mark.parametrize("case", list(CASES), ids=str)
def test_every_layer_takes_second_order_steps(case: Any) -> None:
    """All cases of the engine: losses go down and every trainable parameter moves."""
    problem = case.make()
    likelihood = problem.likelihood.build(lk)
    before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    has_gradient = _touched(problem)
    opt = lk.optim.kfac(
        problem.model, likelihood, estimator="exact", tau=1.0, generator=rng(), parameters=sorted(has_gradient)
    )
    losses = [float(opt.step(problem.batch())) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, p in problem.model.named_parameters():
        assert torch.equal(p.detach(), before[name]) is (name not in has_gradient), name


def _touched(problem: Any) -> set[str]:
    """Trainable parameters with a gradient that is not zero."""
    model, named = oracles.private(problem.model, None)
    z = oracles.call(model, problem.x)
    total = sum(problem.likelihood.nll(z[i : i + 1], problem.y[i : i + 1]) for i in range(problem.n))
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {n for n, g in zip(named, grads, strict=True) if g is not None and float(g.to_dense().abs().max()) > 1e-12}


class Moody(nn.Module):
    """Dropout and batch statistics: another function in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(torch.tanh(self.norm(self.one(x))), 0.2, self.training))


@pytest.mark.parametrize("name", ["kfac", "hessian-free"])
def test_training_mode_is_respected(name: str) -> None:
    torch.manual_seed(0)
    model = Moody().train()
    opt = MAKERS[name](model, generator=rng())
    x, y = big()
    for number in range(4):
        state = torch.get_rng_state()
        expected_model = copy.deepcopy(model)
        expected = F.cross_entropy(expected_model(x), y)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        loss = opt.step(x, y)
        l2 = opt.l2 / 2 * sum(float(p.detach().square().sum()) for p in expected_model.parameters())
        assert float(loss) == pytest.approx(float(expected) + l2, rel=1e-5)  # the same masks, batch statistics
        assert torch.equal(torch.get_rng_state(), after)  # one forward pass of random numbers, no more
        assert torch.equal(model.norm.running_mean, expected_model.norm.running_mean)
        assert int(model.norm.num_batches_tracked) == number + 1
    assert model.training and model.norm.training


def test_one_pass_is_shared_where_the_mode_does_not_matter() -> None:
    calls = []
    model = small_net()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    opt = MAKERS["kflr"](model, adapt_tau=False)
    for _ in range(3):
        opt.step(*big())
    calls.clear()
    opt.step(*big())
    assert len(calls) == 2  # gradient, factors and Jacobian product; the check of the new weights


def test_parts_of_the_minibatch_and_low_rank_gradients() -> None:
    model = small_net()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    MAKERS["kfac"](model, curvature_fraction=(0.7, 0.8), momentum=False).step(*big(200))
    assert seen.count(140) == 1  # the check of the new weights: the factors come from the gradient's own pass
    assert sorted(set(seen)) == [140, 200]  # and so do the exact products of 160
    for settings in ({"damping": "exact"}, {"inverse": "block_tridiagonal"}):
        with pytest.raises(IncompatiblePair, match="low_rank"):
            lk.optim.kflr(model, "categorical", **{"l2": 0.0, "low_rank": True, **settings})


def test_posterior_of_the_running_factors() -> None:
    model = ref.net([4, 6, 3])
    x, y = (t.double() if t.is_floating_point() else t for t in big(50))
    opt = lk.optim.kflr(model, "categorical", l2=0.01, ema=0.0, lr=0.0)
    with pytest.raises(NotFitted):
        opt.posterior(50)
    opt.step(x, y)
    posterior = opt.posterior(n_data=50)
    expected = lk.LaplacePosterior(model, "categorical", prior_precision=0.5).fit((x, y))
    torch.testing.assert_close(posterior.precision.dense(), expected.precision.dense())
    torch.testing.assert_close(posterior.log_evidence(), expected.log_evidence())
    linked = lk.optim.kflr(model, "categorical", inverse="block_tridiagonal", ema=0.0, lr=0.0)
    linked.step(x, y)
    other = linked.posterior(n_data=50, prior_precision=0.5)
    torch.testing.assert_close(other.precision.dense(), expected.precision.dense())
    assert other.predict(x[:3], generator=rng()).probs.shape == (3, 3)


def test_averages_of_iterates_and_of_factors() -> None:
    model = ref.net([4, 3])
    opt = lk.optim.kflr(model, "categorical", averaging=0.6, ema=0.6)
    with pytest.raises(NotFitted, match="averaging"):
        opt.averaged_parameters()
    average, factors = None, None
    for step in range(1, 6):
        x, y = ref.batch(8, 4, 3, step)
        (block,) = ref.kflr(oracles.categorical_nll)(model, x, y)
        opt.step(x, y)
        beta = min(1 - 1 / step, 0.6)
        now = oracles.flat_parameters(model)
        average = now if average is None else beta * average + (1 - beta) * now
        factors = block.A if factors is None else beta * factors + (1 - beta) * block.A
    found = torch.cat([v.reshape(-1) for v in opt.averaged_parameters().values()])
    torch.testing.assert_close(found, average)
    torch.testing.assert_close(opt.statistics.mean().entries[0][1].inputs[0], factors)


@pytest.mark.parametrize("name", ["kfac", "hessian-free-kronecker"])
def test_autocast_and_progress_line(name: str) -> None:
    model = small_net()
    opt = MAKERS[name](model, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(opt.step(*big())) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert opt.progress().startswith("step 5: ") and "rho" in opt.progress()


def test_defaults_of_the_damping() -> None:
    wide, narrow = ref.net([3, 120]), ref.net([3, 4])
    x = torch.randn(5, 3, generator=rng()).double()
    one, two = lk.optim.kfac(wide, "bernoulli"), lk.optim.kfac(narrow, "categorical")
    one.step(x, torch.rand(5, 120, generator=rng()).double())
    two.step(x, torch.zeros(5).long())
    assert (one.diagnostics["tau"], one.diagnostics["zeta"]) == (150.0, 150.0)
    assert (two.diagnostics["tau"], two.diagnostics["zeta"]) == (1.0, 1.0)
    assert set(one.diagnostics) == {"tau", "zeta", "alpha", "mu", "rho", "model_decrease", "rejected"}


def test_batch_size_schedule() -> None:
    """Methods 6.3: b = 166.6, 121.9, 107.6 for three data sets, all data at step 500."""
    for n, b in ((20000, 166.6), (60000, 121.9), (103500, 107.6)):
        assert lk.optim.batch_size(1, n) == 1000 and lk.optim.batch_size(500, n) == n == lk.optim.batch_size(9999, n)
        assert lk.optim.batch_size(101, n) == pytest.approx(1000 * math.exp(100 / b), rel=1e-3)
    assert lk.optim.batch_size(7, 500) == 500
    assert lk.optim.nesterov_momentum(0) == 0.5 and lk.optim.nesterov_momentum(250) == 0.75
    assert lk.optim.nesterov_momentum(10**6) == 0.99


def test_sparse_initialisation() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(10, 6))
    rnn = nn.RNN(20, 50)
    lk.optim.sparse_init_(model, generator=rng())
    lk.optim.sparse_init_(rnn, generator=rng())
    assert (model[0].weight != 0).sum(1).tolist() == [15] * 30 and float(model[0].bias.detach().abs().max()) == 0
    assert (model[1].weight != 0).sum(1).tolist() == [10] * 6
    assert (rnn.weight_hh_l0 != 0).sum(1).tolist() == [15] * 50
    values = rnn.weight_hh_l0[rnn.weight_hh_l0 != 0].detach()
    assert float(values.var()) == pytest.approx(1 / 15, rel=0.15)
    assert float(rnn.weight_ih_l0[rnn.weight_ih_l0 != 0].detach().var()) == pytest.approx(1.0, rel=0.15)
    assert float(rnn.bias_ih_l0.detach().abs().min()) > 0 == float(rnn.bias_hh_l0.detach().abs().max())


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 40)
        self.rnn, self.out = kind(40, 200, num_layers=2, bidirectional=True), nn.Linear(400, 300)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_sparse_initialisation_of_recurrent_models(kind: Any) -> None:
    """Methods 7.10: inputs N(0, scale²); recurrent and output matrices and biases N(0, 1/nonzero)."""
    model = Recurrent(kind)
    words = model.embedding.weight.clone()
    lk.optim.sparse_init_(model, nonzero=9, scale=3.0, generator=rng())
    assert torch.equal(model.embedding.weight, words)
    for name, p in [*model.rnn.named_parameters(), ("out", model.out.weight), ("bias", model.out.bias)]:
        p = p.detach()
        std = 3.0 if name.startswith("weight_ih_l0") else 1 / 3
        if name.startswith("bias_hh"):
            free = p[400:] if kind is nn.GRU else p[:0]
            assert float(p[: len(p) - len(free)].abs().max()) == 0.0
            assert not len(free) or float(free.abs().min()) > 0
            continue
        if p.dim() == 2:
            assert (p != 0).sum(1).tolist() == [9] * len(p), name
        assert float(p[p != 0].std()) == pytest.approx(std, rel=0.25), name


def test_sparse_initialisation_of_cells_and_attention() -> None:
    cell = nn.GRUCell(30, 50)
    lk.optim.sparse_init_(cell, nonzero=9, scale=3.0, generator=rng())
    assert float(cell.weight_ih[cell.weight_ih != 0].detach().std()) == pytest.approx(3.0, rel=0.1)
    assert float(cell.weight_hh[cell.weight_hh != 0].detach().std()) == pytest.approx(1 / 3, rel=0.1)
    attention = nn.MultiheadAttention(20, 2)
    nn.init.ones_(attention.in_proj_bias)
    lk.optim.sparse_init_(attention, generator=rng())
    assert float(attention.in_proj_bias.detach().abs().max()) == 0.0
    with pytest.raises(IncompatiblePair, match="nonzero"):
        lk.optim.sparse_init_(attention, nonzero=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_sparse_initialisation_of_convolutions(groups: int) -> None:
    """A unit is an output channel: seen by what one position of the input reaches, and counted by hand."""
    conv = nn.Conv2d(8, 6, 3, groups=groups)
    turned = nn.ConvTranspose2d(8, 6, 3, groups=groups)
    lk.optim.sparse_init_(nn.ModuleList([conv, turned]), generator=rng())
    assert (conv.weight.flatten(1) != 0).sum(1).tolist() == [15] * 6
    # output channel o of group g gets weight[g I/G : (g+1) I/G, o - g O/G]
    for channel in range(6):
        group, inside = divmod(channel, 6 // groups)
        rows = slice(group * 8 // groups, (group + 1) * 8 // groups)
        assert int((turned.weight[rows, inside] != 0).sum()) == 15
