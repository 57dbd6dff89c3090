"""What the penalty of earlier tasks costs: 784-100-100-10, batch 250, one thread, float32, 1 to 10 tasks.

The unit is one training step without a penalty (forward, loss, backward). Every number of tasks has its own posterior;
all of them and the plain step are measured in turn. The floor of a Kronecker term is two matrix products a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from benchmarks.workload import relu_network

SIZES, BATCH, EXAMPLES, STEPS = (784, 100, 100, 10), 250, 5000, 20
TASKS = (1, 2, 4, 6, 8, 10)
WAYS = {
    "keep": ("kron", "keep"),
    "sum": ("kron", "sum"),
    "project": ("kron", "project"),
    "project_kl": ("kron", "project_kl"),
    "diagonal": ("diag", "keep"),
}
PLAIN, TWO = "step", "two products a layer"


def run(rounds: int = 5) -> dict[str, Any]:
    """Extra cost of the penalty in training steps, bytes held, and cost of :meth:`update` in training epochs."""
    torch.set_num_threads(1)
    model, x, y, batches = relu_network(SIZES, EXAMPLES, BATCH)
    posteriors = {name: dict(_chain(model, x, y, *way)) for name, way in WAYS.items()}
    jobs: dict[str, Callable[[], Any]] = {PLAIN: partial(_steps, model, batches), TWO: _products()}
    for name, by_tasks in posteriors.items():
        for tasks, posterior in by_tasks.items():
            jobs[f"{name}, {tasks}"] = partial(_steps, model, batches, posterior)
    found = ratios(in_turn(jobs, rounds), PLAIN)
    extra = {
        name: {str(tasks): found[f"{name}, {tasks}"]["ratio"] - 1 for tasks in TASKS} for name in posteriors
    }  # fmt: skip
    updates = _updates(model, batches, posteriors, min(rounds, 3))
    return {
        "workload": f"{'-'.join(map(str, SIZES))}, batch {BATCH}, one thread, float32",
        "unit": f"processor seconds of one training step (forward, loss, backward), median of {rounds} rounds",
        "step_seconds": found[PLAIN]["seconds"] / STEPS,
        "two_products": found[TWO]["ratio"],
        "extra": extra,
        "costs": found,
        "bytes": {
            name: {str(tasks): _bytes(posterior) for tasks, posterior in by_tasks.items()}
            for name, by_tasks in posteriors.items()
        },
        "update_epochs": updates,
        "update_examples": EXAMPLES,
        "targets": {"project_flat": 1.25, "keep_linear": 1.25},
        "met": {
            "project_flat": (1 + extra["project"]["10"]) / (1 + extra["project"]["1"]) <= 1.25,
            "keep_linear": extra["keep"]["10"] <= 1.25 * 10 * extra["keep"]["1"],
        },
    }


def _chain(
    model: nn.Module, x: Tensor, y: Tensor, structure: str, terms: str
) -> Iterator[tuple[int, lk.LaplacePosterior]]:
    """Posteriors after the numbers of tasks asked for; the inputs are permuted from task to task."""
    rng = torch.Generator().manual_seed(1)
    weights = [p.detach().clone() for p in model.parameters()]
    posterior = None
    for tasks in range(1, max(TASKS) + 1):
        part = (x[:1000, torch.randperm(x.shape[1], generator=rng)], y[:1000])
        if posterior is None:
            posterior = lk.LaplacePosterior(model, "categorical", structure).fit(part)
        else:
            posterior = posterior.update(part, terms=terms)
        with torch.no_grad():  # so that no penalty is at its minimum
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=rng), alpha=1e-3)
        if tasks in TASKS:
            yield tasks, posterior
    with torch.no_grad():
        for p, weight in zip(model.parameters(), weights, strict=True):
            p.copy_(weight)


def _steps(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], posterior: lk.LaplacePosterior | None = None
) -> None:
    for k in range(STEPS):
        x, y = batches[k % len(batches)]
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss if posterior is None else loss + posterior.penalty() / EXAMPLES).backward()
    model.zero_grad()


def _products() -> Callable[[], None]:
    """``G Δ A`` of every layer and nothing else, as often as there are steps."""
    rng = torch.Generator().manual_seed(2)
    layers = [
        [torch.randn(shape, generator=rng) for shape in ((o, o), (o, i + 1), (i + 1, i + 1))]
        for i, o in itertools.pairwise(SIZES)
    ]

    def job() -> None:
        for _ in range(STEPS):
            for g, delta, a in layers:
                _ = g @ delta @ a

    return job


def _updates(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], posteriors: Any, rounds: int
) -> dict[str, dict[str, float]]:
    """Cost of another task after 1 and after most of them."""
    first, last = TASKS[0], TASKS[-1]
    jobs: dict[str, Callable[[], Any]] = {"epoch": lambda: epoch(model, batches)}
    for name, (_, terms) in WAYS.items():
        for tasks in (first, last):
            jobs[f"{name}, {tasks}"] = partial(posteriors[name][tasks].update, batches, terms=terms)
    found = ratios(in_turn(jobs, rounds), "epoch")
    return {name: {str(tasks): found[f"{name}, {tasks}"]["ratio"] for tasks in (first, last)} for name in WAYS}


def _bytes(posterior: lk.LaplacePosterior) -> int:
    """What a saved posterior holds: the chain of all tasks and the newest task's statistics."""
    return sum(tensor.numel() * tensor.element_size() for tensor in posterior.packed()[0].values())


def text(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [
        f"{result['workload']}; a step {1000 * result['step_seconds']:.2f} ms, the two products alone "
        f"{result['two_products']:.2f} steps",
        f"{'extra steps, tasks:':20} " + " ".join(f"{tasks:>7}" for tasks in TASKS),
    ]
    for name, extra in result["extra"].items():
        lines.append(f"{name:20} " + " ".join(f"{extra[str(tasks)]:7.2f}" for tasks in TASKS))
    lines.append("megabytes:")
    for name, held in result["bytes"].items():
        lines.append(f"{name:20} " + " ".join(f"{held[str(tasks)] / 1e6:7.1f}" for tasks in TASKS))
    lines.append("update, in epochs:")
    for name, cost in result["update_epochs"].items():
        lines.append(f"{name:20} " + ", ".join(f"{value:.2f} after {tasks}" for tasks, value in cost.items()))
    lines.append(", ".join(f"{name}: {'met' if value else 'NOT met'}" for name, value in result["met"].items()))
    return "\n".join(lines)
