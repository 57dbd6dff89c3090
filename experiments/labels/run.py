"""Labels that a network asks for: MNIST with few of them, chosen by BatchBALD, by BALD, or at random.

The protocol of Kirsch et al. 2019 (section 4.2): two labels of each class to begin with, then batches of ten, a network
trained anew after every batch, no augmentation, no use of the unlabelled images. Their posterior is Monte Carlo dropout
over a convolutional network, whose predictions are averaged; here it is a mixture of narrow posteriors of the last
layers of ten networks of half the width, and predictions are averaged over these. Random choice has the same networks.
Images are standardised by the mean and the deviation of all training images, and networks are trained until little
changes: how long was picked on training images beside the labels of an earlier run, not on the test images. Scores are
computed on a part of the pool that is drawn anew for every batch.

Runs of a method and a seed are kept in ``parts`` of the results folder, label count by label count.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import data, training
from experiments.common.checks import require
from laplace_kf import acquisition
from laplace_kf.posterior import LaplacePosterior, Mixture
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Report, Table

__all__ = ["CHOICES", "Config", "labels_rows", "run"]

PUBLISHED = {0.90: 70, 0.95: 190}
"""Labels of BatchBALD by accuracy (Kirsch et al. 2019, table 2, first quartile of six runs); the aims here."""


def _batch_bald(posterior: Mixture, x: Tensor, size: int, config: Config, rng: torch.Generator) -> Tensor:
    found = acquisition.batch_bald(posterior, x, size, config.samples, rng, configurations=config.configurations)
    return found.indices


def _bald(posterior: Mixture, x: Tensor, size: int, config: Config, rng: torch.Generator) -> Tensor:
    return acquisition.bald(posterior, x, config.samples, rng).topk(size).indices


def _random(posterior: Mixture, x: Tensor, size: int, config: Config, rng: torch.Generator) -> Tensor:
    return torch.randperm(len(x), generator=rng)[:size]


CHOICES: dict[str, Callable[..., Tensor]] = {"BatchBALD": _batch_bald, "random": _random, "BALD": _bald}


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/labels.yaml``.

    Args:
        seed: first seed, of weights, first labels and draws.
        repeats: number of seeds.
        threads: processor threads, 0 for torch's default.
        methods: names of :data:`CHOICES`.
        first: labels of each class to begin with.
        batch: labels asked for at a time.
        most: labels at which a run ends.
        pool: images that are scored for a batch, drawn from all unlabelled ones.
        test: test images, the first ones.
        width: channels of the first convolution.
        dropout: of the hidden layer.
        steps: of Adam for each training, minibatches of 32.
        lr: of Adam, falling to 0 by a cosine.
        networks: of the mixture.
        parameters: which weights the posteriors are over.
        prior_precision: λ; 0 for that of the evidence.
        samples: functions of the scores.
        configurations: of BatchBALD.
        progress: whether to say what is going on.
    """

    seed: int = 0
    repeats: int = 1
    threads: int = 1
    methods: list[str] = field(default_factory=lambda: list(CHOICES))
    first: int = 2
    batch: int = 10
    most: int = 190
    pool: int = 4000
    test: int = 2000
    width: int = 16
    dropout: float = 0.5
    steps: int = 400
    lr: float = 3e-3
    networks: int = 10
    parameters: str = "last_layer"
    prior_precision: float = 1e6
    samples: int = 100
    configurations: int = 500
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "first", "batch", "pool", "test", "width", "steps", "networks", "configurations"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        require("samples", self.samples, self.samples >= 2, "at least 2")
        require("lr", self.lr, self.lr > 0, "above 0")
        require("prior_precision", self.prior_precision, self.prior_precision >= 0, "at least 0")
        require("dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")
        require("batch", self.batch, self.batch <= self.pool, f"at most pool={self.pool}")
        known = bool(self.methods) and set(self.methods) <= set(CHOICES)
        require("methods", self.methods, known, f"some of {list(CHOICES)}")


def network(config: Config, seed: int) -> nn.Sequential:
    """Two convolutions of 5x5 with pooling, and a hidden layer with dropout."""
    w = config.width
    with private_rng(seed):
        return nn.Sequential(
            nn.Conv2d(1, w, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(w, 2 * w, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * w, 4 * w), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(4 * w, 10),
        )  # fmt: skip


def trained(config: Config, x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """A network on these labels, in eval mode."""
    model, rng = network(config, seed), training.generator(seed)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    with private_rng(seed):
        model.train()
        for _ in range(config.steps):
            rows = torch.randperm(len(x), generator=rng)[:32]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def mixture(config: Config, models: list[nn.Sequential], x: Tensor, y: Tensor, rng: torch.Generator) -> Mixture:
    """The posteriors of these networks on the labels that are known, as one."""
    prior = config.prior_precision or 1.0
    found = Mixture([
        LaplacePosterior(model, "categorical", parameters=config.parameters, prior_precision=prior).fit(
            x, y, generator=rng
        )
        for model in models
    ])  # fmt: skip
    if not config.prior_precision:
        found.tune(objective="evidence")
    return found


def _one(config: Config, method: str, seed: int, path: Path) -> dict[str, Any]:
    """Accuracies by number of labels of one run, from its file as far as it goes."""
    free = ("seed", "repeats", "threads", "methods", "most", "progress")  # a run can be made longer
    decisive = {k: v for k, v in asdict(config).items() if k not in free}
    found: dict[str, Any] = {"settings": decisive, "known": None, "accuracy": {}, "seconds": 0.0}
    if path.is_file() and (before := json.loads(path.read_text()))["settings"] == json.loads(json.dumps(decisive)):
        found = before
    x, y = data.images("mnist", "train")
    test_x, test_y = (part[: config.test] for part in data.images("mnist", "test"))
    middle, spread = x.mean(), x.std()
    x, test_x = (x - middle) / spread, (test_x - middle) / spread
    if found["known"] is None:
        order = torch.randperm(len(x), generator=training.generator(seed))
        found["known"] = torch.cat([order[y[order] == c][: config.first] for c in range(10)]).tolist()
    while len(found["known"]) <= config.most:
        if str(len(found["known"])) in found["accuracy"] and len(found["known"]) + config.batch > config.most:
            break
        start = time.process_time()
        known = torch.tensor(found["known"])
        seeds = [100_000 * k + 1000 * seed + len(known) for k in range(config.networks)]
        models = [trained(config, x[known], y[known], each) for each in seeds]
        p = torch.stack([training.outputs(model, test_x, size=500).softmax(1) for model in models]).mean(0)
        accuracy = float((p.argmax(1) == test_y).float().mean())
        found["accuracy"][str(len(known))] = accuracy
        if len(known) + config.batch <= config.most:
            rng = training.generator(1000 * seed + len(known) + 500_000)
            left = torch.ones(len(x), dtype=torch.bool)
            left[known] = False
            rows = left.nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=rng)[: config.pool]]
            posterior = mixture(config, models, x[known], y[known], rng)
            chosen = CHOICES[method](posterior, x[rows], config.batch, config, rng)
            found["known"] = [*found["known"], *rows[chosen].tolist()]
        found["seconds"] += time.process_time() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
        if config.progress:
            tqdm.write(f"{method}, seed {seed}, {len(known)} labels: {accuracy:.4f}", file=sys.stderr)
    return found


def needed(accuracies: dict[str, float], level: float) -> int | None:
    """The smallest number of labels with an accuracy of at least ``level``."""
    reached = [int(count) for count, accuracy in accuracies.items() if accuracy >= level]
    return min(reached) if reached else None


def labels_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: labels needed by method, and accuracies on the way."""
    runs = result["runs"]
    counts = sorted({int(n) for of in runs.values() for run in of for n in run["accuracy"]})
    shown = sorted({n for n in (counts[0], 50, 70, 120, counts[-1]) if n in counts})
    rows = []
    for method, of in runs.items():
        cells = [method]
        for level in PUBLISHED:
            every = [needed(run["accuracy"], level) for run in of]
            cells.append(", ".join("not reached" if n is None else str(n) for n in every))
        for n in shown:  # runs may be of different lengths
            there = [run["accuracy"][str(n)] for run in of if str(n) in run["accuracy"]]
            cells.append(f"{100 * statistics.fmean(there):.1f}" if len(there) == len(of) else "")
        rows.append([*cells, f"{statistics.fmean(run['seconds'] for run in of):.0f}"])
    head = [f"labels to {level:.0%}, by seed" for level in PUBLISHED]
    return ["chosen by", *head, *(f"% at {n}" for n in shown), "processor s"], rows


def run(config: Config, folder: Path) -> Report:
    """Runs what is missing and reports; runs are kept in ``folder``."""
    seeds = [config.seed + k for k in range(config.repeats)]
    runs = {m: [_one(config, m, seed, folder / f"{m}_{seed}.json") for seed in seeds] for m in config.methods}
    verdicts = []
    for level, aim in PUBLISHED.items():
        for method in runs:
            reached = [needed(each["accuracy"], level) for each in runs[method]]
            counts = [n for n in reached if n is not None]
            middle = statistics.median(counts) if len(counts) == len(reached) else None
            verdicts.append({"what": f"labels to {level:.0%}, {method}", "aim": aim, "reached": middle,
                             "met": middle is not None and middle <= aim})  # fmt: skip
    found = {"runs": runs, "verdicts": verdicts}
    note = f"Published (Monte Carlo dropout, BatchBALD): {', '.join(f'{n} to {p:.0%}' for p, n in PUBLISHED.items())}."
    summary = (
        f"MNIST, {config.networks} networks with two convolutions of {config.width} and {2 * config.width} channels, "
        f"a mixture of posteriors over {config.parameters}, λ = {config.prior_precision:g}; "
        f"{config.first} labels of each class, then {config.batch} at a time, up to {config.most}, out of "
        f"{config.pool} random images; accuracy on {config.test} test images; {config.repeats} seed(s)."
    )
    table = Table("Labels needed", *labels_rows(found), note)
    quoted = {
        "title": table.title,
        "columns": list(table.columns),
        "rows": [list(row) for row in table.rows],
        "note": table.note,
    }
    return Report(
        title="Labels that a network asks for",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={m: {"accuracy": [each["accuracy"] for each in of]} for m, of in runs.items()},
        tables=[table],
        details={**found, "summary": summary, "tables": [quoted], "seeds": seeds, "stand_ins": []},
    )
