"""Workers of a DataLoader that crash, and processes that are killed while they save."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

import laplace_kf as lk
from laplace_kf import files
from tests.cases import rng
from tests.faults.test_injected import same
from tests.posterior.test_golden import GOLDEN, network
from tests.test_unchanged import X, Y, assert_same, data, make, snapshot


class Crashing(Dataset[tuple[Tensor, Tensor]]):
    """One of its examples takes the process that asks for it away, or raises in it."""

    def __init__(self, dies: bool, at: int = 7) -> None:
        self.dies, self.at = dies, at

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory runs out
            raise ValueError("no such picture")
        return X[index], Y[index]


CALLS: dict[str, Callable[[lk.LaplacePosterior, Any], Any]] = {
    "fit": lambda p, loader: p.fit(loader, generator=rng(1)),
    "update": lambda p, loader: p.update(loader, generator=rng(1)),
    "tune": lambda p, loader: p.tune(loader, samples=3, generator=rng(1)),
    "predict": lambda p, loader: p.predict(loader, "probit"),
}


@pytest.fixture
def no_surprises(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch notices a dead worker when it waits for it, not by a signal, which raises in whatever line comes next."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", True)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def said(call: Callable[[], Any]) -> str:
    """The error of a call, of which nothing is kept: a traceback holds the loader's iterator, and that its workers."""
    try:
        call()
    except (RuntimeError, ValueError, ConnectionError) as error:  # or it was about to hand over an earlier minibatch
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks")
@pytest.mark.filterwarnings("ignore:no posterior tried")
@pytest.mark.parametrize("dies", [True, False], ids=["killed", "raises"])
@pytest.mark.parametrize("name", CALLS)
def test_a_worker_that_crashes_leaves_no_trace(name: str, dies: bool, no_surprises: None) -> None:
    posterior = lk.LaplacePosterior(make(), "categorical").fit(data(), generator=rng(0))
    before, packed, children = snapshot(posterior.model), posterior.packed(), multiprocessing.active_children()
    numbers = torch.get_rng_state()
    loader = DataLoader(Crashing(dies), batch_size=3, num_workers=1, multiprocessing_context="fork", generator=rng(6))
    ends = ("RuntimeError: DataLoader worker", "Connection") if dies else ("ValueError: ",)
    message = said(lambda: CALLS[name](posterior, loader))
    assert message.startswith(ends) and (dies or "no such picture" in message), message
    gc.collect()
    assert_same(before, snapshot(posterior.model))
    assert same(packed, posterior.packed())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert multiprocessing.active_children() == children
    CALLS[name](posterior, DataLoader(Crashing(dies, at=-1), batch_size=3))


def killed_saving(posterior: lk.LaplacePosterior, path: Path, stage: str) -> None:
    """Saves in a fork of this process that is killed before, halfway through or after a call of the stage."""
    name, _, when = stage.partition(" ")
    owner: Any = files if name == "save_file" else files.os
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> None:
        if when != "before":
            real(*args, **kwargs)
        if when == "half":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        setattr(owner, name, dying)
        try:
            posterior.save(path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.parametrize("there", [True, False], ids=["over a file", "new"])
@pytest.mark.parametrize(
    "stage",
    ["save_file before", "save_file half", "save_file after", "fsync before", "replace before", "replace after"],
)
def test_a_process_that_is_killed_while_it_saves(stage: str, there: bool, tmp_path: Path) -> None:
    """What stood there is there, whole; or the new file is. Never a part of one, and it can be saved again."""
    path = tmp_path / "posterior"
    old = lk.LaplacePosterior.load(GOLDEN / "0.1.0-diag", network())
    if there:
        old.save(path)
    kept = path.read_bytes() if there else b""
    new = lk.LaplacePosterior.load(GOLDEN / "0.1.0-kron", network())
    killed_saving(new, path, stage)
    if stage == "replace after":
        assert same(lk.LaplacePosterior.load(path, network()).packed(), new.packed())
    elif there:
        assert path.read_bytes() == kept
    else:
        with pytest.raises(lk.errors.MissingFile):
            lk.LaplacePosterior.load(path, network())
    old.save(path)
    assert same(lk.LaplacePosterior.load(path, network()).packed(), old.packed())
