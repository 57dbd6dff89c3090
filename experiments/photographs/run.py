"""E23: is a photograph classifier more uncertain where it is wrong?

Wide residual networks learn CIFAR-100, one with dropout and one without. Deterministic predictions, MC dropout and
Laplace posteriors, tuned on the first half of the test images, are compared on the other half: accuracy, and predictive
entropy of the images that are classified rightly and wrongly. Normalisation uses its running statistics during
curvature passes and has a diagonal block of its own.

Source: Botev 2020, 5.2.4, table 5.2, figure 5.5.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from experiments.photographs.network import wide_residual
from laplace_kf.likelihoods import Prediction, get_likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.predictive import mc_dropout
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "augmented", "by_correctness", "run"]

CLASSES = 100


@dataclass
class Config(Repeated):
    """Settings of E23.

    Args:
        blocks: residual blocks in each of three groups; published: 3.
        factor: of the widths 16, 32 and 64; published: 8.
        dropout: rate of the network with dropout.
        side: of the images, scaled down from 32; a multiple of 4.
        train_size: training images, the first ones; published: 50,000. The lossless copy that is read where there is no
            original archive has 10,000.
        epochs: passes over them; published: 200.
        batch: images of an update; published: 128.
        lr: initial step size of Nesterov's momentum, a fifth of it after each quarter of the epochs; published: 0.1.
        l2: weight decay; published: 5e-4.
        passes: augmented draws of every image for the curvature; published: 5000.
        curvature_size: images of the curvature; ``n_data`` stays that of training.
        curvature_batch: images of one step of it.
        samples: Monte Carlo samples of a prediction.
        tune_samples: of a point of the grid.
        n_data_factors: grid of tuning, as multiples of the real ``N``.
        prior_precisions: grid of tuning for ``λ``.
        tune_size: images of tuning, the first of the test file; published: 5000.
        count: images of evaluation, the last of the test file; published: 5000.
        progress: whether to show progress bars.
    """

    repeats: int = 1
    blocks: int = 1
    factor: int = 1
    dropout: float = 0.3
    side: int = 8
    train_size: int = 10_000
    epochs: int = 4
    batch: int = 128
    lr: float = 0.1
    l2: float = 5e-4
    passes: int = 1
    curvature_size: int = 1_000
    curvature_batch: int = 250
    samples: int = 10
    tune_samples: int = 5
    n_data_factors: list[float] = field(default_factory=lambda: [0.1, 1.0, 10.0, 100.0, 1000.0])
    prior_precisions: list[float] = field(default_factory=lambda: [0.1, 10.0, 1000.0, 100_000.0])
    tune_size: int = 500
    count: int = 2_000
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blocks", "factor", "epochs", "batch", "passes", "curvature_batch", "samples", "tune_samples"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "l2"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("n_data_factors", "prior_precisions"):
            require(name, grid := getattr(self, name), bool(grid) and min(grid) > 0, "a list of numbers above 0")
        require("dropout", self.dropout, 0 < self.dropout < 1, "between 0 and 1")
        require("side", self.side, self.side in range(4, 33, 4), "a multiple of 4 from 4 to 32")
        require("train_size", self.train_size, 2 <= self.train_size <= 50_000, "from 2 to 50000")
        require("curvature_size", self.curvature_size, 1 <= self.curvature_size <= self.train_size,
                "from 1 to train_size")  # fmt: skip
        for name in ("tune_size", "count"):
            require(name, getattr(self, name), 2 <= getattr(self, name) <= 5_000, "from 2 to 5000")


ONE_KIND = "a method was always right or always wrong"
EDGE = f"tuning ended on the edge of its grid, where a posterior is as good as its mode (see tuned), or {ONE_KIND}"
"""Why a comparison may say nothing."""
Tuned = partial(Statement, needs="tuned inside the grid", otherwise=EDGE)
Split = partial(Statement, needs="right and wrong", otherwise=ONE_KIND)
STATEMENTS = (
    Tuned("the Kronecker posterior keeps the accuracy of the network without dropout (difference, at least -1 point)",
          "accuracy, Kronecker - plain", -1, published="+0.18"),
    Tuned("and that of the network with dropout", "accuracy, Kronecker - dropout network", -1, published="-0.02"),
    Split("so does MC dropout", "accuracy, MC dropout - dropout network", -1, published="+0.08"),
    Split("every method is less certain where it is wrong (smallest difference of mean entropies, in nats)",
          "wrong - right, smallest", 1e-9),
    Tuned("the Kronecker posterior raises the entropy of what is right and of what is wrong (the smaller rise)",
          "rise, Kronecker, smaller", 1e-9),
    Split("so does MC dropout", "rise, MC dropout, smaller", 1e-9),
    Tuned("and by about as much (mean rise of the Kronecker posterior over that of MC dropout)",
          "rise, Kronecker over MC dropout", 0.5, 2),
    Tuned("the diagonal posterior has to become deterministic (its mean rise over the Kronecker posterior's)",
          "rise, diagonal over Kronecker", -0.1, 0.1),
)  # fmt: skip


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images ``(N, 3, S, S)``, half of them mirrored, each moved by up to ``S/8`` pixels, empty at the border."""
    count, _, side, _ = images.shape
    reach = side // 8
    mirrored = torch.rand(count, generator=rng) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = nn.functional.pad(images, (reach,) * 4)
    start = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=rng)
    rows, columns = start + torch.arange(side)
    chosen = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[chosen, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def by_correctness(probs: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor]:
    """Accuracy in percent, and the entropies in nats of right and of wrong predictions ``probs (N, C)``."""
    right = probs.argmax(-1) == labels
    entropy = torch.special.entr(probs).sum(-1)
    return 100 * float(right.double().mean()), entropy[right], entropy[~right]


@dataclass
class _Photographs:
    """Normalised images of one run, and labels."""

    train: tuple[Tensor, Tensor]
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _load(config: Config) -> _Photographs:
    x, y = data.images("cifar100", "train")
    require("train_size", config.train_size, config.train_size <= len(x), f"at most {len(x)}, the images that are here")
    x_test, y_test = data.images("cifar100", "test")
    x, y = x[: config.train_size], y[: config.train_size]
    x_tune, y_tune = x_test[: config.tune_size], y_test[: config.tune_size]
    x_test, y_test = x_test[-config.count :], y_test[-config.count :]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)

    def scaled(images: Tensor) -> Tensor:
        images = (images - mean) / std
        small = images.shape[-1] != config.side
        return nn.functional.interpolate(images, size=config.side, mode="area") if small else images

    return _Photographs((scaled(x), y), (scaled(x_tune), y_tune), (scaled(x_test), y_test))


def _trained(config: Config, images: _Photographs, seed: int, dropout: float) -> nn.Sequential:
    model = wide_residual(CLASSES, blocks=config.blocks, factor=config.factor, dropout=dropout, seed=seed)
    batches = training.Batches(*images.train, config.batch, training.generator(seed), transform=augmented)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, nesterov=True, weight_decay=config.l2)
    falls = torch.optim.lr_scheduler.StepLR(optimizer, max(config.epochs // 4, 1), 0.2)
    training.train(model, batches, optimizer, config.epochs, scheduler=falls, seed=seed,
                   progress=f"seed {seed}: dropout {dropout:g}" if config.progress else None)  # fmt: skip
    return model


def _tuned(
    config: Config, model: nn.Sequential, structure: str, images: _Photographs, seed: int
) -> tuple[Callable[[Tensor], Prediction], dict[str, Any]]:
    """A posterior's Monte Carlo prediction after tuning, and how it was tuned."""
    n_data = len(images.train[0])
    rng = training.generator(seed)
    posterior = LaplacePosterior(model, "categorical", structure=structure, estimator="sampled",
                                 prior_precision=config.l2 * n_data)  # fmt: skip
    part = (images.train[0][: config.curvature_size], images.train[1][: config.curvature_size])
    batches = training.Batches(*part, config.curvature_batch, rng, transform=augmented)
    posterior.fit(batches, passes=config.passes, n_data=n_data, generator=rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the verdicts say so
        result = posterior.tune(
            images.tune, objective="nll", method="mc", samples=config.tune_samples, generator=rng,
            n_data=[factor * n_data for factor in config.n_data_factors], prior_precision=config.prior_precisions,
        )  # fmt: skip
    chosen = {**{name: result.best[name] for name in ("n_data", "prior_precision")}, "at_edge": result.at_edge}
    return posterior.predictor(config.samples, rng), chosen


def run(config: Config) -> Report:
    """Accuracy, and entropy of right and wrong predictions, by method."""
    shown: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {"wrong": {}, "right": {}}
    details: dict[str, object] = {}
    images = _load(config)

    def measure(seed: int) -> Found:
        networks = {"dropout network": config.dropout, "plain network": 0.0}
        models = {name: _trained(config, images, seed, rate) for name, rate in networks.items()}
        likelihood = get_likelihood("categorical")
        predicts: dict[str, Callable[[Tensor], Prediction]] = {
            name: lambda x, model=model: likelihood.predict(model(x)[None])  # type: ignore[misc]
            for name, model in models.items()
        }
        noisy = models["dropout network"]
        predicts["MC dropout"] = mc_dropout(noisy, "categorical", config.samples, training.generator(seed))
        tuned = {}
        for name, model, structure in (
            ("Kronecker, dropout network", noisy, "kron"),
            ("diagonal, dropout network", noisy, "diag"),
            ("Kronecker, plain network", models["plain network"], "kron"),
        ):
            predicts[name], tuned[name] = _tuned(config, model, structure, images, seed)
        details[f"tuned, seed {seed}"] = tuned
        numbers: dict[str, float] = {}
        for name, predict in predicts.items():
            with torch.no_grad():
                probs = torch.cat([predict(part).probs for part in images.test[0].split(config.curvature_batch)])
            accuracy, right, wrong = by_correctness(probs, images.test[1])
            numbers[f"accuracy, {name}"] = accuracy
            for what, entropy in (("right", right), ("wrong", wrong)):
                numbers[f"entropy, {name}, {what}"] = float(entropy.mean())
                ordered = entropy.sort(descending=True)[0].tolist()
                shown[what].setdefault(name, (ordered, [(i + 1) / len(ordered) for i in range(len(ordered))]))

        def rise(name: str, over: str, what: str) -> float:
            return numbers[f"entropy, {name}, {what}"] - numbers[f"entropy, {over}, {what}"]

        rises = {name: [rise(name, "dropout network", what) for what in shown]
                 for name in ("Kronecker, dropout network", "diagonal, dropout network", "MC dropout")}  # fmt: skip
        kron, diagonal, dropped = rises.values()
        both = all(0 < numbers[f"accuracy, {name}"] < 100 for name in predicts)
        return {
            **numbers,
            "accuracy, Kronecker - plain": numbers["accuracy, Kronecker, plain network"]
            - numbers["accuracy, plain network"],
            "accuracy, Kronecker - dropout network": numbers["accuracy, Kronecker, dropout network"]
            - numbers["accuracy, dropout network"],
            "accuracy, MC dropout - dropout network": numbers["accuracy, MC dropout"]
            - numbers["accuracy, dropout network"],
            "wrong - right, smallest": min(
                numbers[f"entropy, {name}, wrong"] - numbers[f"entropy, {name}, right"] for name in predicts
            ),
            "rise, Kronecker, smaller": min(kron),
            "rise, MC dropout, smaller": min(dropped),
            "rise, Kronecker over MC dropout": sum(kron) / sum(dropped),
            "rise, diagonal over Kronecker": sum(diagonal) / sum(kron),
            "right and wrong": float(both),
            "tuned inside the grid": float(
                both and not any(tuned[name]["at_edge"] for name in tuned if name.startswith("Kronecker"))
            ),
        }

    def pictures() -> Sequence[Picture]:
        text = "Share of the {} predictions with at least that entropy, seed {}."
        return [lines(what, text.format(what, config.seed), curves, ("entropy in nats", "share"))
                for what, curves in shown.items()]  # fmt: skip

    return judged(
        "E23: uncertainty on errors, CIFAR-100",
        f"Wide residual networks, {config.blocks} blocks a group, widths times {config.factor}, on CIFAR-100.",
        config,
        measure,
        STATEMENTS,
        size=size(config),
        pictures=pictures,
        details=details,
    )


def size(config: Config) -> str:
    """How the settings compare with the published ones."""
    named = ("blocks", "factor", "side", "train_size", "epochs", "passes", "tune_size", "count")
    if tuple(getattr(config, name) for name in named) == (3, 8, 32, 50_000, 200, 5000, 5000, 5000):
        return "The published size."
    return (
        "Not the published size (3 blocks a group, widths times 8, 32 pixels a side, 50000 images, 200 epochs, 5000 "
        f"augmented draws, 5000 images each to tune and to evaluate): {config.blocks} blocks, times {config.factor}, "
        f"{config.side} pixels, {config.train_size} images, {config.epochs} epochs, {config.passes} draws, "
        f"{config.tune_size} and {config.count} images."
    )
