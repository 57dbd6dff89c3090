"""Error against cost of the factor estimators on a trained and an untrained 784-1024-1024-10 network (MNIST).

The error is the relative Frobenius distance of the output factors ``G`` of the two hidden layers, and of the whole
hidden-layer products, from the exact ones over 10,000 training images; the cost is processor time over the exact
estimator's, in turn in one process on one thread.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import in_turn, ratios
from experiments.common import data, training
from laplace_kf.operators import KroneckerBlock

IMAGES, BATCH, DRAWS = 10_000, 1000, 3
ESTIMATORS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "sampled, 1": {"estimator": "sampled", "samples": 1},
    "sampled, 10": {"estimator": "sampled", "samples": 10},
    "projection, 1": {"estimator": "projection", "samples": 1},
    "projection, 10": {"estimator": "projection", "samples": 10},
    "importance, 0.25": {"estimator": "importance", "columns": 0.25},
    "importance, 0.5": {"estimator": "importance", "columns": 0.5},
    "importance, 1": {"estimator": "importance", "columns": 1.0},
    "importance, 2": {"estimator": "importance", "columns": 2.0},
}


def run(rounds: int = 5) -> dict[str, Any]:
    """Errors and costs of every estimator, trained and untrained."""
    x, y = data.images("mnist", "train")
    x = x.reshape(len(x), -1)
    model = training.mlp([784, 1024, 1024, 10], seed=0)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"untrained": _compare(model, x[:IMAGES], y[:IMAGES], rounds)}
    accuracy = _train(model, x, y)
    result["trained"] = _compare(model, x[:IMAGES], y[:IMAGES], rounds)
    result["training_accuracy"] = accuracy
    one = result["trained"]["importance, 1"]
    result["met"] = {
        "training accuracy at least 0.99": accuracy >= 0.99,
        "importance, 1: hidden-layer factor error at most 0.01": max(one["error_G1"], one["error_G2"]) <= 0.01,
        "importance, 1: cost at most 0.25 of exact": one["cost"] <= 0.25,
    }
    result["workload"] = f"784-1024-1024-10 on MNIST, {IMAGES} training images, batch {BATCH}, one thread, float32"
    result["draws"] = DRAWS
    return result


def _train(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Adam until 99.2 % training accuracy; returns it."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    accuracy = 0.0
    for number in range(20):
        training.train(model, training.Batches(x, y, 250, training.generator(number)), optimizer, 1)
        accuracy = float((training.outputs(model, x).argmax(1) == y).double().mean())
        if accuracy >= 0.992:
            break
    return accuracy


def _compare(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]

    def estimate(seed: int = 0, **options: Any) -> Any:
        return lk.curvature.estimate(model, "categorical", batches, generator=training.generator(seed), **options)

    exact = _factors(estimate(estimator="exact"))
    jobs = {name: partial(estimate, **options) for name, options in ESTIMATORS.items()}
    cost = ratios(in_turn(jobs, rounds), "exact")
    out = {}
    for name, options in ESTIMATORS.items():
        draws = [_errors(_factors(estimate(seed, **options)), exact) for seed in range(DRAWS if name != "exact" else 1)]
        mean = {key: statistics.mean(draw[key] for draw in draws) for key in draws[0]}
        out[name] = {"cost": cost[name]["ratio"], "seconds": cost[name]["seconds"], **mean}
    return out


def _factors(stats: Any) -> list[KroneckerBlock]:
    return [matrix for _, matrix in stats.mean().entries]


def _errors(found: list[KroneckerBlock], exact: list[KroneckerBlock]) -> dict[str, float]:
    out = {}
    for number in (0, 1):
        mine, true = found[number], exact[number]
        out[f"error_G{number + 1}"] = float((mine.outputs - true.outputs).norm() / true.outputs.norm())
        # the product's error: ‖A⊗G − A'⊗G'‖ through inner products of the factors
        inner = float((mine.outputs * true.outputs).sum() * (mine.inputs * true.inputs).sum())
        norms = [float(b.outputs.double().norm() * b.inputs.double().norm()) ** 2 for b in (mine, true)]
        out[f"error_block{number + 1}"] = max(0.0, norms[0] - 2 * inner + norms[1]) ** 0.5 / norms[1] ** 0.5
    return out


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"training accuracy {result['training_accuracy']:.4f}"]
    for state in ("trained", "untrained"):
        lines.append(f"{state + ':':20} {'cost / exact':>12} {'error G1':>10} {'error G2':>10}")
        for name, row in result[state].items():
            lines.append(f"{name:20} {row['cost']:12.3f} {row['error_G1']:10.2%} {row['error_G2']:10.2%}")
    lines += [f"{claim}: {'met' if met else 'NOT met'}" for claim, met in result["met"].items()]
    return "\n".join(lines)
