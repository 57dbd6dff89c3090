"""E25, E27: many tasks, one network with one head, no earlier data. What keeps it from forgetting?

Permuted MNIST: the digits with their pixels in another fixed order for every task (the first task's is as written).
Disjoint MNIST: digits 0 to 4, then 5 to 9, both as a ten-way problem. A 784-100-100-10 ReLU network learns the tasks
one after another with the penalty of each method; online Laplace approximations (Kronecker with terms kept, projected
and summed; diagonal), Kronecker and diagonal EWC, Synaptic Intelligence, no protection, and joint training on all data.

The strength of each method (λ_c, or c times the number of examples of a task for Synaptic Intelligence) is the one with
the best accuracy over all tasks at the end on validation images; what is reported is on the test images.

Source: the thesis on Gauss-Newton matrices, sections 5.4.1 and 5.4.2, figures 5.7 and 5.9.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments import data, training
from experiments.claims import Claim, verdict_table
from laplace_kf import continual
from laplace_kf.registry import Registry
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["Config", "run"]

Pair = tuple[Tensor, Tensor]


@dataclass
class Config:
    """Settings of E25 and E27; the defaults are those of ``configs/continual_permuted.yaml``.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for weights, order and permutations.
        repeats: number of seeds.
        device: ``cpu`` or ``cuda``.
        threads: processor threads, 0 for torch's default.
        stream: the tasks.
        tasks: how many permuted tasks; disjoint MNIST has two.
        methods: which to run, from the registered ones.
        hidden: width of the two hidden layers.
        epochs: passes over each task.
        batch: examples per minibatch.
        curvature_batch: examples per minibatch of curvature passes.
        lr: step size of SGD with Nesterov momentum, a cosine to zero within each task.
        momentum: its momentum.
        adam_lr: step size of Adam, which Synaptic Intelligence uses.
        decay_kron: the step size of task t is divided by ``1 + decay · λ_c · t`` for Kronecker structures.
        decay_diag: likewise for diagonal ones.
        prior_precision: ``λ``.
        multipliers: grid for ``λ_c``.
        strengths: grid for ``c``.
        train_size: training images of a task.
        val_size: validation images of a task, the last of the training file.
        test_size: test images of a task.
        progress: whether to show progress bars.
    """

    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    threads: int = 0
    stream: Literal["permuted", "disjoint"] = "permuted"
    tasks: int = 10
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    hidden: int = 100
    epochs: int = 5
    batch: int = 250
    curvature_batch: int = 1000
    lr: float = 0.1
    momentum: float = 0.9
    adam_lr: float = 1e-3
    decay_kron: float = 0.0
    decay_diag: float = 0.0
    prior_precision: float = 1.0
    multipliers: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0])
    strengths: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    train_size: int = 55_000
    val_size: int = 5_000
    test_size: int = 10_000
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "tasks", "hidden", "epochs", "batch", "curvature_batch", "train_size", "val_size",
                     "test_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least 1")
        for name in ("lr", "adam_lr", "prior_precision"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be above 0")
        for name in ("multipliers", "strengths"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be a list of numbers above 0")
        if self.train_size + self.val_size > 60_000:
            raise ValueError(f"train_size + val_size = {self.train_size + self.val_size}; MNIST has 60000 images")
        if not self.methods:
            raise ValueError("methods is empty; leave it out for all of them")
        for name in self.methods:
            _ = METHODS[name]


@dataclass(frozen=True)
class Task:
    """Images ``(N, 784)`` with digits ``(N,)``."""

    train: Pair
    val: Pair
    test: Pair


@dataclass(frozen=True)
class Method:
    """How a learner is made, and how it is trained.

    Args:
        make: ``(network, strength, λ, examples of a task) -> learner``.
        grid: name of the setting that holds its strengths; empty if it has none.
        decay: name of the setting that shortens its steps from task to task; empty for none.
        adam: whether it is trained by Adam.
    """

    make: Callable[[nn.Module, float, float, int], continual.Learner]
    grid: str = "multipliers"
    decay: str = "decay_kron"
    adam: bool = False


def _online(structure: str, terms: str) -> Callable[[nn.Module, float, float, int], continual.Learner]:
    def make(model: nn.Module, strength: float, prior: float, count: int) -> continual.Learner:
        return continual.OnlineLaplace(model, "categorical", structure, strength, prior, terms=terms)

    return make


METHODS: Registry[Method] = Registry("continual learning method")
METHODS.register("Kronecker online")(Method(_online("kron", "keep")))
METHODS.register("Kronecker online, projected")(Method(_online("kron", "project")))
METHODS.register("Kronecker online, summed")(Method(_online("kron", "sum")))
METHODS.register("diagonal online")(Method(_online("diag", "keep"), decay="decay_diag"))
METHODS.register("Kronecker EWC")(Method(lambda m, s, p, n: continual.EWC(m, "categorical", "kron", s, p)))
METHODS.register("diagonal EWC")(
    Method(lambda m, s, p, n: continual.EWC(m, "categorical", "diag", s, p), decay="decay_diag")
)
METHODS.register("Synaptic Intelligence")(
    Method(
        lambda m, s, p, n: continual.SynapticIntelligence(m, "categorical", prior_precision=p, c=s * n),
        grid="strengths", decay="", adam=True,
    )
)  # fmt: skip
METHODS.register("fine-tuning")(
    Method(lambda m, s, p, n: continual.FineTuning(m, "categorical", prior_precision=p), grid="", decay="")
)
METHODS.register("joint training")(
    Method(lambda m, s, p, n: continual.JointTraining(m, "categorical", prior_precision=p), grid="", decay="")
)

STREAMS: Registry[Callable[[Config, int], list[Task]]] = Registry("task stream")


def _images(config: Config) -> Task:
    (x, y), (x_test, y_test) = data.images("mnist", "train"), data.images("mnist", "test")
    device = torch.device(config.device)
    parts = [(x, y), (x_test, y_test)]
    (x, y), (x_test, y_test) = [(images.flatten(1).to(device), labels.to(device)) for images, labels in parts]
    size, val = config.train_size, config.val_size
    return Task((x[:size], y[:size]), (x[-val:], y[-val:]), (x_test[: config.test_size], y_test[: config.test_size]))


@STREAMS.register("permuted")
def _permuted(config: Config, seed: int) -> list[Task]:
    base, rng = _images(config), training.generator(seed)
    tasks = [base]
    for _ in range(config.tasks - 1):
        order = torch.randperm(784, generator=rng).to(base.train[0].device)
        tasks.append(Task(*((x[:, order], y) for x, y in (base.train, base.val, base.test))))
    return tasks


@STREAMS.register("disjoint")
def _disjoint(config: Config, seed: int) -> list[Task]:
    base = _images(config)

    def part(pair: Pair, low: int) -> Pair:
        chosen = (pair[1] >= low) & (pair[1] < low + 5)
        return pair[0][chosen], pair[1][chosen]

    return [Task(part(base.train, low), part(base.val, low), part(base.test, low)) for low in (0, 5)]


def _sequence(config: Config, method: Method, strength: float, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    """All tasks with one method: accuracies ``[after task][on task]`` on validation and test images, and seconds."""
    start = time.perf_counter()
    model = training.mlp([784, config.hidden, config.hidden, 10], seed=seed).to(config.device)
    untrained = [continual.accuracy(model, task.test) for task in tasks]
    learner = method.make(model, strength, config.prior_precision, len(tasks[0].train[0]))
    found: dict[str, Any] = {"val": [], "test": [], "untrained": untrained, "strength": strength, "diverged": False}
    for number, task in enumerate(tasks):
        # what the method trains on, as tensors: joint training has the earlier tasks' data too
        joined = list(learner.training_data([task.train]))
        inputs, targets = torch.cat([x for x, _ in joined]), torch.cat([y for _, y in joined])
        batches = training.Batches(inputs, targets, config.batch, training.generator(seed, inputs.device))
        k = strength * getattr(config, method.decay) if method.decay else 0.0
        try:
            _train(config, method, model, learner, batches, continual.decayed_rate(1.0, number, k), seed)
        except FloatingPointError:
            found["diverged"] = True
            break
        learner.after_task(list(zip(*(part.split(config.curvature_batch) for part in task.train), strict=True)))
        for split in ("val", "test"):
            found[split].append([continual.accuracy(model, getattr(other, split)) for other in tasks])
    found["seconds"] = time.perf_counter() - start
    return found


def _train(
    config: Config, method: Method, model: nn.Module, learner: continual.Learner, batches: training.Batches,
    factor: float, seed: int,
) -> None:  # fmt: skip
    optimizer: torch.optim.Optimizer
    if method.adam:
        optimizer = torch.optim.Adam(model.parameters(), factor * config.adam_lr)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), factor * config.lr, momentum=config.momentum, nesterov=config.momentum > 0
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    count = len(batches.inputs)
    training.train(
        model, batches, optimizer, config.epochs, penalty=lambda: learner.penalty() / count,
        after_step=learner.after_step, scheduler=schedule, seed=seed,
        progress=f"{type(learner).__name__}, task {learner.tasks + 1}" if config.progress else None,
    )  # fmt: skip


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    matrix = torch.tensor(found["test"], dtype=torch.float64)
    baseline = torch.tensor(found["untrained"], dtype=torch.float64)
    return {
        "average": float(continual.average_accuracy(matrix)[-1]),
        "first": float(matrix[-1, 0]),
        "latest": float(matrix[-1, -1]),
        "minimum": float(matrix[-1].min()),
        "forgetting": float(continual.forgetting(matrix)),
        "forward_transfer": float(continual.forward_transfer(matrix, baseline)),
        "strength": found["strength"],
        "seconds": found["seconds"],
    }


def _score(found: dict[str, Any]) -> float:
    return -math.inf if found["diverged"] else sum(found["val"][-1]) / len(found["val"][-1])


CLAIMS = [
    Claim("Kronecker above diagonal", "average", "Kronecker online", "diagonal online", least=0.0),
    Claim("Kronecker above Synaptic Intelligence", "average", "Kronecker online", "Synaptic Intelligence", least=0.0),
    Claim("within 2 points of joint training", "average", "Kronecker online", "joint training", least=-0.02),
    Claim("projected keeps 99 % of kept", "average", "Kronecker online, projected", "Kronecker online", least=-0.01),
]


def run(config: Config, folder: Path) -> Report:
    """All methods, strengths and seeds; every finished sequence is kept in ``folder`` and used again."""
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, dict[str, float]]] = []
    curves: dict[str, list[list[float]]] = {}
    searched: dict[str, Any] = {}
    for seed in range(config.seed, config.seed + config.repeats):
        tasks = STREAMS[config.stream](config, seed)
        numbers: dict[str, dict[str, float]] = {}
        for name in config.methods:
            method = METHODS[name]
            tried = []
            for strength in getattr(config, method.grid) if method.grid else [1.0]:
                part = folder / f"{seed}-{name.replace(' ', '_').replace(',', '')}-{strength:g}.json"
                key = {k: v for k, v in asdict(config).items() if k not in _NEUTRAL}
                if not part.is_file() or json.loads(part.read_text())["config"] != key:
                    found = _sequence(config, method, strength, tasks, seed)
                    part.write_text(json.dumps({"config": key, **found}))
                tried.append(json.loads(part.read_text()))
            best = max(tried, key=_score)
            searched[f"{seed}: {name}"] = {str(one["strength"]): _finite(_score(one)) for one in tried}
            if best["diverged"]:
                raise FloatingPointError(f"{name} diverged at every strength tried; use a smaller lr or more decay")
            numbers[name] = _numbers(best)
            curves.setdefault(name, []).append([sum(row[: t + 1]) / (t + 1) for t, row in enumerate(best["test"])])
        runs.append(numbers)
    claims = [c.judge(runs) for c in CLAIMS if c.method in config.methods and c.other in config.methods]
    table = _table(config, runs)
    what = f"{len(tasks)} tasks of {config.stream} MNIST, {config.repeats} seed(s), {config.epochs} epochs a task."
    return Report(
        title=f"Continual learning: {config.stream} MNIST",
        summary=what + " Accuracies are on the test images of all tasks after the last one.",
        seed=config.seed,
        config=asdict(config),
        metrics={name: {k: [run[name][k] for run in runs] for k in runs[0][name]} for name in config.methods},
        tables=[table, *([verdict_table(claims)] if claims else [])],
        pictures=[_picture(config, curves)],
        details={"verdicts": claims, "validation": searched},
        device=config.device,
    )


_NEUTRAL = ("repeats", "seed", "methods", "multipliers", "strengths", "progress", "threads", "device")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(config: Config, runs: Sequence[dict[str, dict[str, float]]]) -> Table:
    def mean(name: str, key: str) -> float:
        return sum(run[name][key] for run in runs) / len(runs)

    keys = ("average", "first", "latest", "minimum", "forgetting", "forward_transfer")
    rows = [
        [name, *(f"{100 * mean(name, key):.2f}" for key in keys), f"{mean(name, 'strength'):g}",
         f"{mean(name, 'seconds'):.0f}"]
        for name in config.methods
    ]  # fmt: skip
    columns = ["method", "average", "first task", "latest task", "worst task", "forgetting", "forward transfer",
               "strength", "seconds"]  # fmt: skip
    return Table("Accuracy in per cent after the last task", columns, rows, "Strengths were chosen on validation data.")


def _picture(config: Config, curves: dict[str, list[list[float]]]) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in curves.items():
        mean = torch.tensor(found, dtype=torch.float64).mean(0)
        axes.plot(range(1, len(mean) + 1), (100 * mean).tolist(), marker="o", markersize=3, label=name)
    axes.set(xlabel="tasks learned", ylabel="mean test accuracy over them (%)")
    axes.legend(fontsize="small")
    return Picture("accuracy", figure, f"Mean test accuracy over the tasks seen so far, {config.stream} MNIST.")
