"""Plans beside what happened: seconds of a fit, of predictions, of a tuning run, and bytes of a fit, of many networks.

Every case runs in processes of its own. In one the plan comes first, then the jobs that it speaks of; seconds are
processor seconds of one thread, the median of three (of a job of more than ten seconds, of one). In another there is a
training step and the fit, with an allocator that gives back at once what is freed; bytes are by how much the resident
memory grows at most during the fit (Linux, glibc). How much with glibc's defaults, which keep freed pieces of up
to 32 MB and holes between them, is written beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.many_predictions import growth
from benchmarks.workload import autoencoder, relu_network

WITHIN = 0.25
LARGE = 30e6  # bytes from which on the resident memory says something
PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}  # what is freed is given back
REPEATED, PATIENCE = 3, 10.0  # times that a job is done at most, seconds after which it is not done again
LONG = 0.2  # seconds from which on a job is long enough to be measured
Case = tuple[nn.Module, str, Tensor, Tensor, int, dict[str, Any], tuple[str, ...]]
ALL, SOME = ("fit", "predict", "tune"), ("fit", "predict")


class _Positions(nn.Module):
    """A transformer of two layers over 32 vectors of 64 entries, with 10 classes for each of them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class _Residual(nn.Module):
    """A convolution with a way around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1250, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def _resnet() -> nn.Module:
    body = [_Residual(32) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *body[:2], nn.MaxPool2d(2), *body[2:], nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 100),
    )  # fmt: skip


def _labels(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(1))


def cases() -> dict[str, Callable[[], Case]]:
    """By name: network, likelihood, inputs, targets, minibatch, settings, jobs."""
    rng = torch.Generator().manual_seed(0)

    def mlp(jobs: tuple[str, ...] = ALL, count: int = 1000, **settings: Any) -> Callable[[], Case]:
        def made() -> Case:
            model, x, y, _ = relu_network((784, 1024, 1024, 10), count, 250)
            return model, "categorical", x, y, 250, settings, jobs

        return made

    def images(model: Callable[[], nn.Module], n: int, classes: int, batch: int, jobs: Any, **settings: Any) -> Any:
        return lambda: (
            model(), "categorical", torch.rand(n, 3, 32, 32, generator=rng), _labels(n, classes), batch, settings, jobs,
        )  # fmt: skip

    def toy(**settings: Any) -> Case:
        x = torch.randn(20, 1, generator=rng)
        model = nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1))
        return model, "gaussian", x, x.sin(), 20, settings, SOME

    def segments() -> Case:
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 1))
        y = torch.randint(0, 3, (24, 12, 12), generator=rng)
        x = torch.rand(24, 3, 12, 12, generator=rng)
        return model, "categorical", x, y, 4, {"structure": "kron"}, ("fit",)

    def pixels() -> Case:
        x = torch.rand(1000, 784, generator=rng)
        return autoencoder(), "bernoulli", x, (x > 0.5).float(), 250, {"estimator": "sampled"}, ("fit",)

    def sequences() -> Case:
        x = torch.randn(400, 32, 64, generator=rng)
        return _Positions(), "categorical", x, _labels(400, 10), 50, {"structure": "kron"}, SOME

    def many() -> Case:
        model, x, y, _ = relu_network((256, 512, 300), 300, 50)
        return model, "categorical", x, y, 50, {"structure": "kron"}, ("fit",)

    return {
        "784-1024-1024-10, kron, exact": mlp(),
        "the same, 4000 examples": mlp(count=4000),
        "784-1024-1024-10, kron, sampled": mlp(SOME, estimator="sampled"),
        "784-1024-1024-10, diag, exact": mlp(SOME, structure="diag"),
        "784-1024-1024-10, ekfac, exact": mlp(SOME, structure="ekfac"),
        "784-1024-1024-10, full, last layer": mlp(SOME, structure="full", parameters="last_layer", method="mc"),
        "LeNet, kron, exact": images(_lenet, 500, 10, 100, SOME),
        "LeNet, diag, exact": images(_lenet, 500, 10, 100, SOME, structure="diag"),
        "residual network, kron, sampled": images(_resnet, 256, 100, 32, ("fit",), estimator="sampled"),
        "transformer, kron, exact": sequences,
        "autoencoder, kron, sampled": pixels,
        "256-512-300, kron, exact": many,
        "1-7-7-1, full, exact": lambda: toy(structure="full"),
        "segmentation, kron, exact": segments,
    }


def measure(name: str) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, likelihood, x, y, batch, settings, jobs = cases()[name]()
    settings = dict(settings)
    method = settings.pop("method", "auto")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch)
    clock = time.process_time
    posterior = lk.LaplacePosterior(model, likelihood, **settings)
    plan = posterior.plan(loader, method=method, clock=clock)
    rng = torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {
        "fit": lambda: posterior.fit(loader, generator=rng),
        "predict": lambda: posterior.predict(loader, method=method, generator=rng),
        "tune": lambda: posterior.tune(loader, generator=rng),
    }
    found: dict[str, Any] = {"plan_seconds": plan.probe}
    for job in jobs:
        times: list[float] = []
        while len(times) < REPEATED and sum(times) < PATIENCE:
            if job != "fit":  # with decompositions of its own
                posterior.fit(loader, generator=rng)
            start = clock()
            calls[job]()
            times.append(clock() - start)
        taken = sorted(times)[len(times) // 2]
        stage = getattr(plan, job)
        found[job] = {"seconds": taken, "planned_seconds": stage.seconds}
        if job == "fit":
            found[job] |= {"planned_bytes": stage.bytes}
    return found


def memory(name: str) -> float:
    """Bytes by which the resident memory of this process grows while the case is fitted."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, likelihood, x, y, batch, settings, _ = cases()[name]()
    settings = {key: value for key, value in settings.items() if key != "method"}
    # what is loaded and set up once in a process: by a fit, with torch's symbols, and by training these kinds of layers
    small = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(1, 2))
    lk.LaplacePosterior(small, "categorical", **settings).fit(torch.randn(4, 1, 1, 1), _labels(4, 2))
    model(x[:batch]).sum().backward()
    model.zero_grad(set_to_none=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch)
    posterior = lk.LaplacePosterior(model, likelihood, **settings)
    return growth(lambda: posterior.fit(loader, generator=torch.Generator().manual_seed(0)))


def _alone(call: str, **environment: str) -> Any:
    """What a function of this module returns in a process of its own."""
    code = f"import json, benchmarks.plans as b; print(json.dumps(b.{call}))"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    return json.loads(out.stdout.splitlines()[-1])


def run(rounds: int = 5) -> dict[str, Any]:
    """Every case in processes of its own; a plan is tried once, so rounds do not matter."""
    found: dict[str, Any] = {}
    for name in cases():
        found[name] = _alone(f"measure({name!r})")
        call = f"memory({name!r})"
        found[name]["fit"] |= {"bytes": _alone(call, **PROMPT), "bytes_with_defaults": _alone(call)}
    met = {}
    for name, case in found.items():
        for job in (each for each in ALL if each in case):
            for what, least in (("seconds", LONG), ("bytes", LARGE)):
                if case[job].get(what, 0) >= least:
                    off = case[job][f"planned_{what}"] / case[job][what] - 1
                    met[f"{name}: {job}, {what}"] = abs(off) <= WITHIN
    return {
        "workload": "random data, one thread, float32; seconds of the processor, bytes of resident memory",
        "cases": found,
        "met": met,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'case':40} {'job':8} {'planned':>10} {'taken':>10} {'off':>6}"]
    for name, case in result["cases"].items():
        for job in (each for each in ALL if each in case):
            for what, scale, unit in (("seconds", 1.0, "s"), ("bytes", 1e-6, "MB")):
                if what in case[job]:
                    planned, taken = case[job][f"planned_{what}"], case[job][what]
                    lines.append(
                        f"{name:40} {job:8} {planned * scale:8.3g} {unit:2} {taken * scale:7.3g} {unit:2} "
                        f"{planned / taken - 1 if taken else 0:+6.0%}"
                    )
    lines.append(f"within {WITHIN:.0%}: {sum(result['met'].values())} of {len(result['met'])}")
    return "\n".join(lines)
