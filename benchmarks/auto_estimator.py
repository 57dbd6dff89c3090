"""``estimator="auto"`` beside sampling and exact factors, 784-1024-1024-10, trained and untrained (MNIST).

Errors are relative Frobenius distances of whole Kronecker blocks from the exact ones, in root mean square over draws;
costs are processor seconds over those of a training epoch of the same minibatches, in turn in one process on one
thread. A fit is all of ``LaplacePosterior.fit``.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from experiments.common import data, training
from laplace_kf.operators import KroneckerBlock

IMAGES, BATCH, DRAWS, WANTED = 10_000, 250, 2, 0.992
ESTIMATORS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "sampled, 1": {"estimator": "sampled", "samples": 1},
    "sampled, 10": {"estimator": "sampled", "samples": 10},
    "importance, 1": {"estimator": "importance", "columns": 1.0},
    "auto, 5 %": {"estimator": "auto", "tolerance": 0.05},
    "auto, 1 %": {"estimator": "auto"},
    "auto, 0.1 %": {"estimator": "auto", "tolerance": 0.001},
}
LIMIT = 1.2  # training epochs of a whole fit


def run(rounds: int = 5) -> dict[str, Any]:
    """Errors and costs of every estimator, trained and untrained."""
    x, y = data.images("mnist", "train")
    x, y = x[:IMAGES].reshape(IMAGES, -1), y[:IMAGES]
    torch.set_num_threads(1)
    model = training.mlp([784, 1024, 1024, 10], seed=0)
    result: dict[str, Any] = {"untrained": _compare(model, x, y, rounds)}
    accuracy = _train(model, x, y)
    result |= {"trained": _compare(model, x, y, rounds), "training_accuracy": accuracy}
    auto = result["trained"]["auto, 1 %"]
    result["met"] = {
        "trained, auto, 1 %: blocks within 0.01 of exact": max(auto["errors"]) <= 0.01,
        f"trained, auto, 1 %: whole fit at most {LIMIT} training epochs": auto["epochs"] <= LIMIT,
        **{f"{state}, auto, 1 %: better than sampling at equal cost": _dominates(result[state])
           for state in ("trained", "untrained")},
    }  # fmt: skip
    result["workload"] = f"784-1024-1024-10 on {IMAGES} images of MNIST, batch {BATCH}, one thread, float32"
    return result


def _train(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Adam until so much of these images is right; how much is."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    accuracy = 0.0
    for number in range(30):
        training.train(model, training.Batches(x, y, 50, training.generator(number)), optimizer, 1)
        accuracy = float((training.outputs(model, x).argmax(1) == y).double().mean())
        if accuracy >= WANTED:
            break
    return accuracy


def _compare(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]

    def fitted(seed: int = 0, **options: Any) -> list[KroneckerBlock]:
        posterior = lk.LaplacePosterior(model, "categorical", **options)
        posterior.fit(batches, generator=training.generator(seed))
        return [matrix for _, matrix in posterior.curvature.entries if isinstance(matrix, KroneckerBlock)]

    jobs: dict[str, Any] = {"training epoch": partial(epoch, model, batches)}
    jobs |= {name: partial(fitted, **options) for name, options in ESTIMATORS.items()}
    cost = ratios(in_turn(jobs, rounds), "training epoch")
    exact, found = fitted(), {}
    for name, options in ESTIMATORS.items():
        draws = [[_error(*pair) ** 2 for pair in zip(fitted(seed, **options), exact, strict=True)]
                 for seed in range(DRAWS)]  # fmt: skip
        errors = [statistics.mean(block) ** 0.5 for block in zip(*draws, strict=True)]
        found[name] = {"epochs": cost[name]["ratio"], "seconds": cost[name]["seconds"], "errors": errors}
    return found


def _error(mine: KroneckerBlock, true: KroneckerBlock) -> float:
    """``‖G⊗A − G'⊗A'‖`` over ``‖G'⊗A'‖``: with a common A that of G, else through both factors' distances."""
    (g, h), (a, b) = ((one.double(), two.double()) for one, two in
                      ((mine.outputs, true.outputs), (mine.inputs, true.inputs)))  # fmt: skip
    # G⊗A − H⊗B = (G − H)⊗A + H⊗(A − B)
    dg, da = g - h, a - b
    total = (dg.norm() * a.norm()).square() + (h.norm() * da.norm()).square()
    total = total + 2 * (dg * h).sum() * (a * da).sum()
    return float(total.clamp_min(0).sqrt() / (h.norm() * b.norm()))


def _dominates(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether ``auto`` is closer than sampling for the same seconds.

    What a draw costs and by how much it is off follow from 1 and 10 of them: seconds grow with their number, errors
    with one over its root.
    """
    one, ten, auto = rows["sampled, 1"], rows["sampled, 10"], rows["auto, 1 %"]
    each = (ten["epochs"] - one["epochs"]) / 9
    draws = max(1.0, 1 + (auto["epochs"] - one["epochs"]) / each)
    return all(mine <= other / draws**0.5 for mine, other in zip(auto["errors"], one["errors"], strict=True))


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"training accuracy {result['training_accuracy']:.4f}"]
    for state in ("trained", "untrained"):
        lines.append(f"{state + ':':16} {'epochs':>8}  errors of the blocks")
        for name, row in result[state].items():
            lines.append(f"{name:16} {row['epochs']:8.2f}  {', '.join(f'{error:.3%}' for error in row['errors'])}")
    lines += [f"{claim}: {'met' if met else 'NOT met'}" for claim, met in result["met"].items()]
    return "\n".join(lines)
