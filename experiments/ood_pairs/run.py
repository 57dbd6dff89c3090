"""Which score tells strange images from known ones? One network, its posterior, an ensemble and a mixture of five.

Fully connected ReLU networks, or small residual ones where images stay in colour, are trained on one set of images;
every score then ranks test images of that set and images of another one, and AUROC says how well it tells them apart.
Nothing is tuned on strangers: (N, λ), the method and the references of ``kind="auto"`` come from held-out images of the
known set.

The scores: entropy of the network (MAP), of the tuned default prediction, and of the ensemble's mean; mutual
information of the posterior and of the ensemble; leverages of the last and of all layers, and of their inputs'
directions; what ``kind="auto"`` makes of them; and the same of the mixture of the ensemble's posteriors.

Finished sources are kept in ``parts`` of the results folder: ``python -m experiments run ood_pairs sources=[mnist]``.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import training
from experiments.common.checks import require
from experiments.common.stacked import train_stacked
from experiments.continual.report import quoted
from experiments.ood_pairs.problems import SOURCES, Problem, problem
from experiments.ood_pairs.report import judged, pairs_table, quality_table, targets_table
from experiments.photographs.network import wide_residual
from laplace_kf.posterior import LaplacePosterior, Mixture
from laplace_kf.reports import machine, metrics, versions
from laplace_kf.reports.html import Report

__all__ = ["Config", "run"]


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/ood_pairs.yaml``.

    Args:
        seed: of initial weights, order, choice of images and draws.
        threads: processor threads, 0 for torch's default.
        sources: what to train on, now.
        hidden: units of each of the two hidden layers.
        members: networks of the ensemble; the first one is the network.
        epochs: of training.
        batch: examples per minibatch.
        lr: largest step size of Adam; it falls to zero as a cosine.
        prior_precision: ``λ``; training uses the weight decay ``λ/N``.
        val_most: held-out images at most.
        train_most: images to train on at most.
        fit_most: training images of the curvature at most; it is a mean.
        test_most: test images, and strangers of every kind, at most.
        samples: weight draws of the mutual information.
        mixture: whether to fit and tune the mixture of the ensemble's posteriors too, more than half of the time.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    sources: list[str] = field(default_factory=lambda: list(SOURCES))
    hidden: int = 256
    members: int = 5
    epochs: int = 8
    batch: int = 128
    lr: float = 2e-3
    prior_precision: float = 1.0
    val_most: int = 4000
    train_most: int = 25_000
    fit_most: int = 10_000
    test_most: int = 4000
    samples: int = 30
    mixture: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in (
            "hidden",
            "members",
            "epochs",
            "batch",
            "val_most",
            "train_most",
            "fit_most",
            "test_most",
            "samples",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        for name in ("lr", "prior_precision"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        known = bool(self.sources) and set(self.sources) <= set(SOURCES)
        require("sources", self.sources, known, f"some of {list(SOURCES)}")


def _networks(config: Config, given: Problem, path: Path) -> list[nn.Sequential]:
    """The trained members, from ``path`` if they are there."""
    seeds = [1000 * config.seed + k for k in range(config.members)]
    widths = [784, config.hidden, config.hidden, given.classes]
    colour = given.train[0].dim() == 4
    if colour:
        models = [wide_residual(given.classes, blocks=1, factor=1, seed=seed) for seed in seeds]
    else:
        models = [training.mlp(widths, seed=seed) for seed in seeds]
    if path.is_file():
        for model, state in zip(models, torch.load(path, weights_only=True), strict=True):
            model.load_state_dict(state)
            model.eval()
        return models
    if colour:
        for model, seed in zip(models, seeds, strict=True):
            _train_alone(config, model, given, seed, path.with_name(f"{path.stem}-{seed}.pt"))
        torch.save([model.state_dict() for model in models], path)
        return models
    train_stacked(
        models, [given.train], [0] * len(models), loss=_cross_entropy, epochs=config.epochs, batch=config.batch,
        lr=config.lr, decays=[config.prior_precision / len(given.train[0])] * len(models), seed=config.seed,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([model.state_dict() for model in models], path)
    return models


def _train_alone(config: Config, model: nn.Module, given: Problem, seed: int, kept: Path) -> None:
    """The same training as :func:`train_stacked`'s of a network that is not stacked; ``kept`` has what is finished."""
    batches = training.Batches(*given.train, config.batch, training.generator(seed))
    decay = config.prior_precision / len(given.train[0])
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    text = f"network {seed}" if config.progress else None
    training.train(model, batches, optimizer, config.epochs, scheduler=scheduler, progress=text, kept=kept)


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Means over minibatches, ``(M,)``, of outputs ``(M, B, C)``."""
    return nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").mean(1)


def _fit(config: Config, model: nn.Module, given: Problem) -> LaplacePosterior:
    some = given.train[0][: config.fit_most], given.train[1][: config.fit_most]
    return LaplacePosterior(model, "categorical").fit(some, generator=training.generator(config.seed))


def _tune(config: Config, posterior: LaplacePosterior | Mixture, given: Problem) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a best value on the edge of the search
        return str(posterior.tune(given.val, generator=training.generator(config.seed)))


ONE: dict[str, dict[str, Any]] = {
    "default: entropy": {"kind": "entropy"},
    "default: information": {"kind": "mutual_information"},
    "leverage, last layer": {"kind": "leverage"},
    "leverage, all layers": {"kind": "leverage", "layers": "all"},
    "direction, last layer": {"kind": "direction"},
    "auto": {"kind": "auto"},
    "auto, last layer": {"kind": "auto", "layers": "last"},
    "auto, all layers": {"kind": "auto", "layers": "all"},
}
"""Scores of the posterior of one network."""
SEVERAL: dict[str, dict[str, Any]] = {
    "mixture: entropy": {"kind": "entropy"},
    "mixture: information": {"kind": "mutual_information"},
    "mixture: auto": {"kind": "auto"},
}


def _asked(
    config: Config, posterior: LaplacePosterior | Mixture, x: Tensor, scores: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """Scores ``(N,)`` of images ``(N, ...)``, larger is stranger."""
    found = {}
    for name, settings in scores.items():
        rng, settings = training.generator(config.seed), {"samples": config.samples, **settings}
        found[name] = torch.cat([posterior.ood_score(part, generator=rng, **settings) for part in x.split(2500)])
    return found


def _plain(models: list[nn.Sequential], x: Tensor) -> dict[str, Tensor]:
    """Scores ``(N,)`` of the first network and of the ensemble."""
    members = torch.stack([training.outputs(model, x).softmax(-1) for model in models])
    entropies = metrics.entropy(members.flatten(0, 1)).unflatten(0, members.shape[:2])
    whole = metrics.entropy(members.mean(0))
    return {
        "MAP: entropy": entropies[0],
        "ensemble: entropy": whole,
        "ensemble: information": whole - entropies.mean(0),
    }


def _part(config: Config, source: str, folder: Path) -> dict[str, Any]:
    """One source, run and kept in ``folder`` unless it is there already."""
    kept = _kept(config, source, folder)
    if kept:
        return kept
    start = time.perf_counter()
    given = problem(
        source, seed=config.seed, val_most=config.val_most, train_most=config.train_most, test_most=config.test_most
    )
    models = _networks(config, given, folder / f"{source}.pt")
    trained = time.perf_counter() - start
    images = {"": given.test[0], **given.strangers}
    probs = torch.stack([training.outputs(model, given.test[0]).softmax(-1) for model in models])
    scores = {name: _plain(models, x) for name, x in images.items()}
    posterior = _fit(config, models[0], given)
    tuned = {"default": _tune(config, posterior, given)}
    method, quality = posterior.method, {
        "MAP": metrics.classification(probs[0], given.test[1]),
        "default": _quality(posterior, given),
        "ensemble": metrics.classification(probs.mean(0), given.test[1]),
    }  # fmt: skip
    for name, x in images.items():
        scores[name] |= _asked(config, posterior, x, ONE)
    if config.mixture:
        mixture = Mixture([posterior, *(_fit(config, model, given) for model in models[1:])])
        tuned["mixture"] = _tune(config, mixture, given)
        quality["mixture"] = _quality(mixture, given)
        for name, x in images.items():
            scores[name] |= _asked(config, mixture, x, SEVERAL)
    inside = scores.pop("")
    pairs = {
        name: {key: metrics.out_of_distribution(inside[key], outside[key]) for key in inside}
        for name, outside in scores.items()
    }
    part = {
        "settings": _decisive(config), "versions": versions(), "machine": machine(), "quality": quality,
        "pairs": pairs, "tuned": tuned, "method": method, "references": len(given.val[0]),
        "seconds": {"training": trained, "all": time.perf_counter() - start},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{source}.json").write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    if config.progress:
        tqdm.write(f"{source}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return part


def _quality(posterior: LaplacePosterior | Mixture, given: Problem) -> dict[str, float]:
    """Metrics of the default prediction of test images."""
    parts = [posterior.predict(x, generator=training.generator(0)).probs for x in given.test[0].split(2500)]
    return metrics.classification(torch.cat(parts), given.test[1])


def _kept(config: Config, source: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{source}.json"
    try:
        part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # cut short: run it again
        return {}
    return part if part.get("settings") == _decisive(config) else {}


FREE = {"sources", "threads", "progress", "mixture"}
"""Settings that leave the numbers that are there as they are."""


def _decisive(config: Config) -> dict[str, Any]:
    """The settings that a part's numbers depend on."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def run(config: Config, folder: Path) -> Report:
    """Run the sources that were asked for and report on all that are finished; keeps them in ``folder``."""
    for source in config.sources:
        _part(config, source, folder)
    found = {source: part for source in SOURCES if (part := _kept(config, source, folder))}
    verdicts = judged(found)
    tables = [pairs_table(found), targets_table(verdicts), quality_table(found)]
    summary = (
        f"784-{config.hidden}-{config.hidden} ReLU networks, {config.epochs} epochs, ensembles of {config.members}; "
        f"{config.test_most} test images and as many strangers at most; seed {config.seed}."
    )
    return Report(
        title="Scores of strange inputs on pairs of image sets",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics={source: part["pairs"] for source, part in found.items()},
        tables=tables,
        pictures=[],
        details={
            **quoted(summary, tables),
            "quality": {source: part["quality"] for source, part in found.items()},
            "tuned": {source: part["tuned"] for source, part in found.items()},
            "seconds": {source: part["seconds"] for source, part in found.items()},
            "verdicts": verdicts,
            "not_run": [source for source in SOURCES if source not in found],
            "stand_ins": [],
        },
    )
