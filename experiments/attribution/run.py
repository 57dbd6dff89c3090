"""Attribution measured: do scores predict what training on other halves of the data gives, do they find wrong labels?

The recipe is that of dattri's MNIST benchmark (Deng et al. 2024): 5,000 training images, 500 queries, networks
784-128-64-10 with dropout on random halves. Truth is made anew: a network on every one of some further halves, and the
losses of the queries under it. Scores come from networks on halves of their own, one, ten or fifty of them averaged;
these see their halves a few times only (``score_epochs``): gradients of examples that a network knows by heart vanish.
Further rows have networks of more passes, or average scores of one network after several of them (``many_epochs``):
chosen on halves of their own, in the table of what was tried.

Networks and scores are kept in ``parts`` of the results folder, so that a run can be cut short and taken up again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.attribution import report
from experiments.attribution.networks import TOGETHER, Pair, blank, halves, images, kept, trained
from experiments.attribution.scores import area, correlations, datamodelling_score, found
from experiments.common import training
from experiments.common.checks import require
from laplace_kf import attribution
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports.html import Picture, Report
from laplace_kf.reports.influence_plots import influential

__all__ = ["METHODS", "Bench", "Config", "run"]

METHODS: dict[str, dict[str, Any]] = {
    "Kronecker, margin": {"structure": "kron", "damping": "factored", "of": "margin"},
    "Kronecker, loss": {"structure": "kron", "damping": "factored", "of": "loss"},
    "Kronecker, exact damping, margin": {"structure": "kron", "damping": "exact", "of": "margin"},
}
TRUTH = 1000  # numbers of the halves whose losses are the truth; those below are the scores'
WRONG = 2000  # seed of the network with wrong labels
DEVELOPMENT = 3000  # numbers of the halves on which settings are compared
AGAIN = 50_000  # added to their numbers: seeds of second networks on the same halves


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/attribution.yaml``.

    Args:
        seed: of the halves and the wrong labels.
        threads: processor threads, 0 for torch's default.
        train: training images, the first ones.
        queries: test images, the first ones.
        subsets: halves whose networks give the truth.
        counts: over how many networks scores are averaged.
        epochs: passes of the networks of the truth over their halves.
        score_epochs: passes of the networks that scores come from, tried one after another.
        methods: names of :data:`METHODS`; the first with all of ``score_epochs``, the others with the first of them.
        many_epochs: passes of further rows of the first method, with all ``counts``; with several, a network is scored
            after each of them, and these scores are averaged.
        development: halves, other ones than those of the truth, on which settings are compared; 0 for no comparison.
        tried_networks: networks of the scores that are compared.
        tried_epochs: passes tried, each alone and all of them averaged.
        tried_damping: λ tried.
        few: the first method after the first of ``score_epochs`` gets all ``counts``, everything else these at most.
        damping: λ of the posteriors.
        accuracy: of the scores (relative).
        wrong: which share of labels is replaced for the search of wrong labels.
        wrong_epochs: passes of the networks on wrong labels.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    train: int = 5000
    queries: int = 500
    subsets: int = 50
    counts: list[int] = field(default_factory=lambda: [1, 10, 50])
    epochs: int = 50
    score_epochs: list[int] = field(default_factory=lambda: [5, 10, 50])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    few: int = 1
    damping: float = 10.0
    many_epochs: list[list[int]] = field(default_factory=lambda: [[8], [3, 5, 8, 12]])
    development: int = 50
    tried_networks: int = 5
    tried_epochs: list[int] = field(default_factory=lambda: [3, 5, 8, 12])
    tried_damping: list[float] = field(default_factory=lambda: [0.3, 1.0, 10.0])
    accuracy: float = 1e-2
    wrong: float = 0.1
    wrong_epochs: list[int] = field(default_factory=lambda: [10, 50])
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("train", "queries", "subsets", "epochs", "few"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        known = bool(self.counts) and min(self.counts) >= 1 and max(self.counts) <= TRUTH
        require("counts", self.counts, known, "some of 1 to 1000")
        require("damping", self.damping, self.damping > 0, "above 0")
        require("development", self.development, self.development >= 0, "at least 0")
        require("tried_networks", self.tried_networks, 1 <= self.tried_networks <= TRUTH, "1 to 1000")
        require("tried_damping", self.tried_damping, all(value > 0 for value in self.tried_damping), "above 0")
        require("accuracy", self.accuracy, 0 < self.accuracy < 1, "between 0 and 1")
        require("wrong", self.wrong, 0 < self.wrong < 1, "between 0 and 1")
        known = bool(self.methods) and set(self.methods) <= set(METHODS)
        require("methods", self.methods, known, f"some of {list(METHODS)}")
        for passes in self.many_epochs:
            require("many_epochs", self.many_epochs, bool(passes) and min(passes) >= 1, "lists of numbers from 1 on")
        for name in ("score_epochs", "wrong_epochs", "tried_epochs"):
            require(name, value := getattr(self, name), bool(value) and min(value) >= 1, "some numbers from 1 on")


@dataclass(frozen=True)
class Row:
    """What one row of the table is about.

    Args:
        method: a name of :data:`METHODS`.
        epochs: passes of its networks; scores after each of them are averaged.
        damping: λ.
    """

    method: str
    epochs: tuple[int, ...]
    damping: float

    @property
    def title(self) -> str:
        return f"{self.method}, {' + '.join(map(str, self.epochs))} epochs"


class Bench:
    """The data and the networks of one configuration."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.train, self.queries = images(config.train, config.queries)

    def inside(self, number: int) -> Tensor:
        """Which examples the network ``number`` saw, ``(N,)``."""
        return halves(self.config.train, number, self.config.seed)

    def networks(self, numbers: Sequence[int], epochs: int) -> Iterator[nn.Sequential]:
        """Networks on halves after so many passes."""
        c = self.config

        def train(missing: Sequence[int]) -> list[nn.Sequential]:
            start = time.process_time()
            made = trained(self.train, torch.stack([self.inside(n) for n in missing]), epochs, missing)
            self._note(epochs, (time.process_time() - start) / len(missing))
            return made

        return kept(self.folder, f"half_{c.seed}_{c.train}_{epochs}", numbers, train, blank)

    def _note(self, epochs: int, seconds: float) -> None:
        path = self.folder / f"seconds_{epochs}.json"
        before = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*before, seconds]))

    def training_seconds(self, epochs: int) -> float:
        """Processor seconds of training one network, the median over the stacks that were trained."""
        return float(statistics.median(json.loads((self.folder / f"seconds_{epochs}.json").read_text())))

    def truth(self, first: int = TRUTH, count: int = 0) -> tuple[Tensor, Tensor]:
        """Halves ``(K, N)`` and the losses of the queries under networks trained on them, ``(K, Q)``.

        Args:
            first: number of the first half.
            count: K, 0 for ``subsets``.
        """
        numbers = range(first, first + (count or self.config.subsets))
        losses = [self._losses(model) for model in self.networks(numbers, self.config.epochs)]
        return torch.stack([self.inside(n) for n in numbers]), torch.stack(losses)

    def again(self, numbers: Sequence[int]) -> Tensor:
        """Losses ``(K, Q)`` under second networks on the same halves, from other weights, orders and dropout."""
        c = self.config
        path = self.folder / f"again_{c.seed}_{c.train}_{c.queries}_{c.epochs}_{numbers[0]}_{len(numbers)}.safetensors"
        if not path.is_file():
            found = []
            for start in range(0, len(numbers), TOGETHER):
                some = numbers[start : start + TOGETHER]
                inside = torch.stack([self.inside(n) for n in some])
                models = trained(self.train, inside, c.epochs, [n + AGAIN for n in some])
                found += [self._losses(model) for model in models]
            save_file({"losses": torch.stack(found)}, path)
        return load_file(path)["losses"]

    def _losses(self, model: nn.Module) -> Tensor:
        x, y = self.queries
        return nn.functional.cross_entropy(training.outputs(model, x), y, reduction="none")


def _scored(bench: Bench, name: str, damping: float, model: nn.Module) -> tuple[Tensor, float]:
    """Scores ``(Q, N)`` by one network, and the processor seconds of fit and scores."""
    options = dict(METHODS[name])
    start = time.process_time()
    of = options.pop("of")
    posterior = LaplacePosterior(model, "categorical", prior_precision=damping, **options).fit(bench.train)
    scores = attribution.influence(posterior, bench.train, bench.queries, of, accuracy=bench.config.accuracy)
    return scores, time.process_time() - start


def _method(bench: Bench, row: Row, counts: Sequence[int], truth: tuple[Tensor, Tensor]) -> Any:
    """Datamodelling scores of one row by number of networks; kept in a file."""
    config = bench.config
    decisive = [config.seed, config.train, config.queries, config.subsets, config.epochs, row.damping,
                config.accuracy, list(counts)]  # fmt: skip
    path = bench.folder / f"{row.title}.json"
    if path.is_file() and (before := json.loads(path.read_text()))["settings"] == decisive:
        return before["result"]
    total = torch.zeros(config.queries, config.train)
    result: dict[str, Any] = {"score": {}, "error": {}, "seconds": 0.0}
    stages = (bench.networks(range(max(counts)), epochs) for epochs in row.epochs)
    for number, models in enumerate(zip(*stages, strict=True)):
        for model in models:
            scores, seconds = _scored(bench, row.method, row.damping, model)
            total += scores
            result["seconds"] += seconds / max(counts)
        if number + 1 in counts:
            each = datamodelling_score(total, *truth)
            result["score"][str(number + 1)] = float(each.mean())
            result["error"][str(number + 1)] = float(each.std() / len(each) ** 0.5)
    result["training_seconds"] = sum(bench.training_seconds(epochs) for epochs in row.epochs)
    path.write_text(json.dumps({"settings": decisive, "result": result}))
    return result


def _tried(bench: Bench) -> dict[str, Any]:
    """Passes and λ compared on halves that are used for nothing else, and how well these can be predicted at all."""
    config = bench.config
    numbers = range(DEVELOPMENT, DEVELOPMENT + config.development)
    subsets, measured = bench.truth(DEVELOPMENT, config.development)
    decisive = [config.seed, config.train, config.queries, config.epochs, config.accuracy, config.development,
                config.tried_networks, config.tried_epochs, config.tried_damping, config.methods[0]]  # fmt: skip
    path = bench.folder / "tried.json"
    if path.is_file() and (before := json.loads(path.read_text()))["settings"] == decisive:
        return dict(before["result"])
    options = dict(METHODS[config.methods[0]])
    of = options.pop("of")
    scores: dict[str, dict[str, float]] = {}
    every = {damping: torch.zeros(config.queries, config.train) for damping in config.tried_damping}
    for epochs in config.tried_epochs:
        total = {damping: torch.zeros(config.queries, config.train) for damping in config.tried_damping}
        for model in bench.networks(range(config.tried_networks), epochs):
            posterior = LaplacePosterior(model, "categorical", **options).fit(bench.train)
            for damping in total:
                total[damping] += attribution.influence(
                    posterior, bench.train, bench.queries, of, damping=damping, accuracy=config.accuracy
                )
        scores[str(epochs)] = {f"{k:g}": float(datamodelling_score(v, subsets, measured).mean())
                               for k, v in total.items()}  # fmt: skip
        for damping, found_here in total.items():
            every[damping] += found_here
    scores[" + ".join(map(str, config.tried_epochs))] = {
        f"{k:g}": float(datamodelling_score(v, subsets, measured).mean()) for k, v in every.items()
    }
    result = {
        "score": scores,
        "networks": config.tried_networks,
        "halves": config.development,
        "retrained": float(correlations(-bench.again(numbers), -measured).mean()),
    }
    path.write_text(json.dumps({"settings": decisive, "result": result}))
    return result


def _wrong(bench: Bench, epochs: int) -> dict[str, dict[str, float]]:
    """How well each score finds labels that were replaced."""
    config = bench.config
    rng = training.generator(config.seed)
    wrong = torch.zeros(config.train, dtype=torch.bool)
    wrong[torch.randperm(config.train, generator=rng)[: round(config.wrong * config.train)]] = True
    labels = bench.train[1].clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=rng)) % 10
    data: Pair = (bench.train[0], labels)
    every = torch.ones(1, config.train, dtype=torch.bool)
    (model,) = kept(
        bench.folder, f"wrong_{config.seed}_{config.train}_{config.wrong}_{epochs}", [WRONG],
        lambda numbers: trained(data, every, epochs, numbers), blank,
    )  # fmt: skip
    posterior = LaplacePosterior(model, "categorical", prior_precision=config.damping).fit(data)
    out = {}
    for score in attribution.SUSPICIONS:
        ranking = attribution.mislabelled(posterior, data, score)
        out[score] = {"found": found(ranking.order, wrong, config.wrong), "area": area(ranking.scores, wrong)}
    return out


def run(config: Config, folder: Path) -> Report:
    """Train what is missing, score, and report; networks and scores are kept in ``folder``."""
    bench = Bench(config, folder)
    truth = bench.truth()
    few = [count for count in config.counts if count <= config.few]
    best, (first, *others) = config.methods[0], config.score_epochs
    plan = [(Row(best, (first,), config.damping), config.counts)]
    plan += [(Row(best, tuple(passes), config.damping), config.counts) for passes in config.many_epochs]
    plan += [(Row(name, (first,), config.damping), few) for name in config.methods[1:]]
    plan += [(Row(best, (epochs,), config.damping), few) for epochs in others]
    results: dict[str, Any] = {}
    for row, counts in plan:
        results[row.title] = _method(bench, row, counts, truth)
        if config.progress:
            tqdm.write(f"{row.title}: {results[row.title]}", file=sys.stderr)
    everything = {
        "scores": results,
        "queries": config.queries,
        "subsets": config.subsets,
        "wrong": {str(epochs): _wrong(bench, epochs) for epochs in config.wrong_epochs},
        "wrong_share": config.wrong,
        "tried": _tried(bench) if config.development else {},
    }
    verdicts = report.judged(everything)
    return Report(
        title="Attribution: predicted and measured effects of training examples",
        summary=(
            f"Networks 784-128-64-10 on halves of {config.train} digits; scores of "
            f"{config.queries} queries against losses of {config.subsets} networks trained on other halves for "
            f"{config.epochs} epochs; "
            f"λ = {config.damping:g}."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics={name: each["score"] for name, each in results.items()},
        tables=[
            report.score_table(everything),
            report.wrong_table(everything),
            report.targets_table(verdicts),
            report.tried_table(everything),
        ],
        pictures=[_picture(bench)],
        details={**everything, "verdicts": verdicts, "stand_ins": []},
    )


def _picture(bench: Bench) -> Picture:
    """Queries with the largest losses under the first network, and what helped and harmed them."""
    x, y = bench.queries
    first = bench.config.score_epochs[0]
    (model,) = bench.networks([0], first)
    scores, _ = _scored(bench, bench.config.methods[0], bench.config.damping, model)
    losses = nn.functional.cross_entropy(training.outputs(model, x), y, reduction="none")
    chosen = losses.topk(min(5, len(losses))).indices

    def named(labels: Tensor) -> list[str]:
        return [str(int(label)) for label in labels]

    figure = influential(
        scores[chosen], bench.train[0].reshape(-1, 28, 28), x[chosen].reshape(-1, 28, 28),
        train_names=named(bench.train[1]), query_names=named(y[chosen]),
    )  # fmt: skip
    caption = (
        "Queries that the first network is most wrong about (left, with their labels), the training images that help "
        "most (blue) and those that harm most (red), with theirs."
    )
    return Picture("influential", figure, caption)
