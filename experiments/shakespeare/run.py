"""What does a language model not know? A tutorial on the uncertainty of a transformer, in four steps.

A small character-level transformer, written in plain PyTorch (``transformer.py``: ``nn.Embedding``,
``nn.MultiheadAttention``, ``nn.LayerNorm``, ``nn.Linear``), learns to predict the next character of Shakespeare's
plays. It then reads three texts: plays it has not seen, the same characters shuffled, and Latin, German and French.
All that a network by itself offers is the entropy of its prediction. A posterior over the weights splits it: the mutual
information of next character and weights is the part that more training data would remove. What that is good for, and
what not, is measured (``docs/shakespeare.md``).

1. **Wrap** the trained model as it is. Inputs are indices ``(N, T)``, outputs logits ``(N, T, C)``, targets
   ``(N, T)``; a likelihood of sequences needs no other argument::

       posterior = LaplacePosterior(model, "categorical", structure="kron", estimator="importance", parameters="all")

   ``parameters="last_layer"`` or patterns such as ``["*.mlp.*", "head.*"]`` restrict the posterior to a part.

2. **Fit** the curvature on training windows. One window counts as one example; a sample of them is enough, and
   ``n_data`` says how many there were to sample from::

       posterior.fit((inputs, targets), n_data=number_of_training_windows)

3. **Tune** ``(N, λ)`` on text that was held out::

       posterior.tune((val_inputs, val_targets), n_data=[...], prior_precision=[...])

4. **Predict**. Entropies come by position; the sampled logits ``(S, N, T, C)`` are there for anything else, such as the
   mutual information by character (:func:`by_character`)::

       prediction = posterior.predict(inputs, method="mc", samples=30, keep_samples=True)
       prediction.probs, prediction.position_entropy, prediction.samples

Text: tiny Shakespeare (A. Karpathy, char-rnn); nine tenths are for training, a twentieth for validation, a twentieth
for testing. ``python -m experiments run shakespeare``.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.claims import verdict_table
from experiments.shakespeare import foreign
from experiments.shakespeare.report import (
    CLAIMS,
    Reading,
    measure,
    methods_table,
    pictures,
    texts_table,
    tuning_table,
)
from experiments.shakespeare.transformer import Transformer, encode, windows
from laplace_kf.demo import private_rng
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import metrics
from laplace_kf.reports.html import Report

__all__ = ["Config", "by_character", "run"]

SELECTIONS: dict[str, str | list[str]] = {
    "last layer": "last_layer",
    "feed-forward": ["*.mlp.*", "head.*"],
    "all weights": "all",
}
"""Which parameters the posteriors of this experiment are over."""


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/shakespeare.yaml``.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for weights, order, windows and draws.
        repeats: number of seeds.
        threads: processor threads, 0 for torch's default.
        context: characters of a window, T.
        width: of the embeddings.
        heads: attention heads of a block.
        layers: blocks.
        epochs: passes over the training windows.
        batch: windows per minibatch.
        lr: largest step size of AdamW; it warms up over a tenth of the steps and falls to zero as a cosine.
        characters: how much of the text to use, from its beginning; 0 for all of it.
        selections: which posteriors to compare: names of :data:`SELECTIONS`.
        structure: of their curvature.
        estimator: of their curvature.
        fit_windows: training windows the curvature is estimated on, chosen at random.
        n_data_factors: grid of tuning, as multiples of the number of training windows.
        prior_precisions: grid of tuning for ``λ``.
        tune_windows: validation windows that tuning uses.
        tune_samples: Monte Carlo samples per grid point.
        test_windows: windows of held-out and of shuffled text; the foreign passages are short and used whole.
        samples: Monte Carlo samples of a prediction.
        burn_in: characters at the beginning of every window that only serve as context.
        progress: whether to say what is going on.
    """

    seed: int = 0
    repeats: int = 1
    threads: int = 1
    context: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 3
    epochs: int = 3
    batch: int = 32
    lr: float = 2e-3
    characters: int = 0
    selections: list[str] = field(default_factory=lambda: list(SELECTIONS))
    structure: Literal["kron", "diag"] = "kron"
    estimator: Literal["importance", "sampled", "exact", "projection"] = "importance"
    fit_windows: int = 2000
    n_data_factors: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0, 1000.0])
    prior_precisions: list[float] = field(default_factory=lambda: [100.0, 1000.0, 10_000.0, 100_000.0])
    tune_windows: int = 96
    tune_samples: int = 12
    test_windows: int = 256
    samples: int = 30
    burn_in: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "width", "heads", "layers", "epochs", "batch", "fit_windows", "tune_windows",
                     "tune_samples", "test_windows", "samples"):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        require("lr", self.lr, self.lr > 0, "above 0")
        require("width", self.width, self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        require("burn_in", self.burn_in, 0 <= self.burn_in < self.context, f"from 0 to below context={self.context}")
        for name in ("n_data_factors", "prior_precisions"):
            require(name, grid := getattr(self, name), bool(grid) and min(grid) > 0, "a list of numbers above 0")
        known = set(self.selections) <= set(SELECTIONS)
        require("selections", self.selections, bool(self.selections) and known, f"some of {list(SELECTIONS)}")


@dataclass(frozen=True)
class Texts:
    """Windows ``(inputs, targets)`` of everything that is read, and the alphabet that decodes them."""

    alphabet: str
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    read: dict[str, tuple[Tensor, Tensor]]


def _texts(config: Config, seed: int) -> Texts:
    text = data.text()
    alphabet = "".join(sorted(set(text)))
    text = text[: config.characters] if config.characters else text
    codes = encode(text, alphabet)
    cuts = [len(codes) * 9 // 10, len(codes) * 19 // 20]
    train, val, test = (part.clone() for part in codes.tensor_split(cuts))
    shuffled = test[torch.randperm(len(test), generator=training.generator(seed))]
    passages = [
        windows(encode(foreign.fold(passage, alphabet), alphabet), config.context) for passage in foreign.TEXTS.values()
    ]
    return Texts(
        alphabet=alphabet,
        train=windows(train, config.context),
        val=windows(val, config.context, config.tune_windows),
        read={
            "Shakespeare": windows(test, config.context, config.test_windows),
            "shuffled": windows(shuffled, config.context, config.test_windows),
            "foreign": (torch.cat([x for x, _ in passages]), torch.cat([y for _, y in passages])),
        },
    )


def _trained(config: Config, texts: Texts, seed: int) -> tuple[Transformer, list[float]]:
    """The transformer after training, in eval mode, and the mean loss of every epoch in nats per character."""
    with private_rng(seed):
        model = Transformer(len(texts.alphabet), config.context, config.width, config.heads, config.layers)
    batches = training.Batches(*texts.train, config.batch, training.generator(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    steps = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    history = training.train(
        model, batches, optimizer, config.epochs, after_step=schedule.step, seed=seed,
        loss=lambda logits, targets: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        progress=f"seed {seed}: training" if config.progress else None,
    )  # fmt: skip
    return model, history


def by_character(
    posterior: LaplacePosterior, inputs: Tensor, *, method: str = "mc", samples: int = 30, seed: int = 0, size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and their uncertainty, character by character.

    Args:
        posterior: a fitted one, over a model from ``(N, T)`` to logits ``(N, T, C)``.
        inputs: ``(N, T)``.
        method: of :meth:`LaplacePosterior.predict`.
        samples: weight draws S, the same for every window.
        seed: of the draws.
        size: windows at a time.

    Returns:
        Probabilities ``(N, T, C)`` of the next character; their entropy ``(N, T)`` in nats; the mutual information
        ``(N, T)`` of next character and weights, which is that entropy minus the mean one of the S sampled predictions.
    """
    probs, entropy, information = [], [], []
    for part in inputs.split(size):
        prediction = posterior.predict(
            part, method=method, samples=samples, keep_samples=True, generator=training.generator(seed)
        )
        within = sum(metrics.entropy(logits.softmax(-1)) for logits in prediction.samples) / len(prediction.samples)
        probs.append(prediction.probs)
        entropy.append(prediction.position_entropy)
        information.append((prediction.position_entropy - within).clamp_min(0.0))
    return torch.cat(probs), torch.cat(entropy), torch.cat(information)


@dataclass
class Outcome:
    """One repetition: what every method makes of every text, how training and tuning went, and wall times."""

    readings: dict[str, dict[str, Reading]]
    tuning: dict[str, dict[str, Any]]
    history: list[float]
    seconds: dict[str, float]


def _repetition(config: Config, texts: Texts, seed: int) -> Outcome:
    clock = _Clock(f"seed {seed}" if config.progress else None)
    model, history = _trained(config, texts, seed)
    clock.lap("training")
    inputs, targets = texts.train
    chosen = torch.randperm(len(inputs), generator=training.generator(seed))[: config.fit_windows]
    readings: dict[str, dict[str, Reading]] = {}
    tuning: dict[str, dict[str, Any]] = {}
    for name in config.selections:
        posterior = LaplacePosterior(
            model, "categorical", structure=config.structure, estimator=config.estimator, parameters=SELECTIONS[name]
        )
        sample = training.Batches(inputs[chosen], targets[chosen], config.batch, training.generator(seed))
        posterior.fit(sample, n_data=len(inputs), generator=training.generator(seed))
        clock.lap(f"{name}: fit")
        tuning[name] = _tune(config, posterior, texts.val, len(inputs), seed)
        clock.lap(f"{name}: tune")
        if not readings:
            readings["MAP"] = _read(config, posterior, texts, "map", seed)
        readings[name] = _read(config, posterior, texts, "mc", seed)
        clock.lap(f"{name}: predict")
    return Outcome(readings, tuning, history, clock.seconds)


def _read(config: Config, posterior: LaplacePosterior, texts: Texts, method: str, seed: int) -> dict[str, Reading]:
    return {
        title: Reading(
            inputs, targets, *by_character(posterior, inputs, method=method, samples=config.samples, seed=seed)
        )
        for title, (inputs, targets) in texts.read.items()
    }


def _tune(
    config: Config, posterior: LaplacePosterior, val: tuple[Tensor, Tensor], n_data: int, seed: int
) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the report says so
        result = posterior.tune(
            val, n_data=[factor * n_data for factor in config.n_data_factors],
            prior_precision=config.prior_precisions, samples=config.tune_samples, generator=training.generator(seed),
        )  # fmt: skip
    return {"best": result.best, "at_edge": result.at_edge, "table": result.table,
            "parameters": sum(value.numel() for value in posterior.mean.values())}  # fmt: skip


class _Clock:
    """Wall times of one stage after the other; ``announce`` begins the lines on stderr, None keeps silent."""

    def __init__(self, announce: str | None) -> None:
        self.seconds: dict[str, float] = {}
        self._announce, self._last = announce, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        if self._announce is not None:
            tqdm.write(f"{self._announce}: {name} {self.seconds[name]:.1f} s", file=sys.stderr)


def run(config: Config) -> Report:
    """Train, fit, tune, read the three texts and compare, for every seed; writes nothing."""
    seeds = [config.seed + i for i in range(config.repeats)]
    runs: list[dict[str, dict[str, float]]] = []
    outcomes: list[Outcome] = []
    for seed in seeds:
        texts = _texts(config, seed)
        outcomes.append(_repetition(config, texts, seed))
        runs.append({name: measure(found, config.burn_in) for name, found in outcomes[-1].readings.items()})
    first, parameters = outcomes[0], _size(config, texts)
    summary = {name: metrics.mean_std([found[name] for found in runs]) for name in runs[0]}
    verdicts = [claim.judge(runs) for claim in CLAIMS if claim.method in summary and claim.other in summary]
    confirmed = sum(verdict["verdict"] == "confirmed" for verdict in verdicts)
    tuning = {str(seed): outcome.tuning for seed, outcome in zip(seeds, outcomes, strict=True)}
    return Report(
        title="Shakespeare: what a transformer does not know",
        summary=(
            f"A transformer with {parameters} parameters ({config.layers} blocks of width {config.width}) "
            f"learned to predict the next character from {len(texts.train[0])} windows of {config.context} characters, "
            f"{config.epochs} epochs. It reads {len(texts.read['Shakespeare'][0])} windows of held-out plays, as many "
            f"of the same characters shuffled, and {len(texts.read['foreign'][0])} of Latin, German and French; the "
            f"first {config.burn_in} characters of a window only serve as context. Mean and standard deviation over "
            f"{config.repeats} seed(s). {confirmed} of {len(verdicts)} claims confirmed."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics=summary,
        tables=[
            methods_table(summary), texts_table(summary), verdict_table(verdicts),
            tuning_table(tuning, len(texts.train[0])),
        ],
        pictures=pictures(first.readings, texts.alphabet, config.burn_in),
        details={
            "seeds": seeds,
            "parameters": parameters,
            "verdicts": verdicts,
            "tuning": tuning,
            "training_loss": {str(seed): outcome.history for seed, outcome in zip(seeds, outcomes, strict=True)},
            "seconds": {str(seed): outcome.seconds for seed, outcome in zip(seeds, outcomes, strict=True)},
            "data": {"tinyshakespeare": "original file", "foreign": "passages in experiments/foreign.py"},
            "stand_ins": [],
        },
    )  # fmt: skip


def _size(config: Config, texts: Texts) -> int:
    with torch.device("meta"):
        model = Transformer(len(texts.alphabet), config.context, config.width, config.heads, config.layers)
    return sum(p.numel() for p in model.parameters())
