"""Attribution measured: do scores predict what training on other halves of the data gives, do they find wrong labels?

The recipe is that of dattri's MNIST benchmark (Deng et al. 2024): 5,000 training images, 500 queries, networks
784-128-64-10 with dropout on random halves. Truth is made anew: a network on every one of some further halves, and the
losses of the queries under it. Scores come from networks on halves of their own, one, ten or fifty of them averaged.

Networks and scores are kept in ``parts`` of the results folder, so that a run can be cut short and taken up again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.attribution import report
from experiments.attribution.networks import Pair, halves, images, kept, trained
from experiments.attribution.scores import area, datamodelling_score, found
from experiments.common import training
from experiments.common.checks import require
from laplace_kf import attribution
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports.html import Picture, Report
from laplace_kf.reports.influence_plots import influential

__all__ = ["METHODS", "Config", "run"]

METHODS: dict[str, dict[str, Any]] = {
    "Kronecker, factored damping, loss": {"damping": "factored", "of": "loss"},
    "Kronecker, factored damping, margin": {"damping": "factored", "of": "margin"},
    "Kronecker, exact damping, margin": {"damping": "exact", "of": "margin"},
    "EKFAC, margin": {"structure": "ekfac", "damping": "exact", "of": "margin"},
    "diagonal, margin": {"structure": "diag", "damping": "exact", "of": "margin"},
}
TRUTH = 1000  # numbers of the halves whose losses are the truth; those below are the scores'
WRONG = 2000  # seed of the network with wrong labels


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
        epochs: passes of every network over its half.
        methods: names of :data:`METHODS`.
        few: networks of methods that are slow, those not named in ``many``.
        many: methods for the largest of ``counts``.
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
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    few: int = 1
    many: list[str] = field(default_factory=lambda: list(METHODS)[:2])
    damping: float = 10.0
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
        require("accuracy", self.accuracy, 0 < self.accuracy < 1, "between 0 and 1")
        require("wrong", self.wrong, 0 < self.wrong < 1, "between 0 and 1")
        for name in ("methods", "many"):
            require(name, getattr(self, name), set(getattr(self, name)) <= set(METHODS), f"some of {list(METHODS)}")


class _Bench:
    """The data and the networks of one configuration."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.train, self.queries = images(config.train, config.queries)
        self.seconds: list[float] = []  # of training one network

    def inside(self, number: int) -> Tensor:
        """Which examples the network ``number`` saw, ``(N,)``."""
        return halves(self.config.train, number, self.config.seed)

    def networks(self, numbers: Sequence[int]) -> Any:
        """Networks on halves."""
        c = self.config

        def train(missing: Sequence[int]) -> list[nn.Sequential]:
            start = time.process_time()
            made = trained(self.train, torch.stack([self.inside(n) for n in missing]), c.epochs, missing)
            self.seconds.append((time.process_time() - start) / len(missing))
            self._note()
            return made

        return kept(self.folder, f"half_{c.seed}_{c.train}_{c.epochs}", numbers, train)

    def _note(self) -> None:
        path = self.folder / "seconds.json"
        before = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*before, self.seconds[-1]]))

    def training_seconds(self) -> float:
        """Processor seconds of training one network, the median over the stacks that were trained."""
        path = self.folder / "seconds.json"
        values = sorted(json.loads(path.read_text())) if path.is_file() else [0.0]
        return float(values[len(values) // 2])

    def truth(self) -> tuple[Tensor, Tensor]:
        """Halves ``(K, N)`` and the losses of the queries under networks trained on them, ``(K, Q)``."""
        numbers = range(TRUTH, TRUTH + self.config.subsets)
        x, y = self.queries
        losses = [
            nn.functional.cross_entropy(training.outputs(model, x), y, reduction="none")
            for model in self.networks(numbers)
        ]
        return torch.stack([self.inside(n) for n in numbers]), torch.stack(losses)


def _scored(bench: _Bench, name: str, number: int, model: nn.Module) -> tuple[Tensor, float]:
    """Scores ``(Q, N)`` by one network, and the processor seconds of fit and scores; kept in a file."""
    config, options = bench.config, dict(METHODS[name])
    key = f"{name}_{number}_{config.seed}_{config.train}_{config.queries}_{config.epochs}_{config.damping}"
    path = bench.folder / f"scores_{key.replace(' ', '_').replace(',', '')}.pt"
    if path.is_file():
        kept_scores = torch.load(path)
        return kept_scores["scores"], float(kept_scores["seconds"])
    start = time.process_time()
    of = options.pop("of")
    posterior = LaplacePosterior(model, "categorical", prior_precision=config.damping, **options).fit(bench.train)
    accuracy = config.accuracy
    scores = attribution.influence(posterior, bench.train, bench.queries, of, accuracy=accuracy)
    seconds = time.process_time() - start
    torch.save({"scores": scores, "seconds": seconds}, path)
    return scores, seconds


def _method(bench: _Bench, name: str, truth: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Datamodelling scores of one method by number of networks."""
    config = bench.config
    counts = [count for count in config.counts if name in config.many or count <= config.few]
    total = torch.zeros(config.queries, config.train)
    result: dict[str, Any] = {"score": {}, "error": {}, "seconds": 0.0}
    for number, model in enumerate(bench.networks(range(max(counts)))):
        scores, seconds = _scored(bench, name, number, model)
        total += scores
        result["seconds"] += seconds / max(counts)
        if number + 1 in counts:
            each = datamodelling_score(total, *truth)
            result["score"][str(number + 1)] = float(each.mean())
            result["error"][str(number + 1)] = float(each.std() / len(each) ** 0.5)
    return {**result, "total": total}


def _wrong(bench: _Bench, epochs: int) -> dict[str, dict[str, float]]:
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
        lambda numbers: trained(data, every, epochs, numbers),
    )  # fmt: skip
    posterior = LaplacePosterior(model, "categorical", prior_precision=config.damping).fit(data)
    out = {}
    for score in attribution.SUSPICIONS:
        ranking = attribution.mislabelled(posterior, data, score)
        out[score] = {"found": found(ranking.order, wrong, config.wrong), "area": area(ranking.scores, wrong)}
    return out


def run(config: Config, folder: Path) -> Report:
    """Train what is missing, score, and report; networks and scores are kept in ``folder``."""
    bench = _Bench(config, folder)
    truth = bench.truth()
    results: dict[str, Any] = {}
    totals: dict[str, Tensor] = {}
    for name in config.methods:
        results[name] = _method(bench, name, truth)
        totals[name] = results[name].pop("total")
        if config.progress:
            tqdm.write(f"{name}: {results[name]['score']}, {results[name]['seconds']:.1f} s", file=sys.stderr)
    everything = {
        "scores": results,
        "queries": config.queries,
        "subsets": config.subsets,
        "training_seconds": bench.training_seconds(),
        "wrong": {str(epochs): _wrong(bench, epochs) for epochs in config.wrong_epochs},
        "wrong_share": config.wrong,
    }
    verdicts = report.judged(everything)
    return Report(
        title="Attribution: predicted and measured effects of training examples",
        summary=(
            f"Networks 784-128-64-10 on halves of {config.train} digits, {config.epochs} epochs; scores of "
            f"{config.queries} queries against losses of {config.subsets} networks trained on other halves; "
            f"λ = {config.damping:g}."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics={name: each["score"] for name, each in results.items()},
        tables=[report.score_table(everything), report.wrong_table(everything), report.targets_table(verdicts)],
        pictures=[_picture(bench, next(iter(totals.values())))] if totals else [],
        details={**everything, "verdicts": verdicts, "stand_ins": []},
    )


def _picture(bench: _Bench, scores: Tensor) -> Picture:
    """Queries with the largest losses under the first network, and what helped and harmed them."""
    x, y = bench.queries
    (model,) = bench.networks([0])
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
