"""What a second-order step costs, in SGD steps: 784-1000-500-250-30 autoencoder, batch 1000, one thread, float32.

All optimisers take a step in turn in one process, over whole cycles of 20 steps, so that every mean holds one refresh
of the inverses and one search for ζ; only the steps that fresh factors begin with are left out. Conjugate-gradient
methods make exactly 20 CG steps an update and are shown per CG step too. KFLR sends one column back for every output,
so a single step has to do. Memory is by how much the peak of a fresh
process grows over that of SGD.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import in_turn
from benchmarks.workload import autoencoder, peak_bytes
from laplace_kf.optim.cg import Progress
from laplace_kf.optim.recipes import Recipe, last

BATCH, CYCLE, BEFORE, CG_STEPS = 1000, 20, 3, 20
SGD = "SGD"
Step = Callable[[], Any]

FACTORED: dict[str, Callable[..., Any]] = {
    "kfac": lk.optim.kfac,
    "kfac, no momentum": lambda *given, **more: lk.optim.kfac(*given, momentum=False, **more),
    "kfac, block-tridiagonal": lambda *given, **more: lk.optim.kfac(*given, inverse="block_tridiagonal", **more),
    "ekfac": lk.optim.ekfac,
    "kfra": lk.optim.kfra,
    "kfra, inverses every 20 steps": lambda *given, **more: lk.optim.kfra(*given, refresh=20, **more),
    "diagonal": lk.optim.diagonal,
}
ITERATIVE: dict[str, Callable[..., Any]] = {
    "hessian_free": lk.optim.hessian_free,
    "natural_gradient": lk.optim.natural_gradient,
}
SLOW: dict[str, Callable[..., Any]] = {"kflr, one step": lk.optim.kflr}  # a column for each of the 784 outputs
TARGETS = {"kfac": 3.0, "kfac, no momentum": 3.0}


def workload() -> tuple[nn.Module, Tensor]:
    """The network and one minibatch ``(N, 784)`` of numbers in [0, 1], the targets as well."""
    return autoencoder(), torch.rand(BATCH, 784, generator=torch.Generator().manual_seed(1))


def stepper(make: Callable[..., Any] | None) -> Step:
    """One step of an optimiser on its own copy of the network; ``None`` is SGD."""
    model, x = workload()
    if make is None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)

        def first_order() -> None:
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / BATCH
            loss.backward()
            optimizer.step()

        return first_order
    second = make(model, "bernoulli", generator=torch.Generator().manual_seed(2))
    return lambda: second.step(x, x)


def iterative(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same optimiser with exactly ``CG_STEPS`` CG steps an update."""
    recipe = Recipe(limit=CG_STEPS, choose=last)
    return lambda *given, **more: make(*given, recipe=recipe, termination=Progress(0.0), **more)


def memory(name: str) -> float:
    """By how many bytes a few steps in this process raise its peak over that of SGD."""
    torch.set_num_threads(1)
    plain = stepper(None)
    plain()
    before = peak_bytes()
    makers = {**FACTORED, **{key: iterative(make) for key, make in ITERATIVE.items()}}
    step = stepper(makers[name])
    for _ in range(BEFORE + 1):
        step()
    return peak_bytes() - before


def run(rounds: int = 3) -> dict[str, Any]:
    """Costs in SGD steps over ``rounds`` cycles, and peaks of memory."""
    torch.set_num_threads(1)
    jobs = {SGD: stepper(None), **{name: stepper(make) for name, make in FACTORED.items()}}
    for _ in range(BEFORE):  # with fresh inverses each; one more is the warm-up
        for step in jobs.values():
            step()
    costs = _costs(in_turn(jobs, rounds * CYCLE))
    jobs = {SGD: stepper(None), **{name: stepper(iterative(make)) for name, make in ITERATIVE.items()}}
    for name, cost in _costs(in_turn(jobs, 2 * rounds)).items():
        if name != SGD:
            costs[f"{name}, {CG_STEPS} CG steps"] = cost
            costs[f"{name}, per CG step"] = {key: value / CG_STEPS for key, value in cost.items()}
    unit = costs[SGD]["seconds"]
    costs.update({name: _once(make, unit) for name, make in SLOW.items()})
    return {
        "workload": f"784-1000-500-250-30 autoencoder (mirrored, logistic units), batch {BATCH}, one thread, float32",
        "unit": "processor seconds of one SGD step on the same minibatch; means over whole cycles of 20 steps",
        "cycles": rounds,
        "costs": costs,
        "memory_bytes": {name: _fresh(name) for name in (*FACTORED, *ITERATIVE)},
        "targets": TARGETS,
        "met": {name: costs[name]["mean"] <= limit for name, limit in TARGETS.items()},
    }


def _costs(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean and median step of every optimiser over those of SGD, its largest step, and its mean seconds."""
    unit = seconds[SGD]
    return {
        name: {
            "mean": sum(values) / sum(unit),
            "median": statistics.median(values) / statistics.median(unit),
            "largest": max(values) / statistics.median(unit),
            "seconds": statistics.mean(values),
        }
        for name, values in seconds.items()
    }


def _once(make: Callable[..., Any], unit: float) -> dict[str, float]:
    """A single first step of an optimiser that takes minutes."""
    step = stepper(make)
    start = time.process_time()
    step()
    seconds = time.process_time() - start
    return {**dict.fromkeys(("mean", "median", "largest"), seconds / unit), "seconds": seconds}


def _fresh(name: str) -> float:
    code = f"import json, benchmarks.optimizers as b; print(json.dumps(b.memory({name!r})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(json.loads(out.stdout.splitlines()[-1]))


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'optimiser':34} {'mean':>7} {'median':>7} {'largest':>8} {'seconds':>8} {'MB':>6}"]
    for name, cost in result["costs"].items():
        limit, held = result["targets"].get(name), result["memory_bytes"].get(name.split(", 20 CG")[0])
        note = "" if limit is None else f"  (at most {limit}: {'met' if result['met'][name] else 'NOT met'})"
        lines.append(
            f"{name:34} {cost['mean']:7.2f} {cost['median']:7.2f} {cost['largest']:8.2f} {cost['seconds']:8.3f} "
            f"{'' if held is None else f'{held / 1e6:.0f}':>6}{note}"
        )
    return "\n".join(lines)
