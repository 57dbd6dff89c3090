"""Task sequences and optimisers that are stopped go on with the same numbers, bit for bit.

Stops between the steps of a task are in tests/continual/test_resume.py; here are those inside ``after_task``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import continual, files
from tests import oracles
from tests.cases import rng
from tests.continual.problems import moved, network, task
from tests.optim import reference as ref
from tests.resuming.test_fits import Deadly, Experts, Killed, made

LEARNERS: dict[str, Callable[[nn.Module], continual.Learner]] = {
    "online": lambda m: continual.OnlineLaplace(m, "categorical", estimator="sampled"),
    "non-online": lambda m: continual.NonOnlineLaplace(m, "categorical", structure="ekfac", estimator="sampled"),
    "ewc": lambda m: continual.EWC(m, "categorical"),
    "si": lambda m: continual.SynapticIntelligence(m, "categorical"),
}


def batches(k: int) -> list[Any]:
    x, y = task(k)
    return [(x[:5], y[:5]), (x[5:9], y[5:9]), (x[9:], y[9:])]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


def after_two(name: str, path: Path | None, kill: int | None = None) -> Tensor:
    """The penalty after two tasks; the process ends after ``kill`` minibatches of the second ``after_task``."""
    model = network()
    learner, generator = LEARNERS[name](model), rng(5)
    learner.after_task(batches(0), generator=generator)
    moved(model, 1)
    data: Any = batches(1) if kill is None else Deadly(batches(1), kill)
    learner.after_task(data, generator=generator, checkpoint=path, every=1)
    moved(model, 2)
    return learner.penalty().detach()


@pytest.mark.parametrize("name", LEARNERS)
def test_stopped_in_after_task(name: str, tmp_path: Path) -> None:
    whole, path = after_two(name, None), tmp_path / "task"
    if name == "si":  # which does not go over the data
        assert torch.equal(after_two(name, path), whole)
        return
    for kill in (1, 2):
        with pytest.raises(Killed):
            after_two(name, path, kill)
        assert list(tmp_path.iterdir())
        assert torch.equal(after_two(name, path), whole)
        assert not list(tmp_path.iterdir())


def test_a_failed_task_leaves_the_generator(tmp_path: Path) -> None:
    learner, generator = LEARNERS["non-online"](network()), rng(5)
    learner.after_task(batches(0), generator=generator)
    before = generator.get_state()
    with pytest.raises(Killed):
        learner.after_task(Deadly(batches(1), 2), generator=generator, checkpoint=tmp_path / "task", every=1)
    assert learner.tasks == 1 and torch.equal(generator.get_state(), before)
    learner.after_task(batches(1), generator=generator, checkpoint=tmp_path / "task")
    assert learner.tasks == 2


# ------------------------------------------------------------------------------------------------ optimisers

Maker = Callable[..., Any]
OPTIMIZERS: dict[str, Maker] = {
    "kfac": lambda m, **k: lk.optim.kfac(m, "categorical", refresh=3, **k),
    "tridiagonal": lambda m, **k: lk.optim.kfac(m, "categorical", inverse="block_tridiagonal", averaging=0.9, **k),
    "kfra-low-rank": lambda m, **k: lk.optim.kfra(m, "categorical", damping="factored", low_rank=True, l2=0.0, **k),
    "kflr": lambda m, **k: lk.optim.kflr(m, "categorical", momentum=True, search_start=True, **k),
    "ekfac": lambda m, **k: lk.optim.ekfac(m, "categorical", refresh=4, ema=0.9, **k),
    "sampled-part": lambda m, **k: lk.optim.GaussNewton(
        m, "categorical", estimator="sampled", samples=2, curvature_fraction=(0.5, 0.25), adapt_zeta=True, **k
    ),
    "hessian-free": lambda m, **k: lk.optim.hessian_free(m, "categorical", averaging=0.9, **k),
    "hessian-free-kron": lambda m, **k: lk.optim.hessian_free(
        m, "categorical", preconditioner="kronecker", ema=0.9, refresh=2, **k
    ),
}
STEPS = 7


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(260 if step % 2 else 300, 4, generator=rng(step))
    return x, (x @ torch.randn(4, 3, generator=rng(9))).argmax(1)


def net() -> nn.Module:
    return ref.net([4, 6, 3]).float()


def stepped(opt: Any, scheduler: Any, steps: range) -> list[tuple[float, str]]:
    found = []
    for step in steps:
        found.append((float(opt.step(*batch(step))), repr(opt.diagnostics)))
        scheduler.step()
    return found


def scheduled(make: Maker, model: nn.Module, seed: int) -> tuple[Any, Any]:
    opt = make(model, generator=rng(seed))
    return opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_stopped_after_any_step(name: str) -> None:
    model = net()
    opt, scheduler = scheduled(OPTIMIZERS[name], model, 1)
    files_of, told = [], []
    for step in range(STEPS):
        buffer = io.BytesIO()
        parts = {"model": model, "opt": opt, "scheduler": scheduler}
        torch.save({key: part.state_dict() for key, part in parts.items()}, buffer)
        files_of.append(buffer.getvalue())
        told += stepped(opt, scheduler, range(step, step + 1))
    for step in range(1, STEPS, 2):
        state = torch.load(io.BytesIO(files_of[step]), weights_only=True)
        other = net()
        with torch.no_grad():
            other[0].weight += 1  # type: ignore[index, operator]
        again, schedule = scheduled(OPTIMIZERS[name], other, 2)
        for key, part in {"model": other, "opt": again, "scheduler": schedule}.items():
            part.load_state_dict(state[key])
        assert stepped(again, schedule, range(step, STEPS)) == told[step:]
        assert torch.equal(oracles.flat_parameters(other), oracles.flat_parameters(model))
        assert repr(again.state_dict()["second_order"]) == repr(opt.state_dict()["second_order"])
        if opt.averaging is not None:
            mine, theirs = again.averaged_parameters(), opt.averaged_parameters()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_layers_that_only_some_minibatches_reach() -> None:
    """What the tape knows of a model is not in the state: it is learnt anew, also where a branch is met late."""

    def tokens(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 7 if step % 3 == 1 else 4, (12, 5), generator=rng(step))
        return x, torch.randint(0, 3, (12,), generator=rng(50 + step))

    def make(model: nn.Module, seed: int) -> Any:
        return lk.optim.kflr(model, "categorical", unused="prior", generator=rng(seed))

    model = made(Experts)
    opt, states = make(model, 1), []
    for step in range(6):
        states.append(({k: v.clone() for k, v in model.state_dict().items()}, io.BytesIO()))
        torch.save(opt.state_dict(), states[-1][1])
        opt.step(*tokens(step))
    for step in (1, 2, 3, 5):
        other = made(Experts)
        again = make(other, 2)
        other.load_state_dict(states[step][0])
        states[step][1].seek(0)
        again.load_state_dict(torch.load(states[step][1], weights_only=True))
        for k in range(step, 6):
            again.step(*tokens(k))
        assert torch.equal(oracles.flat_parameters(other), oracles.flat_parameters(model)), step
