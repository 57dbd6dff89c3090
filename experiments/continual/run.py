"""E25, E27, E28, E35: many tasks, one network, no earlier data. What keeps it from forgetting?

The tasks are one of ``streams.py``. The network learns them one after another with the penalty of each
method of ``methods.py``: online Laplace approximations (Kronecker with terms kept, projected and
summed; diagonal), Kronecker and diagonal EWC, Synaptic Intelligence, no protection, and joint training on all data.

The strength of each method (λ_c, or c times the number of examples of a task for Synaptic Intelligence) is the one with
the best accuracy over all tasks at the end on validation images; what is reported is on the test images.

Source: the thesis on Gauss-Newton matrices, section 5.4, figures 5.7 and 5.9, table 5.3.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.common import training
from experiments.common.claims import verdict_table
from experiments.continual import report
from experiments.continual.methods import LEARNERS, Method
from experiments.continual.settings import Config
from experiments.continual.streams import STREAMS
from experiments.continual.tasks import Pair, Stream, Task, joined
from laplace_kf import continual
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.registry import Registry
from laplace_kf.reports.html import Report

__all__ = ["Config", "check_names", "run", "searched", "sequence"]


OPTIMIZERS: Registry[Callable[[Config, list[nn.Parameter], float], torch.optim.Optimizer]] = Registry("optimiser")


@OPTIMIZERS.register("sgd")
def _sgd(config: Config, weights: list[nn.Parameter], factor: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, factor * config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


@OPTIMIZERS.register("adam")
def _adam(config: Config, weights: list[nn.Parameter], factor: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, factor * config.adam_lr)


RATES: Registry[Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]] = Registry("rates")
RATES.register("cosine")(torch.optim.lr_scheduler.CosineAnnealingLR)


@RATES.register("tenths")
def _tenths(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)


def check_names(config: Config) -> None:
    """Refuses names that are not registered (:class:`laplace_kf.errors.UnknownName`), before anything is run."""
    for name in config.methods:
        _ = LEARNERS[name]
    _ = STREAMS[config.stream], RATES[config.rates], OPTIMIZERS[config.optimizer], OPTIMIZERS[config.si_optimizer]


def sequence(
    config: Config, method: Method, strength: float, tasks: Sequence[Task], seed: int, checkpoint: Path | None = None
) -> dict[str, Any]:
    """All T tasks with one method.

    Args:
        config, method, strength, tasks, seed: what to do.
        checkpoint: file that holds everything after each finished task, so that an interrupted sequence goes on there;
            it is removed at the end, and left alone if it is one of other settings.

    Returns:
        Qualities ``[after task][on task]`` in ``val`` and ``test`` (T, T) and of the untrained network in ``untrained``
        (T,); ``strength``, ``seconds``, ``processor_seconds``, whether it ``diverged``, the relative ``errors`` of the
        curvature by update and block, and the stream's ``closing`` results.
    """
    wall, processor = time.perf_counter(), time.process_time()
    stream = STREAMS[config.stream]
    options = {"estimator": config.estimator} if config.estimator else {}
    options |= {argument: getattr(config, setting) for argument, setting in method.settings.items()}

    def start() -> tuple[nn.Module, continual.Learner]:
        model = stream.network(config, tasks, seed).to(config.device)
        return model, method.make(
            strength, len(tasks[0].train[0]), model=model, likelihood=stream.likelihood(config),
            parameters=stream.parameters, prior_precision=config.prior_precision,
            head_precision=config.prior_precision, **options,
        )  # fmt: skip

    model, learner = start()
    found: dict[str, Any] = {
        "val": [], "test": [], "untrained": [stream.quality(config, model, task, task.test) for task in tasks],
        "strength": strength, "diverged": False, "closing": {},
    }  # fmt: skip
    key = {**_key(asdict(config)), "strength": strength, "seed": seed}
    done = 0
    if checkpoint is not None and checkpoint.is_file():
        held = torch.load(checkpoint, weights_only=True)
        if held["key"] == key:
            found, done = held["found"], len(held["found"]["test"])
            for number in range(done):
                stream.begin(model, number, method.revisits)
            model.load_state_dict(held["model"])
            learner.load_state_dict(held["learner"])
            if isinstance(learner, continual.JointTraining):
                learner.revisit([task.train for task in tasks[:done]])
            wall, processor = wall - found["seconds"], processor - found["processor_seconds"]
    for number, task in enumerate(tasks):
        if number < done:
            continue
        if method.fresh and number:
            model, learner = start()
        stream.begin(model, number, method.revisits)
        # what the method trains on, as tensors: joint training has the earlier tasks' data too
        seen: Iterable[Any] = learner.training_data([task.train])
        batches = training.Batches(*joined(list(seen)), config.batch, training.generator(seed, task.train[0].device))
        explicit = method.decay and not (config.implicit and method.implicit)
        k = config.decay + (strength * getattr(config, method.decay) if explicit else 0.0)
        rate = continual.decayed_rate(1.0, number, k)
        try:
            _train(config, method, stream, model, learner, batches, task.val, rate, seed)
        except FloatingPointError:
            found["diverged"] = True
            break
        parts = list(zip(*(part.split(config.curvature_batch) for part in task.train), strict=True))
        draws = training.generator(1000 * seed + number)  # of estimators that draw: the same in every run
        learner.after_task(parts, forward=task.forward, generator=draws)
        for split in ("val", "test"):
            row = [stream.quality(config, model, other, getattr(other, split)) for other in tasks]
            # every task has its own network: the earlier ones are what they were
            found[split].append([*found[split][-1][:number], *row[number:]] if method.fresh and number else row)
        if checkpoint is not None:
            found |= {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
            partial = checkpoint.with_suffix(".writing")
            state = {"model": model.state_dict(), "learner": learner.state_dict()}
            torch.save({"key": key, "found": found, **state}, partial)
            partial.replace(checkpoint)
    else:
        found["closing"] = stream.closing(config, model, learner, tasks)
    posterior: LaplacePosterior | None = getattr(learner, "posterior", None)
    found["errors"] = [] if posterior is None else list(posterior.chain_errors)
    found["seconds"] = time.perf_counter() - wall
    found["processor_seconds"] = time.process_time() - processor
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return found


def _train(
    config: Config, method: Method, stream: Stream, model: nn.Module, learner: continual.Learner,
    batches: training.Batches, val: Pair, factor: float, seed: int,
) -> None:  # fmt: skip
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = OPTIMIZERS[getattr(config, method.optimizer)](config, weights, factor)
    schedule = RATES[config.rates](optimizer, config.epochs)
    count = len(batches.inputs)
    implicit = config.implicit and method.implicit and isinstance(optimizer, torch.optim.SGD)

    def before_step() -> None:
        learner.precondition_gradients(optimizer.param_groups[0]["lr"] / count)

    early = continual.EarlyStopping(config.patience, config.least_epochs) if config.patience else None

    def over() -> bool:
        assert early is not None
        inputs, targets = val
        return early.over(float(stream.loss(config)(training.outputs(model, inputs), targets)))

    training.train(
        model, batches, optimizer, config.epochs, loss=stream.loss(config), penalty=lambda: learner.penalty() / count,
        before_step=before_step if implicit else None, after_step=learner.after_step, scheduler=schedule,
        over=over if early else None, seed=seed,
        progress=f"{type(learner).__name__}, task {learner.tasks + 1}" if config.progress else None,
    )  # fmt: skip


def _score(found: dict[str, Any]) -> float:
    return -math.inf if found["diverged"] else sum(found["val"][-1]) / len(found["val"][-1])


def searched(config: Config, name: str, tasks: Sequence[Task], seed: int, folder: Path) -> list[dict[str, Any]]:
    """The sequences of a method at all its strengths; a finished one is kept in ``folder`` and used again."""
    method, tried = LEARNERS[name], []
    key = _key(asdict(config))
    for strength in method.strengths(config):
        part = folder / f"{seed}-{name.replace(' ', '_').replace(',', '')}-{strength:g}.json"
        if not part.is_file() or _key(json.loads(part.read_text())["config"]) != key:
            found = sequence(config, method, strength, tasks, seed, part.with_suffix(".pt"))
            part.write_text(json.dumps({"config": key, **found}))
        tried.append(json.loads(part.read_text()))
    return tried


def _key(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a sequence; settings that a result is too old to know have their default."""
    return {k: v for k, v in {**asdict(Config()), **config}.items() if k not in _NEUTRAL}


BATCH = "joint training"
_NEUTRAL = (
    "repeats", "seed", "methods", "multipliers", "multipliers_diag", "strengths", "progress", "threads", "device",
)  # fmt: skip


def run(config: Config, folder: Path) -> Report:
    """All methods, strengths and seeds; every finished sequence is kept in ``folder`` and used again."""
    check_names(config)
    folder.mkdir(parents=True, exist_ok=True)
    stream = STREAMS[config.stream]
    best: dict[str, list[dict[str, Any]]] = {name: [] for name in config.methods}
    scores: dict[str, Any] = {}
    for seed in range(config.seed, config.seed + config.repeats):
        given = stream.tasks(config, seed)
        for name in config.methods:
            tried = searched(config, name, given.tasks, seed, folder)
            scores[f"{seed}: {name}"] = {str(one["strength"]): _finite(_score(one)) for one in tried}
            best[name].append(max(tried, key=_score))
            if best[name][-1]["diverged"]:
                raise FloatingPointError(f"{name} diverged at every strength tried; use a smaller lr or more decay")
    tasks = given.tasks
    runs = [{name: report.numbers(found[i]) for name, found in best.items()} for i in range(config.repeats)]
    claims = [c.judge(runs) for c in stream.claims if c.method in best and c.other in best]
    tables = [report.methods_table(stream.measure, runs, chosen=any(len(tried) > 1 for tried in scores.values()))]
    if len(tasks) <= report.FEW:
        last = {name: [one["test"][-1] for one in found] for name, found in best.items()}
        tables.append(report.task_table(stream.measure, tasks, last, stream.published))
    closing = {name: [one["closing"] for one in found] for name, found in best.items()}
    if BATCH in closing and closing[BATCH][0]:
        tables.append(report.batch_table(closing, BATCH, config.noise))
    main = config.methods[0]
    matrices = {name: [one["test"] for one in found] for name, found in best.items()}
    what = f"{len(tasks)} tasks of {stream.title}, {config.repeats} seed(s), {config.epochs} epochs a task."
    summary = f"{what} {report.described(tasks, given.absent, given.remarks)} All numbers are on test data."
    return Report(
        title=f"Continual learning: {stream.title}",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={name: {k: [run[name][k] for run in runs] for k in runs[0][name]} for name in config.methods},
        tables=[*tables, *([verdict_table(claims)] if claims else [])],
        pictures=[
            report.progress_picture(stream, {name: [report.curve(one) for one in best[name]] for name in best}),
            report.heat_map(stream, tasks, main, matrices[main]),
        ],
        details={
            "verdicts": claims,
            **report.quoted(summary, tables),
            "validation": scores,
            "tasks": [task.name for task in tasks],
            "absent": dict(given.absent),
            "remarks": dict(given.remarks),
            "published": stream.published,
            "matrices": matrices,
            "curvature_errors": {name: [one["errors"] for one in found] for name, found in best.items()},
        },
        device=config.device,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
