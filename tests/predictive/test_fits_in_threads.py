"""Fits, updates and passes over data from several threads use a model one after another; predictions do not wait."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.models import preserved
from laplace_kf.occupied import _TAKEN, alone
from tests.cases import labels, normal, rng
from tests.checks import close


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Net(nn.Module):
    """Dropout and batch statistics: any pass in training mode gives other numbers and moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.l = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.d(self.b(self.c(x)).relu()).mean(-1))


@pytest.mark.parametrize("plain", [False, True])
def test_fits_updates_and_predictions_of_one_model_at_once(plain: bool) -> None:
    torch.manual_seed(0)
    model: nn.Module = Net().double()
    x = normal(16, 2, 5, seed=1)
    if plain:  # torch's own modules alone take another path through the guard
        model, x = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double(), normal(16, 4)
    data = [(x[:8], labels(3, 8)), (x[8:], labels(3, 8, seed=1))]
    posterior = lk.LaplacePosterior(model, "categorical").fit(data)
    model.train()
    count = sum(p.numel() for p in model.parameters())
    jobs: dict[str, Callable[[], Tensor]] = {
        "fit": lambda: lk.LaplacePosterior(model, "categorical", "diag").fit(data).precision.diag(),
        "ekfac": lambda: lk.LaplacePosterior(model, "categorical", "ekfac").fit(data).precision.diag(),
        "update": lambda: posterior.update(data).precision.diag(),
        "product": lambda: lk.curvature.ggn_vector_product(model, "categorical", data, torch.ones(count).double()),
        "predict": lambda: posterior.predict(x, method="linearized", generator=rng(0)).probs,
        "covariance": lambda: posterior.functional_covariance(x),
    }
    right = {name: job() for name, job in jobs.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(6) as pool:
        for name, found in pool.map(lambda name: (name, jobs[name]()), [*jobs] * 4):
            close(found.detach(), right[name].detach())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not _TAKEN


def test_one_thread_waits_for_another_and_nests() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with alone(model), preserved(model), alone(model[0]):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second(what: nn.Module, name: str) -> None:
        inside.wait(10)
        with preserved(what):
            order.append(name)

    waiting = [threading.Thread(target=first), threading.Thread(target=second, args=(model[0], "its part"))]
    for thread in waiting:
        thread.start()
    free = threading.Thread(target=second, args=(other, "another"))
    free.start()
    free.join(10)
    assert order == ["another"]
    leave.set()
    for thread in waiting:
        thread.join(10)
    assert order == ["another", "first", "its part"] and not _TAKEN


def test_a_failure_frees_the_model() -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), preserved(model):
        _ = 1 / 0
    assert not _TAKEN
