"""A failure at any place of any call leaves no trace, and the call can be made again.

Each test takes one call on one structure and lets the loader, the model, autograd, a factorisation, a draw of random
numbers or the file system fail at its first, a middle and its last use. Afterwards the model, the global random numbers
and the posterior are what they were, bit for bit, a file that was there is there, nothing half-written is left, and the
same call gives what it gives where nothing ever failed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import laplace_kf as lk
from laplace_kf import files
from laplace_kf.posterior import candidates
from tests.cases import rng
from tests.test_unchanged import X, assert_same, data, make, snapshot

OUTER = X[:4] + 3.0


class Broken(RuntimeError):
    """What no code expects."""


class Fuse:
    """Counts the uses of what it guards, and raises at one of them."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.uses = 0
        self.error: BaseException = Broken()

    def arm(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error

    def use(self) -> None:
        self.uses += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise self.error

    def guarding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.use()
            return function(*args, **kwargs)

        return guarded


# Where it fails, and with what.
ERRORS: dict[str, tuple[BaseException, ...]] = {
    "loader": (OSError("a worker died"), KeyboardInterrupt()),
    "model": (Broken("the model fails"), torch.OutOfMemoryError("out of memory")),
    "autograd": (Broken("a gradient fails"), KeyboardInterrupt()),
    "factorisation": (torch.linalg.LinAlgError("the algorithm failed to converge"),),
    "draw": (torch.OutOfMemoryError("out of memory"),),
    "file": (OSError(28, "No space left on device"), KeyboardInterrupt()),
}
# A factorisation is tried in float64 and with a ridge; a model that cannot be vectorised goes example by example, and
# one that cannot be put on the tape is run without it.
SECOND_WAYS = ("factorisation", "model", "autograd", "draw")
FACTORISATIONS = ("eigh", "eigvalsh", "cholesky_ex", "cholesky", "solve", "qr", "svd", "inv", "solve_triangular")


@pytest.fixture
def fuses(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fuse]:
    """A fuse for each place, in the functions that everything goes through."""
    found = {place: Fuse() for place in ERRORS}

    def guard(place: str, owner: Any, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(owner, name, found[place].guarding(getattr(owner, name)))

    guard("model", torch.nn.functional, "linear")
    guard("autograd", torch.autograd, "grad")
    guard("factorisation", torch.linalg, *FACTORISATIONS)
    guard("draw", torch, "randn")
    guard("file", files, "save_file", "safe_open")
    guard("file", os, "replace")
    monkeypatch.setattr(candidates, "PREDICTED", 6)  # draws of a search that looks once more at its best point
    return found


class Loader:
    """Minibatches; getting one may fail."""

    def __init__(self, fuse: Fuse, batches: list[Any]) -> None:
        self.fuse, self.batches = fuse, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.fuse.use()
            yield batch


Operation = Callable[[lk.LaplacePosterior, Loader, Path], Any]
GRID: dict[str, Any] = {"n_data": [12.0, 120.0], "prior_precision": [0.1, 1.0, 10.0], "samples": 3}


def saved(posterior: lk.LaplacePosterior, path: Path) -> Any:
    posterior.save(path)
    return safetensors.torch.load_file(path)


def conditioned(found: Any) -> Any:
    return dict(found), found.variances(), found.sample(2, rng(1))


def tuned(posterior: lk.LaplacePosterior, *args: Any, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best point of these grids lies on their edge
        posterior.tune(*args, generator=rng(1), **settings)
    return posterior.n_data, posterior.prior_precision, posterior.method, posterior.temperature


OPERATIONS: dict[str, Operation] = {
    "fit": lambda p, loader, path: p.fit(loader, generator=rng(1)).packed(),
    "refit": lambda p, loader, path: p.refit(loader, generator=rng(1)).packed(),
    "update": lambda p, loader, path: p.update(loader, generator=rng(1)).packed(),
    "update-projected": lambda p, loader, path: p.update(loader, terms="project", generator=rng(1)).packed(),
    "tune": lambda p, loader, path: tuned(p, loader, samples=3),
    "tune-by-grid": lambda p, loader, path: tuned(p, loader, method="mc", **GRID),
    "tune-by-evidence": lambda p, loader, path: tuned(p, objective="evidence", **GRID),
    "calibrate": lambda p, loader, path: p.calibrate(loader, method="probit").packed(),
    "predict-mc": lambda p, loader, path: p.predict(X, method="mc", samples=3, generator=rng(1)).probs,
    "predict-linearized": lambda p, loader, path: p.predict(X, method="linearized", samples=3, generator=rng(1)).probs,
    "predict-probit": lambda p, loader, path: p.predict(X, method="probit").probs,
    "functional-covariance": lambda p, loader, path: p.functional_covariance(X, joint=True),
    "sample": lambda p, loader, path: p.sample(3, generator=rng(1)),
    "log-evidence": lambda p, loader, path: p.log_evidence(),
    "ood-score": lambda p, loader, path: p.ood_score(OUTER, kind="leverage"),
    "condition": lambda p, loader, path: conditioned(p.condition(0.0, {"head.weight": torch.eye(3, 4).bool()})),
    "derivatives": lambda p, loader, path: p.derivatives(X[:2]).epistemic_variance,
    "predict-top-k": lambda p, loader, path: p.predict_top_k(X, 2, method="probit").probs,
    "predictor": lambda p, loader, path: p.predictor(3, generator=rng(1))(X).probs,
    "influence": lambda p, loader, path: lk.attribution.influence(p, data(), data()[:1]),
    "mislabelled": lambda p, loader, path: lk.attribution.mislabelled(p, data()).scores,
    "prune": lambda p, loader, path: lk.pruning.masks(p, 0.5),
    "bald": lambda p, loader, path: lk.acquisition.bald(p, X, 5, rng(1)),
    "save": lambda p, loader, path: saved(p, path),
    "load": lambda p, loader, path: lk.LaplacePosterior.load(path.with_name("old"), p.model).packed(),
}
STRUCTURES: dict[str, dict[str, Any]] = {"kron": {}, "ekfac": {}, "diag": {}, "full": {}, "lowrank": {"rank": 4}}
ONCE = ("refit", "tune", "tune-by-grid", "calibrate", "predict-top-k", "predictor", "mislabelled", "prune", "bald")
SEARCHES = ("tune", "tune-by-grid", "calibrate")  # hundreds of passes
PAIRS = [(n, s) for n in OPERATIONS for s in STRUCTURES if n not in ONCE or s == "kron"]
DATA = {"fit", "refit", "update", "update-projected", "tune", "tune-by-grid", "calibrate"}
WEIGHTS = {"tune-by-evidence", "sample", "log-evidence", "condition", "prune", "save", "load"}  # no model is asked
# What a call has to go through, or its failures there are not tested.
REACHED: dict[str, set[str]] = {
    "loader": DATA,
    "model": {*OPERATIONS} - WEIGHTS,
    "autograd": {*OPERATIONS} - WEIGHTS - {"tune-by-grid", "predict-mc", "predictor", "ood-score", "bald"},
    "factorisation": {"update-projected", "tune-by-evidence", "log-evidence", "predict-linearized", "predict-mc"},
    "draw": {"sample", "predict-mc", "predict-linearized", "tune", "tune-by-grid"},
    "file": {"save", "load"},
}


def fitted(structure: str) -> lk.LaplacePosterior:
    posterior = lk.LaplacePosterior(make(), "categorical", structure=structure, **STRUCTURES[structure])
    return posterior.fit(data(), generator=rng(0))


def same(one: Any, two: Any, rtol: float = 0.0) -> bool:
    if isinstance(one, Tensor):
        alike = isinstance(two, Tensor) and one.dtype == two.dtype and one.shape == two.shape
        return alike and (torch.equal(one, two) or (rtol > 0 and torch.allclose(one, two, rtol=rtol, atol=1e-12)))
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[k], two[k], rtol) for k in one)
    if isinstance(one, (list, tuple)):
        whole = isinstance(two, (list, tuple)) and len(one) == len(two)
        return whole and all(same(a, b, rtol) for a, b in zip(one, two, strict=True))
    return one == two or (isinstance(one, float) and one == pytest.approx(two, rel=rtol))


@pytest.mark.share(3)
@pytest.mark.parametrize(("name", "structure"), PAIRS)
def test_a_failure_anywhere_leaves_no_trace(name: str, structure: str, fuses: dict[str, Fuse], tmp_path: Path) -> None:
    operation, old, path = OPERATIONS[name], tmp_path / "old", tmp_path / "new"
    loader = Loader(fuses["loader"], data())
    first = fitted(structure)
    first.save(old)
    tensors, header = first.packed()
    before = snapshot(first.model)

    def revived() -> lk.LaplacePosterior:
        """The same posterior with nothing computed yet."""
        return lk.LaplacePosterior.unpacked(tensors, header, first.model)

    reference = operation(revived(), loader, path)
    posterior = revived()
    for fuse in fuses.values():
        fuse.uses = 0
    assert same(reference, operation(posterior, loader, path))
    uses = {place: fuse.uses for place, fuse in fuses.items()}
    if structure == "kron":
        assert {place for place in uses if uses[place]} >= {place for place in REACHED if name in REACHED[place]}
    path.write_bytes(b"what was there")
    contents = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for place, errors in ERRORS.items():
        middle = uses[place] // 2
        # What a loader, a model, autograd or a file says does not pass through a structure: one use of each is enough.
        few = name in SEARCHES or (structure != "kron" and place not in ("factorisation", "draw"))
        places = {middle} if few else {0, middle, uses[place] - 1}
        for at in sorted(places) if uses[place] else ():
            # every use with the first kind of error; every kind in the middle, unless there are hundreds of passes
            for error in errors if structure == "kron" and at == middle and name not in SEARCHES else errors[:1]:
                where = f"{error!r} of {place} at use {at} of {uses[place]}"
                posterior = revived()
                fuses[place].arm(at, error)
                raised: BaseException | None = None
                try:
                    found = operation(posterior, loader, path)
                except BaseException as anything:  # Ctrl-C, too
                    raised = anything
                if raised is not None:
                    if isinstance(error, torch.linalg.LinAlgError):
                        assert isinstance(raised, lk.errors.LaplaceKFError), (where, raised)
                    elif isinstance(error, OSError) and place == "file":
                        assert isinstance(raised, lk.errors.UnusableFile) and raised.__cause__ is error, (where, raised)
                    else:
                        assert raised is error, (where, raised)
                    assert same((tensors, header), posterior.packed()), where
                    assert contents == {file.name: file.read_bytes() for file in tmp_path.iterdir()}, where
                    found = operation(posterior, loader, path)
                else:
                    # There is a second way, which gives the same up to rounding.
                    assert place in SECOND_WAYS and isinstance(error, Exception), where
                    assert fuses[place].left is None, f"no {where}"
                fuses[place].left = None
                assert same(reference, found, rtol=1e-9), where
                path.write_bytes(b"what was there")
                assert_same(before, snapshot(first.model))
