"""A fit that is stopped at any minibatch, or killed, goes on with the same numbers, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset
from tqdm.auto import tqdm

import laplace_kf as lk
from laplace_kf import files
from tests.cases import labels, normal, rng

N, BATCH = 22, 4  # six minibatches, the last one smaller


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written hundreds of times need not reach the disk."""
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


class Experts(nn.Module):
    """An embedding, shared weights, a bare parameter, and a branch that only some minibatches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.late = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.embed(x)))
        h = torch.tanh(self.inner(h)) * self.gain
        mask = (x > 4)[..., None].to(h)
        if bool(mask.any()):
            h = h + mask * self.late(h)
        return self.head(h.mean(1))


def dense(hidden: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    ).double()


def made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


X, Y = normal(N, 3, seed=1), labels(3, N, seed=2)
TOKENS = torch.randint(0, 4, (N, 5), generator=rng(3))
TOKENS[9:, 0] = 6  # the late branch is met at the third minibatch


def sliced(x: Tensor) -> list[Any]:
    return [(x[k : k + BATCH], Y[k : k + BATCH]) for k in range(0, N, BATCH)]


class Noisy(Dataset[Any]):
    """Augments from torch's, numpy's and Python's global numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        shift = float(np.random.normal()) + random.random()
        return X[k] + shift + torch.randn(3, dtype=X.dtype), Y[k]


def seeded_sampler() -> DataLoader[Any]:
    data = TensorDataset(X, Y)
    return DataLoader(data, BATCH, sampler=RandomSampler(data, generator=rng(5)))


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: sliced(X),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), BATCH, shuffle=True),
    "own-generator": lambda: DataLoader(TensorDataset(X, Y), BATCH, shuffle=True, generator=rng(4)),
    "own-sampler": seeded_sampler,
    "augmented": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
}
# name: network, data, posterior, fit
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    **{f"kron-{name}": (dense, loader, {"structure": "kron"}, {}) for name, loader in LOADERS.items()},
    "wide": (lambda: dense(131), LOADERS["list"], {}, {}),  # sums in rows of whole cache lines
    "sampled": (dense, LOADERS["shuffled"], {"estimator": "sampled"}, {}),
    "projection": (dense, LOADERS["augmented"], {"structure": "diag", "estimator": "projection", "samples": 2}, {}),
    "importance": (convolution, LOADERS["list"], {"estimator": "importance"}, {}),
    "ekfac": (convolution, LOADERS["shuffled"], {"structure": "ekfac", "estimator": "sampled"}, {}),
    "lowrank": (dense, LOADERS["own-generator"], {"structure": "lowrank", "rank": 4, "iterations": 3}, {}),
    "passes": (dense, LOADERS["augmented"], {"structure": "full"}, {"passes": 3}),
    "auto": (dense, LOADERS["list"], {"structure": "auto"}, {}),
    "recursive": (dense, LOADERS["list"], {"estimator": "recursive"}, {"n_data": 100.0}),
    "subnetwork": (dense, LOADERS["augmented"], {"structure": "full", "parameters": lk.Subnetwork(7),
                   "estimator": "sampled"}, {}),
    "experts-kron": (Experts, lambda: sliced(TOKENS), {"structure": "kron"}, {}),
    "experts-full": (Experts, lambda: sliced(TOKENS), {"structure": "full", "estimator": "sampled"}, {}),
    "last-layer": (Experts, lambda: sliced(TOKENS), {"structure": "kron", "parameters": "last_layer"}, {}),
}  # fmt: skip


def die() -> None:
    raise Killed


def data_of(loader: Any, kill: int | None) -> Any:
    """The loader, which ends the process after ``kill`` minibatches of all passes."""
    if kill is None:
        return loader
    if isinstance(loader, DataLoader):  # torch's own loader stays one
        loader.collate_fn = DeadlyCollate(loader.collate_fn, kill)
        return loader
    return Deadly(loader, kill)


class DeadlyCollate:
    def __init__(self, collate: Callable[[Any], Any], left: int) -> None:
        self.collate, self.left = collate, left

    def __call__(self, items: list[Any]) -> Any:
        if not self.left:
            die()
        self.left -= 1
        return self.collate(items)


class Deadly:
    def __init__(self, loader: Any, left: int) -> None:
        self.loader, self.left = loader, left

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if not self.left:
                die()
            self.left -= 1
            yield batch


def fitted(name: str, path: Path | None = None, kill: int | None = None, every: int = 1) -> lk.LaplacePosterior:
    make, loader, settings, how = CASES[name]
    torch.manual_seed(11), np.random.seed(11), random.seed(11)
    if path is not None and path.exists():  # a fresh process starts with other numbers
        torch.manual_seed(12), np.random.seed(12), random.seed(12)
    posterior = lk.LaplacePosterior(made(make), "categorical", **settings)
    more = {} if path is None else {"checkpoint": path, "every": every}
    return posterior.fit(data_of(loader(), kill), generator=rng(7), **how, **more)


def same(one: lk.LaplacePosterior, other: lk.LaplacePosterior) -> None:
    mine, theirs = one.packed(), other.packed()
    assert mine[1] == theirs[1]
    assert list(mine[0]) == list(theirs[0])
    for key, value in mine[0].items():
        assert torch.equal(value, theirs[0][key]), key


def kept_of(model: nn.Module) -> tuple[Any, ...]:
    """Weights, buffers, modes and gradients of a model."""
    modes = [module.training for module in model.modules()]
    tensors = {name: value.tolist() for name, value in model.state_dict().items()}
    return modes, tensors, [p.grad for p in model.parameters()]


def passes_of(name: str) -> int:
    """How many minibatches a fit takes in."""
    taken = Deadly(CASES[name][1](), 10**6)
    make, _, settings, how = CASES[name]
    lk.LaplacePosterior(made(make), "categorical", **settings).fit(taken, **how)
    return 10**6 - taken.left


@pytest.mark.parametrize("name", CASES)
def test_stopped_at_every_minibatch(name: str, tmp_path: Path) -> None:
    whole, path = fitted(name), tmp_path / "fit"
    same(fitted(name, path), whole)  # a checkpoint changes no number
    assert not path.exists()
    total = passes_of(name)
    assert total >= 6
    for kill in range(1, total, 1 + (total > 6) + 2 * (total > 12)):
        with pytest.raises(Killed):
            fitted(name, path, kill, every=1 + kill % 2)
        assert path.exists() or kill == 1 or name == "subnetwork"  # whose weights are chosen in a pass before
        same(fitted(name, path), whole)
        assert not list(tmp_path.iterdir())


def test_another_kind_of_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped loader has no index to number its examples by, so draws would be other ones."""
    path = tmp_path / "fit"
    monkeypatch.setitem(
        CASES, "wrapped", (dense, lambda: Deadly(LOADERS["own-generator"](), 99), *CASES["sampled"][2:])
    )
    with pytest.raises(Killed):
        fitted("wrapped", path, 3)
    monkeypatch.setitem(CASES, "wrapped", (dense, LOADERS["own-generator"], *CASES["sampled"][2:]))
    with pytest.raises(lk.errors.ShapeMismatch, match="another kind"):
        fitted("wrapped", path)


def test_stopped_again_and_again(tmp_path: Path) -> None:
    whole, path = fitted("ekfac"), tmp_path / "fit"
    seen: list[tuple[int, int]] = []
    for kill in (2, 5, 5, 8, 4, 5):
        with pytest.raises(Killed):
            fitted("ekfac", path, kill)
        header = files.read(path, files.FIT)[1]
        seen.append((len(header["stages"]), header["position"]))
    assert seen == [(1, 2), (1, 5), (1, 5), (2, 2), (2, 4), (2, 5)]
    same(fitted("ekfac", path), whole)


def test_what_is_in_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, counted = tmp_path / "fit", []
    with pytest.raises(Killed):
        fitted("kron-shuffled", path, 4)
    take = lk.engine.Accumulator.take  # type: ignore[attr-defined]
    monkeypatch.setattr(
        lk.engine.Accumulator, "take", lambda self, *args: (counted.append(args[1]), take(self, *args))[1]
    )
    fitted("kron-shuffled", path)
    assert counted == [4, 5]


def test_the_same_object_may_try_again(tmp_path: Path) -> None:
    """In one process: model, generators and global numbers are those of before the failed call."""
    path, generator = tmp_path / "fit", rng(7)
    model, loader = made(convolution), LOADERS["own-generator"]()
    posterior = lk.LaplacePosterior(model, "categorical", estimator="sampled")
    before, numbers = kept_of(model), (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    with pytest.raises(Killed):
        posterior.fit(data_of(loader, 3), generator=generator, checkpoint=path, every=1)
    loader.collate_fn = loader.collate_fn.collate
    assert kept_of(model) == before
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == numbers[1:]  # type: ignore[index]
    assert torch.equal(generator.get_state(), rng(7).get_state())
    posterior.fit(loader, generator=generator, checkpoint=path)
    wanted = rng(7)
    same(posterior, lk.LaplacePosterior(model, "categorical", estimator="sampled").fit(
        LOADERS["own-generator"](), generator=wanted))  # fmt: skip
    assert torch.equal(generator.get_state(), wanted.get_state())


def test_without_a_generator_the_files_numbers_go_on(tmp_path: Path) -> None:
    """A private generator is part of the checkpoint: what was drawn before is not drawn anew."""
    path = tmp_path / "fit"
    with pytest.raises(Killed):
        lk.LaplacePosterior(made(dense), "categorical", estimator="sampled").fit(
            Deadly(sliced(X), 5), checkpoint=path, every=1
        )
    kept = path.read_bytes()
    found = []
    for _ in range(2):
        path.write_bytes(kept)
        found.append(lk.LaplacePosterior(made(dense), "categorical", estimator="sampled").fit(
            sliced(X), checkpoint=path))  # fmt: skip
    same(*found)


def test_estimates_updates_and_refits(tmp_path: Path) -> None:
    path, model = tmp_path / "fit", made(dense)

    def estimate(data: Any, **more: Any) -> Any:
        return lk.curvature.estimate(model, "categorical", data, "full", generator=rng(1), **more).total().dense()

    base = lk.LaplacePosterior(model, "categorical", "full").fit(sliced(X))
    calls: list[Callable[..., Tensor]] = [
        estimate,
        lambda data, **more: base.update(data, **more).precision.dense(),
        lambda data, **more: base.refit(data, **more).precision.dense(),
    ]
    for call in calls:
        wanted = call(sliced(X))
        with pytest.raises(Killed):
            call(Deadly(sliced(X), 3), checkpoint=path, every=1)
        assert torch.equal(call(sliced(X), checkpoint=path), wanted)
        assert not path.exists()


# ------------------------------------------------------------------------------------------------ refusals


def refused(tmp_path: Path, match: str, **changes: Any) -> None:
    """A changed call is refused by name; file, model and posterior stay what they were."""
    path = tmp_path / "fit"
    model = changes.pop("model", None) or made(dense)
    fit = {"generator": rng(7), "checkpoint": path, "every": 1, **changes.pop("fit", {})}
    data = changes.pop("data", None) or sliced(X)
    posterior = lk.LaplacePosterior(model, changes.pop("likelihood", "categorical"), **changes)
    kept, before = path.read_bytes(), kept_of(model)
    with pytest.raises(lk.errors.ShapeMismatch, match=match) as told:
        posterior.fit(data, **fit)
    assert str(path) in str(told.value)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
    assert kept_of(model) == before
    with pytest.raises(lk.errors.NotFitted):
        _ = posterior.precision


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    with pytest.raises(Killed):
        lk.LaplacePosterior(made(dense), "categorical").fit(
            Deadly(sliced(X), 3), generator=rng(7), checkpoint=path, every=1
        )
    moved = made(dense)
    with torch.no_grad():
        next(moved.parameters())[0, 0] += 1e-9
    refused(tmp_path, "its model was", model=moved)
    refused(tmp_path, "structure was .*'kron'.*'diag'", structure="diag")
    refused(tmp_path, "structure was .*'max_side': 8192.*'max_side': 3", max_side=3)
    refused(tmp_path, "estimator was", estimator="sampled")
    refused(tmp_path, "likelihood was", likelihood=lk.likelihoods.Categorical(label_smoothing=0.1))
    refused(tmp_path, "parameters was", parameters=["0.*"])
    refused(tmp_path, "dtype was None, and is 'torch.float64'", dtype=torch.float64)
    refused(tmp_path, "passes was 1, and is 2", fit={"passes": 2})
    refused(tmp_path, "generator was", fit={"generator": rng(8)})
    refused(tmp_path, "generator was", fit={"generator": None})
    refused(tmp_path, "number of minibatches was 6, and is 5", data=sliced(X)[:5])
    refused(tmp_path, "one of the first 3 minibatches is another one", data=sliced(X.flip(0)))
    unsized = (batch for batch in sliced(X)[:2])
    refused(tmp_path, "number of minibatches", data=unsized)
    fits = lk.LaplacePosterior(made(dense), "categorical").fit(sliced(X), generator=rng(7), checkpoint=path)
    same(fits, lk.LaplacePosterior(made(dense), "categorical").fit(sliced(X), generator=rng(7)))


def test_data_that_end_early_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    posterior = lk.LaplacePosterior(made(dense), "categorical")
    with pytest.raises(Killed):
        posterior.fit(iter(Deadly(sliced(X), 4)), checkpoint=path, every=1)
    with pytest.raises(lk.errors.ShapeMismatch, match="there are 2 minibatches, and 4 were taken in"):
        posterior.fit(iter(sliced(X)[:2]), checkpoint=path)
    assert path.exists()


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit"
    posterior = lk.LaplacePosterior(made(dense), "categorical").fit(sliced(X))
    posterior.save(path)
    kept = path.read_bytes()
    with pytest.raises(lk.errors.CorruptFile, match="it holds a laplace_kf posterior"):
        posterior.fit(sliced(X), checkpoint=path)
    assert path.read_bytes() == kept
    with pytest.raises(Killed):
        posterior.fit(Deadly(sliced(X), 3), checkpoint=tmp_path / "other", every=1)
    content = bytearray((tmp_path / "other").read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(lk.errors.CorruptFile, match="altered"):
        posterior.fit(sliced(X), checkpoint=path)
    with pytest.raises(lk.errors.CorruptFile, match="it holds a laplace_kf checkpoint of a fit"):
        lk.LaplacePosterior.load(tmp_path / "other", made(dense))


def test_arguments_are_checked_first(tmp_path: Path) -> None:
    posterior = lk.LaplacePosterior(made(dense), "categorical")
    with pytest.raises(FileNotFoundError, match="no folder"):
        posterior.fit(sliced(X), checkpoint=tmp_path / "missing" / "fit")
    for every in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="every must be a positive integer"):
            posterior.fit(sliced(X), checkpoint=tmp_path / "fit", every=every)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path, written = fitted("sampled"), tmp_path / "fit", []
    save = files.save_file

    def full(*args: Any, **kwargs: Any) -> None:
        written.append(1)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        fitted("sampled", path)
    assert list(tmp_path.iterdir()) == [path]
    assert files.read(path, files.FIT)[1]["position"] == 2
    same(fitted("sampled", path), whole)


# ------------------------------------------------------------------------------------------------ a process that dies

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import tests.resuming.test_fits as these

torch.set_num_threads(int(sys.argv[4]))
these.die = lambda: os.kill(os.getpid(), signal.SIGKILL)
data_of = these.data_of
these.data_of = lambda loader, kill: data_of(loader, int(sys.argv[3]))
these.fitted(sys.argv[1], Path(sys.argv[2]))
"""


def killed_and_gone_on(name: str, folder: Path, kill: int) -> None:
    command = [sys.executable, "-c", SCRIPT, name, str(folder / "fit"), str(kill), str(torch.get_num_threads())]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    assert [path.name for path in folder.iterdir()] == ["fit"]
    same(fitted(name, folder / "fit"), fitted(name))
    assert not list(folder.iterdir())


def test_a_killed_process(tmp_path: Path) -> None:
    killed_and_gone_on("ekfac", tmp_path, 9)


def ended(name: str, path: Path, after: float) -> tuple[bool, float]:
    """A fit in a fork that the system ends after so much of its processor time, in whatever line it is then.

    Returns:
        Whether it was ended, and the processor time it took.
    """
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # the one of all processes would stay taken by one that was ended
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # no handler, no `finally`
        signal.setitimer(signal.ITIMER_PROF, after)
        try:
            fitted(name, path)
        finally:
            os._exit(0)
    _, status, used = os.wait4(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGPROF)
    return os.WIFSIGNALED(status), used.ru_utime + used.ru_stime


def ended_and_gone_on(folder: Path, names: list[str], points: int) -> None:
    """Fits ended before their end, so many in all, at random points, and each then gone on with to the same result."""
    chance, stopped, number = random.Random(0), 0, 0
    whole = {name: (fitted(name), ended(name, folder / name, 1e3)[1]) for name in names}
    while stopped < points:  # one that is faster than the first was is at its end before it would have been ended
        name, path, number = chance.choice(names), folder / f"{number}", number + 1
        assert number <= 10 * points
        for _ in range(2):
            stopped += ended(name, path, chance.uniform(1e-4, whole[name][1]))[0]
        same(fitted(name, path), whole[name][0])
        assert not path.exists()
        # what a process that was ended as it wrote left behind stays: nobody knows whose it is
        assert all(file.name.endswith(".part") or file.name.startswith(".tmp") for file in folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_ended_at_random_points(tmp_path: Path) -> None:
    ended_and_gone_on(tmp_path, ["ekfac", "sampled"], 4)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_ended_at_a_hundred_random_points(tmp_path: Path) -> None:
    ended_and_gone_on(tmp_path, [name for name in CASES if name != "subnetwork"], 100)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_processes_killed_after_any_minibatch(tmp_path: Path) -> None:
    chance, names = random.Random(0), [name for name in CASES if name != "subnetwork"]
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        killed_and_gone_on(chance.choice(names), folder, chance.randrange(1, 6))
