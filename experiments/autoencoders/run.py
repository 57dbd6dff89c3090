"""E1, E2, E12, E14, E15: deep autoencoders from one sparse initialisation, trained by every optimiser in one budget.

CURVES (784-400-200-100-50-25-6, ``curves.py``), MNIST (784-1000-500-250-30) and, on request (``problems=[faces]``,
``[curves14]``), FACES (625-2000-1000-500-30, ``faces.py``) or CURVES of 14x14 pixels (196-100-50-25-10), decoders
mirrored, sigmoid hidden units, a linear code, sigmoid outputs; the loss is the binary cross-entropy summed over pixels,
averaged over cases, plus ``l2/2 ‖θ‖²``. Every method gets the same
seconds of processor time on one thread, so that other load on the machine does not matter; the clock stands still while
training and test data are evaluated. A method with a grid first runs every setting for ``pilot`` of the budget; the one
with the lowest training loss then starts again and gets all of it. Where the learning rate is halved by shares of a run
(the published grid of the first-order methods), every setting gets all of it.

Finished runs are kept in ``parts`` of the results folder and used again by later runs with the same settings, so that
the table can be made in pieces: ``python -m experiments run E14 problems=[curves] methods=[Adam]``. The report is on
all runs that are there. E1, E2, E12 and E15 are rows of it.

Sources: Martens 2016, 4.12 and 6.13 (networks, data, metric); Botev 2020, 4.5.1, and Botev et al. 2017,
F.1 (batch size, Adam's grid).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.autoencoders import faces, report
from experiments.autoencoders.curves import REMARK, curves
from experiments.autoencoders.methods import OPTIMISERS, STANDARD, Method, Setting
from experiments.common import data, training
from experiments.common.checks import require
from laplace_kf.errors import LaplaceKFError
from laplace_kf.optim import sparse_init_
from laplace_kf.optim.schedules import averaging_weight
from laplace_kf.registry import Registry
from laplace_kf.reports import machine, versions
from laplace_kf.reports.html import Report, Table

__all__ = ["PROBLEMS", "Config", "Problem", "network", "run"]


USUAL = "curves", "mnist"
"""Problems of a run that names none."""


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/autoencoders.yaml``.

    Args:
        seed: of initial weights, order of the images, CURVES, and everything that methods draw.
        threads: processor threads; comparisons in processor time need one.
        problems: which data sets to run now.
        methods: which optimisers to run now.
        budgets: seconds of processor time of every method, by problem.
        pilot: share of the budget for every setting of a grid.
        updates: updates at most, whatever the budget; 0 for no limit.
        l2: coefficient η of the regulariser, the same for all methods.
        averaging: limit of the average of the iterates, which is evaluated beside the iterate (methods 6.3).
        spacing: the objective is evaluated after ``1, s, s², ...`` updates, rounded up.
        watched: training images, and test images, on which it is evaluated there; the last evaluation is on all.
        train_most: training images at most.
        test_most: test images at most.
        shrink: hidden widths are divided by it, for trials.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    problems: list[str] = field(default_factory=lambda: [*USUAL])
    methods: list[str] = field(default_factory=lambda: list(STANDARD))
    budgets: dict[str, float] = field(default_factory=lambda: {"curves": 240.0, "mnist": 420.0, "faces": 900.0})
    pilot: float = 0.2
    updates: int = 0
    l2: float = 1e-5
    averaging: float = 0.99
    spacing: float = 1.2
    watched: int = 1_000
    train_most: int = 60_000
    test_most: int = 10_000
    shrink: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("watched", "train_most", "test_most", "shrink"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("updates", "threads", "l2"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        require("pilot", self.pilot, 0 < self.pilot <= 1, "above 0 and at most 1")
        require("averaging", self.averaging, 0 <= self.averaging < 1, "at least 0 and below 1")
        require("spacing", self.spacing, self.spacing > 1, "above 1")
        for name in ("problems", "methods"):
            require(name, getattr(self, name), bool(getattr(self, name)), "a list of one name or more")
        for name in self.problems:
            require("budgets", self.budgets, PROBLEMS[name] and self.budgets.get(name, 0) > 0, f"above 0 for {name}")
        for name in self.methods:
            _ = OPTIMISERS[name]


@dataclass(frozen=True)
class Problem:
    """Images and the encoder's widths.

    Args:
        widths: from the image to the code; the decoder mirrors them.
        load: ``seed -> (training images (N, 784), test images (N, 784))`` with values in [0, 1].
    """

    widths: tuple[int, ...]
    load: Callable[[int], tuple[Tensor, Tensor]]


PROBLEMS: Registry[Problem] = Registry("autoencoder problem")


def _curves(seed: int) -> tuple[Tensor, Tensor]:
    images = curves(30_000, training.generator(seed))
    return images[:20_000], images[20_000:]


def _small_curves(seed: int) -> tuple[Tensor, Tensor]:
    """Every pixel the mean of four; the first 4,000 images and the last 1,000."""
    train, test = (nn.functional.avg_pool2d(images.reshape(-1, 28, 28), 2).flatten(1) for images in _curves(seed))
    return train[:4000], test[-1000:]


def _mnist(seed: int) -> tuple[Tensor, Tensor]:
    train, test = (data.images("mnist", split)[0].flatten(1) for split in ("train", "test"))
    return train, test


def _faces(seed: int) -> tuple[Tensor, Tensor]:
    photographs, _ = data.images("olivetti", "train")
    chosen = faces.pairs(faces.PAIRS, training.generator(seed))
    return faces.augmented(photographs[:250], chosen), faces.augmented(photographs[-100:], chosen)


PROBLEMS.register("curves")(Problem((784, 400, 200, 100, 50, 25, 6), _curves))
PROBLEMS.register("mnist")(Problem((784, 1000, 500, 250, 30), _mnist))
PROBLEMS.register("curves14")(Problem((196, 100, 50, 25, 10), _small_curves))
PROBLEMS.register("faces")(Problem((625, 2000, 1000, 500, 30), _faces))


def network(widths: Sequence[int], seed: int) -> nn.Sequential:
    """The autoencoder with an encoder of these widths, sparsely initialised (methods 7.10); its outputs are logits."""
    mirrored = [*widths, *reversed(widths[:-1])]
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(pairwise(mirrored), 1):
        layers.append(nn.Linear(fan_in, fan_out))
        if number not in (len(widths) - 1, len(mirrored) - 1):
            layers.append(nn.Sigmoid())
    model = nn.Sequential(*layers)
    sparse_init_(model, generator=training.generator(seed))
    return model


def _stream(images: Tensor, size: Callable[[int], int], rng: torch.Generator) -> Iterator[Tensor]:
    """Minibatches ``(size(n), 784)``, n = 1, 2, ..., in a new order every epoch; an epoch's rest is left out."""
    number = 1
    while True:
        order, start = torch.randperm(len(images), generator=rng), 0
        while (end := start + min(size(number), len(images))) <= len(images):
            yield images[order[start:end]]
            start, number = end, number + 1


@torch.no_grad()
def _errors(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Cross-entropy and squared reconstruction error, summed over pixels, averaged over ``images (N, 784)``."""
    loss = squared = 0.0
    for part in images.split(2500):
        logits = model(part)
        loss += float(nn.functional.binary_cross_entropy_with_logits(logits, part, reduction="sum"))
        squared += float((torch.sigmoid(logits) - part).square().sum())
    return loss / len(images), squared / len(images)


class _Clock:
    """Processor and wall seconds inside ``with clock.running():`` blocks."""

    def __init__(self) -> None:
        self.processor = self.wall = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        processor, wall = time.process_time(), time.perf_counter()
        yield
        self.processor += time.process_time() - processor
        self.wall += time.perf_counter() - wall


class _Average:
    """The average of the iterates (methods 6.3), which can stand in for the weights."""

    def __init__(self, model: nn.Module, limit: float) -> None:
        self.weights = [p.detach() for p in model.parameters()]
        self.values = [w.clone() for w in self.weights]
        self.limit, self.seen = limit, 0

    @torch.no_grad()
    def update(self) -> None:
        self.seen += 1
        torch._foreach_lerp_(self.values, self.weights, 1 - averaging_weight(self.seen, self.limit))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        kept = [w.clone() for w in self.weights]
        for weight, value in zip(self.weights, self.values, strict=True):
            weight.copy_(value)
        try:
            yield
        finally:
            for weight, value in zip(self.weights, kept, strict=True):
                weight.copy_(value)


def _widths(config: Config, name: str) -> list[int]:
    first, *hidden = PROBLEMS[name].widths
    return [first, *(max(2, width // config.shrink) for width in hidden)]


def _train(
    config: Config, name: str, method: Method, setting: Setting, images: tuple[Tensor, Tensor], share: float
) -> dict[str, Any]:
    """One run with ``share`` of the budget: losses and seconds by update, checkpoints, and why it ended early."""
    train, test = images
    model = network(_widths(config, name), config.seed)
    trainer = method.make(model, config.l2, {**method.settings, **setting}, training.generator(config.seed))
    batches = _stream(train, lambda number: method.size(name, number, len(train)), training.generator(config.seed))
    budget, clock, average = share * config.budgets[name], _Clock(), _Average(model, config.averaging)
    found: dict[str, Any] = {"setting": dict(setting), "share": share, "loss": [], "processor": [], "wall": [],
                             "checkpoints": [], "failure": ""}  # fmt: skip
    cases, due, most = 0, 1.0, config.updates or math.inf

    def over() -> float:
        return min(1.0, max(clock.processor / budget, len(found["loss"]) / most))

    def checkpoint(watched: Tensor, held_out: Tensor) -> None:
        row = {"updates": len(found["loss"]), "cases": cases, "processor": clock.processor, "wall": clock.wall}
        row["loss"], row["squared"] = _errors(model, watched)
        row["test_loss"], row["test_squared"] = _errors(model, held_out)
        if average.seen:
            with average.swapped_in(), torch.no_grad():
                row["averaged_loss"], row["averaged_squared"] = _errors(model, watched)
                row["averaged_test_loss"], row["averaged_test_squared"] = _errors(model, held_out)
        found["checkpoints"].append(row)

    few = (train[: config.watched], test[: config.watched])
    checkpoint(*few)
    try:
        while clock.processor < budget and len(found["loss"]) < most:
            with clock.running():
                batch = next(batches)
                loss = trainer(batch, over())
                average.update()
            cases += len(batch)
            for key, value in (("loss", loss), ("processor", clock.processor), ("wall", clock.wall)):
                found[key].append(float(f"{value:.6g}"))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of update {len(found['loss'])} is {loss}")
            if len(found["loss"]) >= due:
                checkpoint(*few)
                due = max(due * config.spacing, due + 1)
    except (LaplaceKFError, FloatingPointError) as error:  # a result too
        found["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if found["checkpoints"][-1]["updates"] != len(found["loss"]):
        checkpoint(*few)
    checkpoint(*((train, test) if share == 1 else few))
    found["final"] = found["checkpoints"].pop()
    return found


def _score(found: Mapping[str, Any]) -> float:
    """The smaller training loss of the last iterate and of the average; infinity after a failure."""
    final = found["final"]
    value = min(final["loss"], final.get("averaged_loss", math.inf))
    return math.inf if found["failure"] or not math.isfinite(value) else value


def _tuned(config: Config, name: str, method: Method, images: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The run with the best setting of a method's grid, and what the others gave."""
    if len(method.grid) == 1:
        return {**_train(config, name, method, method.grid[0], images, 1.0), "pilots": []}
    tried = list(method.grid)
    scores: list[float] = []
    pilots: list[dict[str, Any]] = []
    share, leader = 1.0 if method.whole else config.pilot, None
    while len(scores) < len(tried):
        setting = tried[len(scores)]
        found = _train(config, name, method, setting, images, share)
        score = _score(found)
        if method.whole and (leader is None or score < min(scores)):
            leader = found
        scores.append(score)
        pilots.append({**setting, "loss": score if math.isfinite(score) else None, "failure": found["failure"],
                       "updates": len(found["loss"])})  # fmt: skip
        _say(config, f"{name}, {dict(setting)}: {score:.3f} after {pilots[-1]['updates']} updates")
        if len(scores) == len(tried):
            tried += method.beyond(tried, scores)
    if leader is not None:
        return {**leader, "pilots": pilots}
    best = min(range(len(tried)), key=lambda i: scores[i])
    return {**_train(config, name, method, tried[best], images, 1.0), "pilots": pilots}


def _say(config: Config, text: str) -> None:
    if config.progress:
        tqdm.write(text, file=sys.stderr)


def _decisive(config: Config, name: str, method: str) -> dict[str, Any]:
    """The settings that the numbers of a run depend on."""
    free = {"problems", "methods", "budgets", "threads", "progress"}
    kept = {key: value for key, value in asdict(config).items() if key not in free}
    return {**kept, "budget": config.budgets.get(name), "method": OPTIMISERS[method].described()}


def _path(folder: Path, name: str, method: str) -> Path:
    return folder / f"{name}-{re.sub('[^a-z0-9]+', '-', method.lower())}.json"


def _kept(config: Config, name: str, method: str, folder: Path) -> dict[str, Any] | None:
    """A finished run with the settings of ``config``, if there is one."""
    try:
        part: dict[str, Any] = json.loads(_path(folder, name, method).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # cut short: run it again
        return None
    return part if part["settings"] == _decisive(config, name, method) else None


def run(config: Config, folder: Path) -> Report:
    """Run the methods that were asked for on the problems that were asked for; report on all runs in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.problems:
        missing = [method for method in config.methods if _kept(config, name, method, folder) is None]
        if not missing:
            continue
        train, test = PROBLEMS[name].load(config.seed)
        images = (train[: config.train_most], test[: config.test_most])
        for method in missing:
            _say(config, f"{name}: {method}")
            found = _tuned(config, name, OPTIMISERS[method], images)
            part = {
                "settings": _decisive(config, name, method), "problem": name, "method": method, "versions": versions(),
                "machine": machine(), "floor": _floor(images[0]), "images": [len(x) for x in images],
                "batch": OPTIMISERS[method].size(name, 1, len(images[0])), **found,
            }  # fmt: skip
            _path(folder, name, method).write_text(json.dumps(part) + "\n", encoding="utf-8")
            _say(config, f"{name}, {method}: {_score(found):.3f} after {len(found['loss'])} updates {found['failure']}")
    runs: dict[str, dict[str, Any]] = {}
    for name in PROBLEMS:
        kept = {method: _kept(config, name, method, folder) for method in OPTIMISERS}
        runs |= {name: there} if (there := {m: part for m, part in kept.items() if part is not None}) else {}
    return _report(config, runs)


def _floor(images: Tensor) -> float:
    """The least cross-entropy that any output has: the entropy of the grey levels, summed over pixels."""
    entropy = torch.special.entr(images) + torch.special.entr(1 - images)
    return float(entropy.sum(dtype=torch.float64)) / len(images)


def _grids(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    for name, found in runs.items():
        head, cells = report.grids({method: part["pilots"] for method, part in found.items()})
        if cells:
            yield Table(f"{name}, grids of first-order methods", head, cells, "Every setting had the whole budget.")


def _report(config: Config, runs: Mapping[str, Mapping[str, Any]]) -> Report:
    verdicts = report.claims(runs)
    missing = {
        name: [method for method in STANDARD if method not in runs.get(name, {})]
        for name in dict.fromkeys([*USUAL, *runs])
    }
    return Report(
        title="Deep autoencoders: second-order against first-order optimisers",
        summary=report.summary(runs),
        seed=config.seed,
        config=asdict(config),
        metrics=report.metrics(runs),
        tables=[
            *(report.table(name, found) for name, found in runs.items()),
            *_grids(runs),
            report.claims_table(verdicts),
        ],
        pictures=[report.picture(name, found) for name, found in runs.items()],
        details={
            "verdicts": verdicts,
            "pilots": {name: {m: part["pilots"] for m, part in found.items()} for name, found in runs.items()},
            "not_run": missing,
            "widths": {name: _widths(config, name) for name in runs},
            "stand_ins": [REMARK] if {"curves", "curves14"} & set(runs) else [],
        },
    )
