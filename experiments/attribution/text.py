"""Attribution in a language model, measured: do scores predict what training on other windows of a text gives?

The beginning of tiny Shakespeare is cut into windows; every ``apart``-th one is a query, the others are the training
examples. The truth is the losses of the queries under small transformers trained on random halves of the examples, one
each. Of some queries, the first network's scores are token-wise too (``tokens="queries"``: one for every character of
the query and every example), and are compared with the losses of the single characters.

The networks that are scored are trained on halves of their own. How long, and λ, are picked by looking at one network's
scores and the first ``pick`` networks of the truth; what is reported is measured on the others.

Networks and results are kept in ``parts`` of the results folder, so that a run can be cut short and taken up again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.attribution.networks import Pair, halves, kept
from experiments.attribution.scores import datamodelling_score
from experiments.common import data, training
from experiments.common.checks import require
from experiments.shakespeare.transformer import Transformer, encode, windows
from laplace_kf import attribution
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Report, Table

__all__ = ["AIM", "Bench", "Config", "run", "score_rows"]

AIM = 0.2
TRUTH = 1000  # numbers of the halves whose losses are the truth; those below are the scores'


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/attribution_text.yaml``.

    Args:
        seed: of halves, weights and orders.
        threads: processor threads, 0 for torch's default.
        context: characters of a window.
        width: of the embeddings.
        heads: of each layer.
        layers: of the network.
        windows: from the beginning of the text, queries included.
        apart: every how manieth window is a query.
        subsets: halves whose networks give the truth.
        pick: of these, how many the settings are picked with; the others are reported.
        epochs: passes of the networks of the truth over their halves.
        batch: windows of a minibatch.
        lr: of AdamW, falling to 0 by a cosine.
        counts: over how many networks scores are averaged.
        score_epochs: passes of the networks that scores come from, one of them is picked.
        dampings: λ, one of them is picked.
        spelt: how many queries have scores character by character.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 2
    windows: int = 240
    apart: int = 6
    subsets: int = 30
    pick: int = 8
    epochs: int = 20
    batch: int = 16
    lr: float = 3e-3
    counts: list[int] = field(default_factory=lambda: [1, 5])
    score_epochs: list[int] = field(default_factory=lambda: [5, 10])
    dampings: list[float] = field(default_factory=lambda: [1.0, 100.0])
    spelt: int = 4
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "width", "heads", "layers", "epochs", "batch", "spelt"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        require("apart", self.apart, 2 <= self.apart <= self.windows, f"from 2 to windows={self.windows}")
        require("pick", self.pick, 2 <= self.pick <= self.subsets - 2, f"from 2 to subsets - 2 = {self.subsets - 2}")
        require("lr", self.lr, self.lr > 0, "above 0")
        known = bool(self.counts) and min(self.counts) >= 1 and max(self.counts) <= TRUTH
        require("counts", self.counts, known, "some of 1 to 1000")
        require("dampings", self.dampings, bool(self.dampings) and min(self.dampings) > 0, "some numbers above 0")
        known = bool(self.score_epochs) and min(self.score_epochs) >= 1
        require("score_epochs", self.score_epochs, known, "some numbers from 1 on")


class Bench:
    """The windows and the networks of one configuration."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        text = data.text()
        self.alphabet = "".join(sorted(set(text)))
        x, y = windows(encode(text[: config.windows * config.context + 1], self.alphabet), config.context)
        asked = torch.arange(len(x)) % config.apart == config.apart - 1
        self.train: Pair = (x[~asked], y[~asked])
        self.queries: Pair = (x[asked], y[asked])

    def network(self, seed: int = 0) -> Transformer:
        """An untrained one."""
        c = self.config
        with private_rng(seed):
            return Transformer(len(self.alphabet), c.context, c.width, c.heads, c.layers)

    def inside(self, number: int) -> Tensor:
        """Which examples the network ``number`` sees, ``(N,)``."""
        return halves(len(self.train[0]), number, self.config.seed)

    def networks(self, numbers: Sequence[int], epochs: int) -> Iterator[Transformer]:
        """Networks on halves after so many passes, in eval mode."""
        c = self.config
        size = f"{c.context}_{c.width}_{c.heads}_{c.layers}_{c.windows}_{c.apart}_{c.batch}_{c.lr:g}"

        def trained(missing: Sequence[int]) -> list[Transformer]:
            return [self._trained(number, epochs) for number in missing]

        return kept(self.folder, f"text_{c.seed}_{size}_{epochs}", numbers, trained, self.network, together=1)

    def _trained(self, number: int, epochs: int) -> Transformer:
        c, rows = self.config, self.inside(number)
        model = self.network(number)
        x, y = self.train
        batches = training.Batches(x[rows], y[rows], c.batch, training.generator(number))
        optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        training.train(
            model, batches, optimizer, epochs, scheduler=schedule,
            loss=lambda z, y: nn.functional.cross_entropy(z.flatten(0, 1), y.flatten()),
        )  # fmt: skip
        if c.progress:
            tqdm.write(f"network {number}, {epochs} epochs", file=sys.stderr)
        return model

    def losses(self, model: nn.Module) -> Tensor:
        """Of every character of every query, ``(Q, T)``."""
        x, y = self.queries
        return nn.functional.cross_entropy(training.outputs(model, x, size=100).mT, y, reduction="none")

    def truth(self) -> tuple[Tensor, Tensor]:
        """Halves ``(K, N)`` and the losses of the queries' characters under networks trained on them, ``(K, Q, T)``."""
        numbers = range(TRUTH, TRUTH + self.config.subsets)
        losses = [self.losses(model) for model in self.networks(numbers, self.config.epochs)]
        return torch.stack([self.inside(n) for n in numbers]), torch.stack(losses)

    def scores(
        self, model: nn.Module, number: int, dampings: Sequence[float], tokens: str | None = None
    ) -> Iterator[tuple[float, Tensor]]:
        """λ and scores ``(Q, N)`` by one network, whose posterior is fitted once; with tokens ``(spelt, T, N)``."""
        rng = training.generator(number)
        posterior = LaplacePosterior(model, "categorical", estimator="importance", damping="factored")
        posterior.fit(_batches(self.train), generator=rng)
        x, y = self.queries
        queries = self.queries if tokens is None else (x[: self.config.spelt], y[: self.config.spelt])
        for damping in dampings:
            yield damping, attribution.influence(
                posterior, _batches(self.train), _batches(queries), damping=damping, tokens=tokens,
                accuracy=1e-2,
            )  # fmt: skip


def _batches(pair: Pair) -> list[Pair]:
    return list(zip(pair[0].split(50), pair[1].split(50), strict=True))


def _quality(scores: Tensor, truth: tuple[Tensor, Tensor], some: slice) -> dict[str, float]:
    """Datamodelling score of ``(Q, N)`` with some of the networks of the truth, and its error over the queries."""
    whole = datamodelling_score(scores, truth[0][some], truth[1][some].sum(2))
    return {"whole": float(whole.mean()), "error": float(whole.std() / len(whole) ** 0.5)}


def _characters(scores: Tensor, truth: tuple[Tensor, Tensor], some: slice) -> float:
    """Mean datamodelling score of the single characters of the first queries, by ``(spelt, T, N)``."""
    single = datamodelling_score(scores.flatten(0, 1), truth[0][some], truth[1][some][:, : len(scores)].flatten(1))
    return float(single.nan_to_num(0).mean())


def _tried(bench: Bench, truth: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """One network's scores with every setting, against the first networks of the truth."""
    config, found = bench.config, []
    for epochs in config.score_epochs:
        (model,) = bench.networks([0], epochs)
        for damping, scores in bench.scores(model, 0, config.dampings):
            quality = _quality(scores, truth, slice(config.pick))
            found.append({"epochs": epochs, "damping": damping, **quality})
            if config.progress:
                tqdm.write(f"{found[-1]}", file=sys.stderr)
    return found


def _reported(bench: Bench, truth: tuple[Tensor, Tensor], best: dict[str, Any]) -> dict[str, Any]:
    """Quality by number of networks with the settings picked, against the other networks of the truth; kept."""
    config = bench.config
    path = bench.folder / "reported.json"
    decisive = {k: v for k, v in asdict(config).items() if k not in ("threads", "progress")}
    decisive |= {key: best[key] for key in ("epochs", "damping")}
    if path.is_file() and (before := json.loads(path.read_text()))["settings"] == decisive:
        result: dict[str, Any] = before["result"]
        return result
    total, rest = torch.zeros(()), slice(config.pick, None)
    result = {"score": {}, "seconds": 0.0}
    for number, model in enumerate(bench.networks(range(max(config.counts)), best["epochs"])):
        start = time.process_time()
        ((_, scores),) = bench.scores(model, number, [best["damping"]])
        result["seconds"] += (time.process_time() - start) / max(config.counts)
        if not number:
            ((_, spelt),) = bench.scores(model, number, [best["damping"]], "queries")
            result["characters"] = _characters(spelt, truth, rest)
        total = total + scores
        if number + 1 in config.counts:
            result["score"][str(number + 1)] = _quality(total, truth, rest)
    path.write_text(json.dumps({"settings": decisive, "result": result}))
    return result


def score_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: quality by number of networks."""
    rows = [["whole queries", count, f"{each['whole']:.3f} ± {each['error']:.3f}"]
            for count, each in found["reported"]["score"].items()]  # fmt: skip
    return ["of", "networks", "score"], [
        *rows,
        ["their characters, some queries", "1", f"{found['reported']['characters']:.3f}"],
    ]


def tried_rows(tried: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: quality by setting."""
    rows = [[str(each["epochs"]), f"{each['damping']:g}", f"{each['whole']:.3f}"] for each in tried]
    return ["epochs", "λ", "score"], rows


def run(config: Config, folder: Path) -> Report:
    """Train what is missing, score, and report; networks are kept in ``folder``."""
    bench = Bench(config, folder)
    truth = bench.truth()
    tried = _tried(bench, truth)
    best = max(tried, key=lambda each: float(each["whole"]))
    reported = _reported(bench, truth, best)
    top = max(each["whole"] for each in reported["score"].values())
    verdicts = [{"what": "linear datamodelling score", "aim": AIM, "reached": top, "met": top >= AIM}]
    found = {"tried": tried, "best": best, "reported": reported, "verdicts": verdicts}
    examples, asked = len(bench.train[0]), len(bench.queries[0])
    summary = (
        f"Transformers of {config.layers} layers of width {config.width}, on halves of {examples} windows of "
        f"{config.context} characters of tiny Shakespeare; {asked} queries; {config.subsets} networks of the truth, "
        f"trained for {config.epochs} epochs, {config.pick} of them to pick the settings with: scores by "
        f"networks after {best['epochs']} epochs, λ = {best['damping']:g}. The score is over the other "
        f"{config.subsets - config.pick}; ± standard error over the queries. A network's fit and scores of all pairs: "
        f"{reported['seconds']:.1f} processor seconds."
    )
    table = Table(f"Linear datamodelling score (aim: {AIM:g}, {'met' if top >= AIM else 'missed'})", *score_rows(found))
    settings = Table("Settings tried, one network, first networks of the truth", *tried_rows(tried))
    quoted = [
        {"title": t.title, "columns": list(t.columns), "rows": [list(row) for row in t.rows], "note": t.note}
        for t in (table, settings)
    ]
    return Report(
        title="Attribution in a language model",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics=reported["score"],
        tables=[table, settings],
        details={**found, "summary": summary, "tables": quoted, "stand_ins": []},
    )
