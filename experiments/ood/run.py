"""E20: how uncertain is a digit classifier about letters?

A 784-1024-1024-10 ReLU network learns binarised MNIST: each time an image is shown, every pixel is drawn from a
Bernoulli with its grey level as probability. Predictions for the MNIST test set and for notMNIST letters are compared
between the network itself, MC dropout, Laplace posteriors (diagonal and Kronecker, before and after tuning of
``(N, λ)`` on validation data) and a mean-field variational network.

As published, one network trained with dropout serves the deterministic prediction, MC dropout and both Laplace
posteriors; ``network: plain`` trains the one behind MAP and Laplace without dropout instead. Test, validation and
letter images are binarised once, by the seed (``evaluation: binary``), or left grey.

Source: the thesis on Gauss-Newton matrices, section 5.2.2, figure 5.2, table 5.1.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.claims import verdict_table
from experiments.ood import variational
from experiments.ood.report import CLAIMS, PUBLISHED, Outcome, measure, methods_table, pictures, tuning_table
from laplace_kf.operators import DAMPINGS
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.predictive import mc_dropout
from laplace_kf.reports import metrics
from laplace_kf.reports.html import Report

__all__ = [
    "STRUCTURES",
    "Config",
    "Images",
    "binary_batches",
    "fit_network",
    "load_images",
    "run",
    "tune_posterior",
    "widths",
]

STRUCTURES = {"diagonal": "diag", "Kronecker": "kron"}


@dataclass
class Config:
    """Settings of E20; the defaults are those of ``configs/ood_mnist.yaml``'s processor preset.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for weights, order, binarisation and draws.
        repeats: number of seeds.
        device: ``cpu`` or ``cuda``.
        threads: processor threads, 0 for torch's default.
        hidden: width of the two hidden layers.
        epochs: passes over the training images.
        batch: examples per minibatch of training.
        curvature_batch: examples per minibatch of curvature passes.
        lr: step size of SGD with momentum.
        momentum: its momentum.
        schedule: of the step size; a cosine to zero lets a few epochs come close to where many constant ones end.
        prior_precision: ``λ`` of the Gaussian prior; training uses the weight decay ``λ/N``.
        network: which network MAP and Laplace use (MC dropout always uses the one with dropout).
        dropout: rate of both hidden layers.
        mean_field: whether to train the variational network too.
        mean_field_sigma: its initial standard deviation of every weight. With plain SGD it hardly moves: on the scale
            of a mean loss the pull of each weight's KL is 1/N.
        evaluation: test, validation and letter images binarised once, or grey.
        networks: folder that keeps networks in training after each epoch, so that an interrupted run goes on and E21
            and E22 find the same ones; empty for one beside the results.
        passes: binary draws of every training image that the curvature is averaged over.
        damping: how a Kronecker posterior adds the prior.
        dampings: further ways, tuned and shown beside that one (E34's forms).
        samples: Monte Carlo samples of a prediction.
        closed: further methods that the tuned posteriors predict by, ``linearized`` or ``probit``.
        n_data_factors: grid of tuning, as multiples of the real ``N``.
        prior_precisions: grid of tuning for ``λ``.
        tune_samples: Monte Carlo samples per grid point.
        tune_size: validation images used for tuning, chosen at random.
        train_size: training images (the first ones); the published split is 50,000.
        val_size: validation images, the last of the training file.
        test_size: test images, chosen at random if not all.
        ood_size: letter images, chosen at random if not all.
        progress: whether to show progress bars.
    """

    seed: int = 0
    repeats: int = 3
    device: str = "cpu"
    threads: int = 0
    hidden: int = 1024
    epochs: int = 10
    batch: int = 100
    curvature_batch: int = 500
    lr: float = 5e-2
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "cosine"
    prior_precision: float = 1e-2
    network: Literal["dropout", "plain"] = "dropout"
    dropout: float = 0.5
    mean_field: bool = False
    mean_field_sigma: float = 0.02
    evaluation: Literal["binary", "grey"] = "binary"
    networks: str = ""
    passes: int = 2
    damping: Literal["exact", "factored", "balanced"] = "exact"
    dampings: list[str] = field(default_factory=list)
    samples: int = 100
    closed: list[str] = field(default_factory=list)
    n_data_factors: list[float] = field(default_factory=lambda: [10.0**k for k in range(-1, 5)])
    prior_precisions: list[float] = field(default_factory=lambda: [10.0**k for k in range(-4, 5)])
    tune_samples: int = 10
    tune_size: int = 1000
    train_size: int = 50_000
    val_size: int = 10_000
    test_size: int = 10_000
    ood_size: int = 10_000
    progress: bool = True

    def __post_init__(self) -> None:
        for name in (
            "repeats",
            "hidden",
            "epochs",
            "batch",
            "curvature_batch",
            "passes",
            "samples",
            "tune_samples",
            "tune_size",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "prior_precision", "mean_field_sigma"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        for name in ("n_data_factors", "prior_precisions"):
            require(name, grid := getattr(self, name), bool(grid) and min(grid) > 0, "a list of numbers above 0")
        require("dropout", self.dropout, 0 < self.dropout < 1, "between 0 and 1")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 up to below 1")
        require("val_size", self.val_size, self.tune_size <= self.val_size <= 10_000, "from tune_size to 10000")
        for name, most in (("train_size", 60_000 - self.val_size), ("test_size", 10_000), ("ood_size", 10_000)):
            require(name, getattr(self, name), 1 <= getattr(self, name) <= most, f"from 1 to {most}")
        for damping in self.dampings:
            require("dampings", damping, damping in DAMPINGS, f"of {', '.join(DAMPINGS)}")
        allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        require("device", self.device, self.device.split(":")[0] in allowed, f"here {' or '.join(allowed)}")


@dataclass(frozen=True)
class Images:
    """What one repetition sees, flattened to ``(N, 784)``: grey training images, and fixed images to evaluate on."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    letters: Tensor


def load_images(config: Config, seed: int) -> Images:
    device = torch.device(config.device)
    (x, y), (x_test, y_test), (letters, letter_labels) = (
        data.images("mnist", "train"), data.images("mnist", "test"), data.images("notmnist", "test")
    )  # fmt: skip
    rng = training.generator(seed)

    def fixed(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        # a random choice: MNIST is sorted by writers, so that its first images are not like the others
        chosen = torch.randperm(len(images), generator=rng)[:count]
        flat = images[chosen].flatten(1)
        flat = training.binarise(flat, rng) if config.evaluation == "binary" else flat
        return flat.to(device), labels[chosen].to(device)

    return Images(
        train=(x[: config.train_size].flatten(1).to(device), y[: config.train_size].to(device)),
        val=fixed(x[-config.val_size :], y[-config.val_size :], config.tune_size),
        test=fixed(x_test, y_test, config.test_size),
        letters=fixed(letters, letter_labels, config.ood_size)[0],
    )


def widths(config: Config) -> list[int]:
    return [784, config.hidden, config.hidden, 10]


def fit_network(config: Config, images: Images, seed: int, model: nn.Sequential, note: str) -> nn.Sequential:
    """Train ``model`` on freshly binarised images; a mean-field network on the variational bound, others with L2."""
    device = torch.device(config.device)
    n_data = len(images.train[0])
    batches = binary_batches(config.batch, images, seed)
    bayesian = any(isinstance(module, variational.MeanFieldLinear) for module in model)
    decay = 0.0 if bayesian else config.prior_precision / n_data
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=decay)
    bound = (lambda: variational.kl(model, config.prior_precision) / n_data) if bayesian else None
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    training.train(
        model, batches, optimizer, config.epochs, penalty=bound, seed=seed,
        scheduler=cosine if config.schedule == "cosine" else None,
        progress=f"seed {seed}: {note}" if config.progress else None,
        kept=_place(config, seed, note) if config.networks else None,
    )  # fmt: skip
    return model


TRAINING = (
    "hidden", "epochs", "batch", "lr", "momentum", "schedule", "prior_precision", "dropout", "mean_field_sigma",
    "train_size",
)  # fmt: skip
"""The settings that a trained network depends on, beside the seed."""


def _place(config: Config, seed: int, note: str) -> Path:
    """The file of a network in ``config.networks``; its name says all that the weights depend on."""
    settings = asdict(config)
    words = [note.replace(" ", "-"), f"seed={seed}", *(f"{name}={settings[name]}" for name in TRAINING)]
    return Path(config.networks) / f"{','.join(words)}.pt"


def posteriors(config: Config) -> Iterator[tuple[str, str, str]]:
    """Name, structure and damping of each posterior."""
    for name, structure in STRUCTURES.items():
        yield name, structure, config.damping
    for damping in config.dampings:
        yield f"Kronecker, {damping}", "kron", damping


def binary_batches(size: int, images: Images, seed: int) -> training.Batches:
    rng = training.generator(seed, images.train[0].device)
    return training.Batches(*images.train, size, rng, transform=training.binarise)


def _repetition(config: Config, seed: int) -> Outcome:
    """Everything for one seed."""
    images = load_images(config, seed)
    n_data = len(images.train[0])
    inputs = torch.cat([images.test[0], images.letters])
    probs: dict[str, Tensor] = {}
    settings: dict[str, dict[str, float]] = {}
    tuning: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}

    def stage(name: str) -> AbstractContextManager[None]:
        return _stage(name, seconds, f"seed {seed}: {name}" if config.progress else None)

    with stage("training"):
        noisy = training.mlp(widths(config), dropout=config.dropout, seed=seed)
        model = noisy = fit_network(config, images, seed, noisy, "network with dropout")
        if config.network == "plain":
            plain = training.mlp(widths(config), seed=seed)
            model = fit_network(config, images, seed, plain, "network without dropout")
    rng = training.generator(seed, config.device)
    probs["MAP"] = training.outputs(model, inputs).softmax(-1)
    with stage("MC dropout: prediction"):
        dropped = mc_dropout(noisy, "categorical", config.samples, rng)
        with torch.no_grad():
            probs["MC dropout"] = torch.cat([dropped(part).probs for part in inputs.split(5000)])
    for name, structure, damping in posteriors(config):
        posterior = LaplacePosterior(
            model, "categorical", structure=structure, estimator="exact", damping=damping,
            prior_precision=config.prior_precision,
        )  # fmt: skip
        batches = binary_batches(config.curvature_batch, images, seed)
        with stage(f"{name}: curvature"):
            posterior.fit(batches, passes=config.passes, n_data=n_data, generator=rng)
        settings[f"{name}, untuned"] = {"n_data": float(n_data), "prior_precision": config.prior_precision}
        with stage(f"{name}: prediction"):
            prediction = posterior.predict(inputs, method="mc", samples=config.samples, generator=rng)
            probs[f"{name}, untuned"] = prediction.probs
        with stage(f"{name}: tuning"):
            tuning[name] = tune_posterior(config, posterior, images.val, n_data, rng)
        settings[f"{name}, tuned"] = {key: tuning[name]["best"][key] for key in ("n_data", "prior_precision")}
        with stage(f"{name}: prediction"):
            prediction = posterior.predict(inputs, method="mc", samples=config.samples, generator=rng)
            probs[f"{name}, tuned"] = prediction.probs
        for method in config.closed:
            with stage(f"{name}: {method} prediction"):
                parts = [posterior.predict(part, method=method, generator=rng).probs for part in inputs.split(1000)]
                probs[f"{name}, tuned, {method}"] = torch.cat(parts)
    if config.mean_field:
        sigma = config.mean_field_sigma
        bayes = variational.mean_field_mlp(widths(config), sigma=sigma, seed=seed, device=config.device)
        with stage("mean field: training"):
            fit_network(config, images, seed, bayes, "mean-field network")
        with stage("mean field: prediction"):
            probs["mean field"] = variational.predict(bayes, inputs, config.samples)
    probs = {name: p.cpu() for name, p in probs.items()}
    return Outcome(probs, settings, tuning, images.test[1].cpu(), seconds)


@contextmanager
def _stage(name: str, seconds: dict[str, float], announce: str | None) -> Iterator[None]:
    """Adds the wall time of the block to ``seconds[name]``; says on stderr what is going on, unless it is None."""
    start = time.perf_counter()
    if announce is not None:
        tqdm.write(announce, file=sys.stderr)
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def tune_posterior(
    config: Config, posterior: LaplacePosterior, val: tuple[Tensor, Tensor], n_data: int, rng: torch.Generator
) -> dict[str, Any]:
    """Grid search; returns the best point, whether it lies on the grid's edge, and the whole table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the report says so
        result = posterior.tune(
            val, objective="nll", method="mc",
            n_data=[factor * n_data for factor in config.n_data_factors], prior_precision=config.prior_precisions,
            samples=config.tune_samples, generator=rng,
        )  # fmt: skip
    return {"best": result.best, "at_edge": result.at_edge, "table": result.table}


FREE = ("seed", "repeats", "threads", "progress", "networks")
"""Settings that a finished seed does not depend on: its own number is in the name of its file."""


def _finished(config: Config, seed: int, folder: Path) -> Outcome:
    """One repetition, from ``folder`` if it is there with the same settings; kept there otherwise."""
    path = folder / f"seed-{seed}.pt"
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept.pop("config") == settings:
            return Outcome(**kept)
    outcome = _repetition(replace(config, networks=config.networks or str(folder / "networks")), seed)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save({"config": settings, **vars(outcome)}, unfinished)
    unfinished.replace(path)
    return outcome


def run(config: Config, folder: Path) -> Report:
    """Train, fit, tune, predict and compare, for every seed.

    Finished seeds, and networks in training after each epoch, are kept in ``folder`` and used again.
    """
    seeds = [config.seed + i for i in range(config.repeats)]
    first: Outcome | None = None
    runs, tuning, seconds = [], {}, {}
    for seed in seeds:
        outcome = _finished(config, seed, folder)
        runs.append(measure(outcome))
        tuning[str(seed)], seconds[str(seed)] = outcome.tuning, outcome.seconds
        first = first or outcome
    assert first is not None
    methods = list(runs[0])
    summary = {method: metrics.mean_std([found[method] for found in runs]) for method in methods}
    verdicts = [claim.judge(runs) for claim in CLAIMS if claim.method in methods and claim.other in methods]
    confirmed = sum(verdict["verdict"] == "confirmed" for verdict in verdicts)
    remark = data.DATA_SETS["notmnist"].remark
    return Report(
        title="E20: predictive entropy on letters after training on digits",
        summary=(
            f"A 784-{config.hidden}-{config.hidden}-10 ReLU network trained for {config.epochs} epochs on "
            f"{config.train_size} binarised MNIST images; mean and standard deviation over {config.repeats} seed(s). "
            f"Evaluated on {config.test_size} MNIST test images (in) and {config.ood_size} notMNIST letters (out), "
            f"{config.evaluation}. {confirmed} of {len(verdicts)} claims confirmed."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics=summary,
        tables=[methods_table(summary), verdict_table(verdicts), tuning_table(tuning, config.train_size)],
        pictures=pictures(first, seeds[0]),
        details={
            "seeds": seeds,
            "verdicts": verdicts,
            "tuning": tuning,
            "seconds": seconds,
            "published_accuracy": PUBLISHED,
            "data": {"mnist": "original files", "notmnist": remark},
            "stand_ins": [],
        },
        device=config.device,
    )
