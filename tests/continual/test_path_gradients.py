"""Synaptic Intelligence against a plain float64 loop, whatever happens to gradients before the step (methods 11.4)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.continual import SynapticIntelligence
from laplace_kf.errors import IncompatiblePair, NonFinite, ShapeMismatch, UnknownName

N, C, EPSILON = 12, 20.0, 1e-2
Weights = dict[str, Tensor]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def task(k: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(k)
    return torch.randn(N, 4, generator=rng, dtype=torch.float64), torch.randint(0, 3, (N,), generator=rng)


class Plain:
    """The definition: −Σ ∇L·Δθ with the gradient of the mean loss by ``torch.autograd.grad``, and its importances."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        self.model, self.importances = model, []
        self.begin()

    def begin(self) -> None:
        self.start = {n: w.detach().clone() for n, w in self.weights.items()}
        self.path = {n: torch.zeros_like(w) for n, w in self.weights.items()}

    def before(self, x: Tensor, y: Tensor) -> None:
        # of a copy, so that nothing of ours sees it
        twin = copy.deepcopy(self.model)
        grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        self.gradient = dict(zip(self.weights, grads, strict=True))
        self.at = {n: w.detach().clone() for n, w in self.weights.items()}

    def after(self) -> None:
        for n, w in self.weights.items():
            self.path[n] -= self.gradient[n] * (w.detach() - self.at[n])

    def finish(self) -> None:
        self.importances.append(
            {
                n: C * (self.path[n] / ((w.detach() - self.start[n]) ** 2 + EPSILON)).clamp_min(0)
                for n, w in self.weights.items()
            }
        )
        self.begin()


def groups(model: Any) -> Any:
    return torch.optim.SGD(
        [
            {"params": [model[0].weight, model[2].bias], "lr": 0.3, "weight_decay": 0.1},
            {"params": [model[0].bias, model[2].weight], "momentum": 0.9},
        ],
        lr=0.05,
    )


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.2),
    "decay": lambda m: torch.optim.SGD(m.parameters(), 0.2, weight_decay=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), 0.02),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.02, weight_decay=0.3),
    "groups": groups,
}


def noisy(m: nn.Module) -> None:
    for p in m.parameters():
        p.grad = p.grad * 0.3 + 0.01


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda m: None,
    "clip_norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    "clip_value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.02),
    "noise": noisy,
}


def follow(
    optimizer: str = "sgd",
    change: str = "nothing",
    *,
    recorded: bool = True,
    scale: float | None = None,
    pieces: int = 1,
    division: str = "none",
    set_to_none: bool = True,
    zero_before_after_step: bool = False,
    penalty: str = "loss",
    steps: int = 5,
) -> tuple[SynapticIntelligence, Plain]:
    """Two tasks of a training loop; ``division`` is "loss", "gradients" or "none"."""
    model = network()
    learner = SynapticIntelligence(model, "categorical", c=C, epsilon=EPSILON)
    plain, opt = Plain(model), OPTIMIZERS[optimizer](model)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    mark = learner.record if recorded else (lambda loss: loss)
    for k in range(2):
        x, y = task(k)
        for _ in range(steps):
            plain.before(x, y)
            opt.zero_grad(set_to_none=set_to_none)
            for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                loss = mark(F.cross_entropy(model(xs), ys))
                if penalty == "loss":
                    loss = loss + learner.penalty() / N
                if division == "loss":
                    loss = loss / pieces
                (scaler.scale(loss) if scaler else loss).backward()
            if penalty == "own pass":
                own = learner.penalty() / N
                (scaler.scale(own) if scaler else own).backward()
            if scaler:
                scaler.unscale_(opt)
            if division == "gradients":
                for p in model.parameters():
                    p.grad /= pieces
            CHANGES[change](model)
            if scaler:
                scaler.step(opt)
                scaler.update()
            else:
                opt.step()
            plain.after()
            if zero_before_after_step:
                opt.zero_grad(set_to_none=set_to_none)
            learner.after_step()
        learner.after_task((x, y))
        plain.finish()
    return learner, plain


def same(learner: SynapticIntelligence, plain: Plain, rtol: float = 1e-9) -> None:
    assert len(learner.anchors) == len(plain.importances) == 2
    for (found, _), expected in zip(learner.anchors, plain.importances, strict=True):
        for name, value in expected.items():
            assert float(value.abs().max()) > 0
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-13)


@pytest.mark.pairs(optimizer=OPTIMIZERS, change=CHANGES, scale=[None, 2.0**10, 3.7])
def test_recorded_losses_are_exact(optimizer: str, change: str, scale: float | None) -> None:
    same(*follow(optimizer, change, scale=scale))


@pytest.mark.pairs(
    division=["none", "loss", "gradients"], scale=[None, 2.0**10], change=["nothing", "clip_norm"],
    penalty=["loss", "own pass"],
)  # fmt: skip
def test_recorded_losses_of_several_minibatches(division: str, scale: float | None, change: str, penalty: str) -> None:
    """The gradient of the mean of their losses, however the loop divides."""
    same(*follow(change=change, pieces=3, division=division, scale=scale, penalty=penalty))


@pytest.mark.parametrize("zero_before_after_step", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zeroed_gradients(set_to_none: bool, zero_before_after_step: bool) -> None:
    more: dict[str, Any] = {"set_to_none": set_to_none, "zero_before_after_step": zero_before_after_step}
    same(*follow("momentum", "clip_norm", pieces=2, **more))
    if zero_before_after_step:
        with pytest.raises(IncompatiblePair, match="before zero_grad"):
            follow("momentum", recorded=False, **more)
    else:
        same(*follow("momentum", recorded=False, **more))


@pytest.mark.pairs(
    optimizer=[name for name in OPTIMIZERS if name != "nesterov"],
    divided=[("loss", "loss"), ("loss", "own pass"), ("gradients", "loss")],
    pieces=[1, 3],
)
def test_the_plain_loop_needs_no_record(optimizer: str, divided: tuple[str, str], pieces: int) -> None:
    division, penalty = divided
    same(*follow(optimizer, recorded=False, division=division, pieces=pieces, penalty=penalty))


@pytest.mark.parametrize(
    "given",
    [
        {"change": "clip_norm"},
        {"change": "clip_value"},
        {"change": "noise"},
        {"scale": 2.0**10},
        {"scale": 2.0**10, "change": "clip_norm"},
        {"scale": 3.7, "pieces": 3, "division": "loss"},
        {"pieces": 3, "division": "gradients", "change": "clip_norm"},
        {"pieces": 2, "division": "gradients", "scale": 8.0},
        {"optimizer": "nesterov"},  # foreach changes .grad in the step
    ],
    ids=str,
)
def test_without_record_changed_gradients_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(IncompatiblePair, match=r"loss = learner.record\(task_loss\) \+ learner.penalty\(\) / N_task"):
        follow(recorded=False, **given)


def test_a_clip_that_does_nothing_is_no_change() -> None:
    learner, plain = SynapticIntelligence(model := network(), "categorical", c=C, epsilon=EPSILON), Plain(model)
    opt, (x, y) = torch.optim.SGD(model.parameters(), 0.1), task(0)
    for _ in range(3):
        plain.before(x, y)
        opt.zero_grad()
        (F.cross_entropy(model(x), y) + learner.penalty() / N).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        opt.step()
        plain.after()
        learner.after_step()
    for name, value in plain.path.items():
        torch.testing.assert_close(learner._path[name], value)


def test_other_gradients_do_not_count() -> None:
    """Passes of ``torch.autograd.grad``, and passes whose gradients were zeroed before the step's own."""
    model = network()
    learner, plain = SynapticIntelligence(model, "categorical", c=C, epsilon=EPSILON), Plain(model)
    opt, (x, y) = torch.optim.SGD(model.parameters(), 0.1), task(0)
    for recorded in (False, True, False):
        plain.before(x, y)
        (7 * F.cross_entropy(model(x[:3]), y[:3]) + learner.penalty()).backward()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss = (learner.record(loss) if recorded else loss) + learner.penalty() / N
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        torch.autograd.grad(F.cross_entropy(model(x[:2]), y[:2]) + learner.penalty(), list(model.parameters()))
        opt.step()
        plain.after()
        learner.after_step()
    for name, value in plain.path.items():
        torch.testing.assert_close(learner._path[name], value)


def test_weights_by_which_minibatches_enter() -> None:
    model = network()
    learner = SynapticIntelligence(model, "categorical")
    opt, (x, y) = torch.optim.SGD(model.parameters(), 0.1), task(0)
    plain = Plain(model)
    plain.before(x, y)
    for rows in (slice(0, 9), slice(9, 12)):
        share = len(y[rows]) / len(y)
        (share * learner.record(F.cross_entropy(model(x[rows]), y[rows]))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()
    plain.after()
    learner.after_step()
    for name, value in plain.path.items():
        torch.testing.assert_close(learner._path[name], value)


@pytest.mark.parametrize("first", [False, True])
def test_hooks_that_clip_come_after_ours(first: bool) -> None:
    model = network()

    def clip() -> None:
        for p in model.parameters():
            p.register_hook(lambda g: g.clamp(-0.01, 0.01))

    if first:
        clip()
    learner, plain = SynapticIntelligence(model, "categorical"), Plain(model)
    if not first:
        clip()
    opt, (x, y) = torch.optim.SGD(model.parameters(), 0.1), task(0)
    plain.before(x, y)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    with pytest.raises(IncompatiblePair, match="changed"):
        learner.after_step()
    opt.zero_grad()
    learner._gradients.begin(learner._weights())
    plain.before(x, y)
    learner.record(F.cross_entropy(model(x), y)).backward()
    opt.step()
    plain.after()
    learner.after_step()
    for name, value in plain.path.items():
        torch.testing.assert_close(learner._path[name], value)


def test_closures() -> None:
    """One gradient a step is fine; several at different weights have no path and are refused, recorded or not."""
    x, y = task(0)
    for recorded, make in itertools.product(
        (False, True), (lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.LBFGS(p, max_iter=4))
    ):
        model = network()
        learner, plain, opt = SynapticIntelligence(model, "categorical"), Plain(model), make(model.parameters())

        def closure(recorded: bool = recorded, opt: Any = opt, learner: Any = learner, model: Any = model) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss = (learner.record(loss) if recorded else loss) + learner.penalty() / N
            loss.backward()
            return loss

        plain.before(x, y)
        opt.step(closure)
        plain.after()
        if isinstance(opt, torch.optim.LBFGS):
            with pytest.raises(IncompatiblePair, match="LBFGS"):
                learner.after_step()
            assert all(not bool(path.any()) for path in learner._path.values())
        else:
            learner.after_step()
            for name, value in plain.path.items():
                torch.testing.assert_close(learner._path[name], value)


def test_a_forgotten_after_step_is_refused() -> None:
    model = network()
    learner, opt, (x, y) = SynapticIntelligence(model, "categorical"), torch.optim.SGD(model.parameters(), 0.1), task(0)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    with pytest.raises(IncompatiblePair, match=r"after_step\(\) after every optimizer.step\(\)"):
        learner.after_step()


def test_gradients_given_by_name() -> None:
    """For loops that set ``.grad`` themselves; without them such gradients are refused."""
    model = network()
    learner, plain = SynapticIntelligence(model, "categorical"), Plain(model)
    opt, (x, y) = torch.optim.SGD(model.parameters(), 0.1), task(0)
    plain.before(x, y)
    for name, p in model.named_parameters():
        p.grad = 0.5 * plain.gradient[name]
    opt.step()
    plain.after()
    with pytest.raises(IncompatiblePair, match=r"learner.after_step\(gradients\)"):
        learner.after_step()
    with pytest.raises(UnknownName):
        learner.after_step({"3.weight": torch.zeros(3)})
    with pytest.raises(ShapeMismatch, match=r"\(5, 4\)"):
        learner.after_step({"0.weight": torch.zeros(3)})
    with pytest.raises(NonFinite, match=r"0\.weight"):
        learner.after_step({"0.weight": torch.full((5, 4), torch.nan)})
    learner.after_step(plain.gradient)
    for name, value in plain.path.items():
        torch.testing.assert_close(learner._path[name], value)


def test_what_record_refuses() -> None:
    model = network()
    learner, opt, (x, y) = SynapticIntelligence(model, "categorical"), torch.optim.SGD(model.parameters(), 0.1), task(0)
    for bad in (F.cross_entropy(model(x), y, reduction="none"), torch.zeros(()), 3.0):
        with pytest.raises(IncompatiblePair, match="0-dim"):
            learner.record(bad)  # type: ignore[arg-type]
    one, two = (F.cross_entropy(model(x[rows]), y[rows]) for rows in (slice(0, 5), slice(5, 12)))
    (learner.record(one) + learner.record(two)).backward()
    opt.step()
    with pytest.raises(IncompatiblePair, match="two recorded losses"):
        learner.after_step()
    opt.zero_grad()
    learner._gradients.begin(learner._weights())
    learner.record(F.cross_entropy(model(x), y)).backward()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    with pytest.raises(IncompatiblePair, match="not recorded"):
        learner.after_step()


def test_steps_that_a_scaler_skips_count_nothing() -> None:
    """A scale that overflows float32 gradients: the first steps are skipped, the others are exact."""
    model = network().float()
    learner, plain = SynapticIntelligence(model, "categorical"), Plain(model)
    opt, (x, y) = torch.optim.SGD(model.parameters(), 1e-4), task(0)
    scaler, skipped = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60), 0
    for _ in range(6):
        plain.before(x.float(), y)
        opt.zero_grad()
        scaler.scale(1e3 * learner.record(F.cross_entropy(model(x.float()), y))).backward()
        scaler.step(opt)
        scaler.update()
        skipped += all(torch.equal(w.detach(), plain.at[n]) for n, w in plain.weights.items())
        plain.after()
        learner.after_step()
    assert 0 < skipped < 6
    for name, value in plain.path.items():
        assert float(value.abs().max()) > 0
        torch.testing.assert_close(learner._path[name], value, rtol=1e-4, atol=1e-7)


def test_unused_and_sparse_parameters_and_checkpointed_layers() -> None:
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)
            self.out, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.words(x).mean(1)
            return self.out(torch.tanh(checkpoint(self.hidden, h, use_reentrant=True)))

    torch.manual_seed(0)
    model = Net().double()
    learner, plain = SynapticIntelligence(model, "categorical", c=C), Plain(model)
    plain.weights = {n: w for n, w in plain.weights.items() if not n.startswith("spare")}
    x, y = torch.randint(0, 9, (6, 2), generator=torch.Generator().manual_seed(1)), task(0)[1][:6]
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x), y).backward()
        plain.gradient = {n: p.grad.to_dense() for n, p in twin.named_parameters() if p.grad is not None}
        plain.at = {n: w.detach().clone() for n, w in plain.weights.items()}
        opt.zero_grad()
        (3 * learner.record(F.cross_entropy(model(x), y))).backward()
        opt.step()
        plain.after()
        learner.after_step()
    for name, value in plain.weights.items():
        assert value.grad is not None
        torch.testing.assert_close(learner._path[name], plain.path[name])


def test_hooks_live_as_long_as_the_learner() -> None:
    model = network()
    learner = SynapticIntelligence(model, "categorical")
    assert all(len(p._backward_hooks) == 1 for p in model.parameters())
    other = copy.deepcopy(learner)
    assert other._gradients.weights["0.bias"] is dict(other.model.named_parameters())["0.bias"]
    del learner
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())


def test_every_learner_takes_the_same_loop() -> None:
    for kind in (lk.continual.OnlineLaplace, lk.continual.EWC, lk.continual.FineTuning, lk.continual.JointTraining):
        learner = kind(network(), "categorical")
        loss = torch.ones((), requires_grad=True)
        assert learner.record(loss) is loss
        learner.after_step({})
