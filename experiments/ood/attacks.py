"""What E21 and E22 share: the networks of E20, with every predictive as a function of images that can be attacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from experiments.common import training
from experiments.common.checks import require
from experiments.common.statements import Repeated
from experiments.ood import run as ood
from laplace_kf.likelihoods import Prediction, get_likelihood
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.predictive import mc_dropout

__all__ = ["AttackConfig", "Attacked", "Predict", "attacked", "inside_grid", "size"]

Predict = Callable[[Tensor], Prediction]


@dataclass
class AttackConfig(Repeated):
    """Settings of both attacks.

    Args:
        hidden: width of both hidden layers; published: 1024.
        epochs: passes over the training images; published: 250.
        batch, lr, schedule: of training, as E20 has them.
        networks: folder of trained networks, as E20 has it.
        train_size: training images; published: 50,000.
        passes: binary draws of every image for the curvature; published: 1000.
        curvature_size: images of the curvature; ``n_data`` stays that of training.
        samples: Monte Carlo samples of a prediction; published: 100.
        count: test images that are attacked; published: all 10,000.
        n_data_factors: grid of tuning, as multiples of the real ``N``.
        prior_precisions: grid of tuning for ``λ``.
        tune_size: validation images of tuning.
        progress: whether to show progress bars.
    """

    hidden: int = 256
    epochs: int = 4
    batch: int = 100
    lr: float = 5e-2
    schedule: Literal["constant", "cosine"] = "cosine"
    networks: str = ""
    train_size: int = 20_000
    passes: int = 1
    curvature_size: int = 5_000
    samples: int = 20
    count: int = 300
    n_data_factors: list[float] = field(default_factory=lambda: [0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0])
    prior_precisions: list[float] = field(default_factory=lambda: [0.01, 1.0, 100.0, 10_000.0])
    tune_size: int = 500
    progress: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "count", "curvature_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("curvature_size", self.curvature_size, self.curvature_size <= self.train_size, "at most train_size")
        require("count", self.count, self.count <= 10_000, "at most 10000")
        self.network()

    def network(self) -> ood.Config:
        """The settings as E20 has them; checks them."""
        return ood.Config(
            hidden=self.hidden, epochs=self.epochs, batch=self.batch, lr=self.lr, schedule=self.schedule,
            networks=self.networks, train_size=self.train_size, passes=self.passes, n_data_factors=self.n_data_factors,
            prior_precisions=self.prior_precisions, tune_size=self.tune_size, test_size=self.count, ood_size=1,
            tune_samples=5, samples=self.samples, progress=self.progress,
        )  # fmt: skip


@dataclass
class Attacked:
    """One seed: predictives by name, test images ``(N, 784)`` and labels, ranges of the pixels, edges of tuning."""

    predictives: dict[str, Predict]
    images: Tensor
    labels: Tensor
    ranges: Tensor
    tuned: dict[str, dict[str, float]]


def attacked(config: AttackConfig, seed: int) -> Attacked:
    """Trains the network with dropout, fits and tunes both posteriors.

    A predictive makes its random numbers anew from the seed in every call, so that all steps of an attack see one
    function, and so do predictions before and after it.
    """
    settings = config.network()
    images = ood.load_images(settings, seed)
    model = training.mlp(ood.widths(settings), dropout=settings.dropout, seed=seed)
    model = ood.fit_network(settings, images, seed, model, "network with dropout")
    likelihood = get_likelihood("categorical")
    found: dict[str, Predict] = {"MAP": lambda x: likelihood.predict(model(x)[None])}

    def dropped(x: Tensor) -> Prediction:
        return mc_dropout(model, "categorical", config.samples, training.generator(seed))(x)

    found["MC dropout"] = dropped
    tuned = {}
    for name, structure in ood.STRUCTURES.items():
        posterior = LaplacePosterior(
            model, "categorical", structure=structure, prior_precision=settings.prior_precision
        )
        rng = training.generator(seed)
        part = ood.Images((images.train[0][: config.curvature_size], images.train[1][: config.curvature_size]),
                          images.val, images.test, images.letters)  # fmt: skip
        batches = ood.binary_batches(settings.curvature_batch, part, seed)
        posterior.fit(batches, passes=config.passes, n_data=config.train_size, generator=rng)
        chosen = ood.tune_posterior(settings, posterior, images.val, config.train_size, rng)
        tuned[name] = {"n_data": chosen["best"]["n_data"], "prior_precision": chosen["best"]["prior_precision"],
                       "at_edge": float(chosen["at_edge"])}  # fmt: skip
        found[name] = _sampled(posterior, config.samples, seed)
    ranges = images.train[0].amax(0) - images.train[0].amin(0)
    return Attacked(found, *images.test, ranges, tuned)


def _sampled(posterior: LaplacePosterior, samples: int, seed: int) -> Predict:
    return lambda x: posterior.predict(x, method="mc", samples=samples, generator=training.generator(seed))


EDGE = "tuning ended on the edge of its grid, where a posterior is as good as its mode (see tuned in result.json)"
"""Why a comparison of tuned posteriors may say nothing about them."""


def inside_grid(found: Attacked) -> float:
    """1 if both posteriors were tuned to settings inside the grid, else 0."""
    return float(not any(entry["at_edge"] for entry in found.tuned.values()))


def size(config: AttackConfig) -> str:
    """How the settings compare with the published ones."""
    full = (config.hidden, config.epochs, config.train_size, config.passes, config.samples, config.count)
    if full == (1024, 250, 50_000, 1000, 100, 10_000):
        return "The published size."
    return (
        f"Not the published size (1024 units, 250 epochs, 50000 images, 1000 draws, 100 samples, 10000 test images): "
        f"{config.hidden} units, {config.epochs} epochs, {config.train_size} images, {config.passes} draws, "
        f"{config.samples} samples, {config.count} test images; no mean-field network."
    )
