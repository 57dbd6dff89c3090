"""Influence of 5,000 training examples on 500 queries of a 784-128-64-10 network, in training epochs, one thread.

An epoch is forward and backward over the 5,000 examples in minibatches of 64, no optimiser step; everything is measured
in turn in one process. The posteriors are fitted, and their eigendecompositions made, before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from benchmarks.workload import relu_network

SIZES, TRAIN, QUERIES, BATCH, STEPS = (784, 128, 64, 10), 5000, 500, 64, 300
LIMIT = 3.0  # epochs, for all pairs


def run(rounds: int = 5) -> dict[str, Any]:
    """Costs in epochs, errors against the scores without approximation, and whether the limit holds."""
    torch.set_num_threads(1)
    model, x, y, batches = relu_network(SIZES, TRAIN, BATCH)
    _train(model, batches)
    train, queries = (x, y), (torch.rand(QUERIES, SIZES[0], generator=torch.Generator().manual_seed(1)), y[:QUERIES])
    exact = lk.LaplacePosterior(model, "categorical").fit(train)
    factored = lk.LaplacePosterior(model, "categorical", damping="factored").fit(train)
    groups = torch.arange(TRAIN) // 50

    def scores(posterior: lk.LaplacePosterior, accuracy: float | None = None) -> Callable[[], Tensor]:
        return lambda: lk.attribution.influence(posterior, train, queries, accuracy=accuracy)

    jobs: dict[str, Callable[[], Any]] = {
        "epoch": lambda: epoch(model, batches),
        "influence, factored damping": scores(factored),
        "influence, exact damping": scores(exact),
        "influence, exact damping, accuracy 1e-2": scores(exact, 1e-2),
        "group influence, factored damping, 100 groups": lambda: lk.attribution.group_influence(
            factored, train, queries, groups
        ),
        "self-influence, exact damping": lambda: lk.attribution.self_influence(exact, train),
    }
    cost = ratios(in_turn(jobs, rounds), "epoch")
    whole = scores(exact)()
    rough = scores(exact, 1e-2)()
    return {
        "workload": f"{'-'.join(map(str, SIZES))}, {TRAIN} x {QUERIES} pairs, batches of {BATCH}, one thread, float32",
        "costs": cost,
        "error_of_accuracy_1e-2": float((rough - whole).norm() / whole.norm()),
        "met": {
            f"all pairs within {LIMIT:g} epochs, factored damping": cost["influence, factored damping"]["ratio"]
            <= LIMIT,
            f"all pairs within {LIMIT:g} epochs, exact damping": cost["influence, exact damping"]["ratio"] <= LIMIT,
        },
    }


def _train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Some steps, so that gradients differ from those of an untrained network."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(STEPS):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'job':48} {'epochs':>7} {'seconds':>8}"]
    lines += [f"{name:48} {cost['ratio']:7.2f} {cost['seconds']:8.3f}" for name, cost in result["costs"].items()]
    lines.append(f"relative error of accuracy=1e-2: {result['error_of_accuracy_1e-2']:.1e}")
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
