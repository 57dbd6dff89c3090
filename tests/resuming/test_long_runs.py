"""Long runs: thousands of predictions, steps, updates and files, after which no tensor and no memory is left over.

The short form runs always and counts what is alive; the nightly one also looks at the memory of the process.
``LAPLACE_KF_ROUNDS=20000 python -m pytest -m nightly tests/resuming/test_long_runs.py`` makes it longer.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk

ROUNDS = int(os.environ.get("LAPLACE_KF_ROUNDS", "2000"))
MEBIBYTE = 2**20


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, generator=rng(k)), torch.arange(8) % 3


def predictions(folder: Path) -> Callable[[int], None]:
    posterior = lk.LaplacePosterior(network(), "categorical").fit(batch(0))
    methods = ("mc", "linearized", "probit", "map")

    def once(k: int) -> None:
        x, _ = batch(k)
        posterior.predict(x, method=methods[k % 4], samples=5, generator=rng(k))

    return once


def steps(folder: Path) -> Callable[[int], None]:
    optimizers = [lk.optim.kfac(network(), "categorical"), lk.optim.ekfac(network(), "categorical")]
    return lambda k: optimizers[k % 2].step(batch(k)) and None


def updates(folder: Path) -> Callable[[int], None]:
    posterior = lk.LaplacePosterior(network(), "categorical").fit(batch(0))

    def once(k: int) -> None:
        posterior.update(batch(k), terms="project", forgetting=0.9)

    return once


def fits_and_files(folder: Path) -> Callable[[int], None]:
    model, path = network(), folder / "posterior.safetensors"

    def once(k: int) -> None:
        structure = ("kron", "diag", "full", "ekfac")[k % 4]
        lk.LaplacePosterior(model, "categorical", structure=structure).fit(batch(k)).save(path)
        lk.LaplacePosterior.load(path, model).predict(batch(k)[0], samples=3)

    return once


def models_that_come_and_go(folder: Path) -> Callable[[int], None]:
    """What is remembered of a model goes with it."""
    return lambda k: lk.LaplacePosterior(network(), "categorical", structure="diag").fit(batch(k)) and None


RUNS = [predictions, steps, updates, fits_and_files, models_that_come_and_go]


def tensors() -> int:
    """How many tensors and modules are alive."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))
    return sum(count for kind, count in kinds.items() if issubclass(kind, (Tensor, nn.Module)))


def resident() -> int:
    """Memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_nothing_is_left_over(run: Callable[[Path], Callable[[int], None]], tmp_path: Path) -> None:
    once = run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(8):
            once(k)
        before = tensors()
        for k in range(8, 16):
            once(k)
    assert tensors() <= before


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_memory_is_flat(run: Callable[[Path], Callable[[int], None]], tmp_path: Path) -> None:
    once, rounds = run(tmp_path), max(40, ROUNDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(rounds // 4):
            once(k)
        alive, memory = tensors(), resident()
        for k in range(rounds // 4, rounds):
            once(k)
    assert tensors() <= alive
    assert resident() - memory < 8 * MEBIBYTE, f"{(resident() - memory) / MEBIBYTE:.1f} MiB more after {rounds} rounds"
