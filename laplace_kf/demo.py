"""Known and unknown digits: what a posterior over the weights adds to a trained classifier, in half a minute.

A small network learns the handwritten digits 0 to 4 that come with scikit-learn (no download). The digits 5 to 9 are
then inputs it knows nothing about. Noise on every pixel makes the task hard enough for a network to be wrong, and
overconfident, now and then; without it (``noise=0``) there is next to nothing to gain from uncertainty. The table
compares the trained network itself (MAP), MC dropout, and Laplace posteriors of three structures, each as derived
(``N`` = number of training examples, ``λ`` = the weight decay it was trained with) and with ``(N, λ)`` tuned on
validation data.

Run it with ``python -m laplace_kf demo [--out DIR]``. Needs the ``experiments`` extra.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import missing_extra, processor_threads

if TYPE_CHECKING:
    from laplace_kf.reports.html import Report

__all__ = ["Config", "main", "mc_dropout", "private_rng", "run"]

KNOWN = 5
"""Digits below this are learned, the others are out of distribution."""

POSTERIORS = {"diagonal": ("diag", "all"), "Kronecker": ("kron", "all"), "full last layer": ("full", "last_layer")}


@dataclass
class Config:
    """Settings of the demo.

    Args:
        seed: decides the split, both networks and every draw.
        noise: standard deviation of the Gaussian noise on every pixel; grey levels are 0 to 1.
        hidden: width of the two hidden layers.
        epochs: passes over the training digits, for each of the two networks.
        prior_precision: ``λ``; the networks are trained with the weight decay ``λ/N`` that belongs to it.
        dropout: rate of the network that MC dropout uses.
        samples: Monte Carlo samples of every prediction.
        tune_samples: Monte Carlo samples of each grid point of tuning.
        threads: processor threads; matrices this small only lose time to a second one, a lot on a busy machine.
    """

    seed: int = 0
    noise: float = 0.3
    hidden: int = 50
    epochs: int = 60
    prior_precision: float = 0.1
    dropout: float = 0.5
    samples: int = 100
    tune_samples: int = 30
    threads: int = 1


@contextlib.contextmanager
def private_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the ``with`` block and put them back to where they were at its end."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def mc_dropout(
    model: nn.Module, inputs: Tensor, samples: int, generator: torch.Generator, *, size: int = 5000
) -> Tensor:
    """Class probabilities averaged over random dropout masks (methods 10.4).

    A sample is one thinned network: its mask is the same for all inputs of a forward pass, as a weight draw is. (Every
    input's average has the distribution that masks of its own would give it, for a fraction of the random numbers.)
    The model runs in eval mode, so BatchNorm and the like stay put; only the ``nn.Dropout`` modules drop, with masks
    from ``generator``. Modes and the global generator are left as they were.

    Args:
        model: a classifier with ``nn.Dropout`` modules.
        inputs: ``(N, ...)``.
        samples: number of masks ``S``.
        generator: draws the masks; on the device of ``inputs``.
        size: examples per forward pass.

    Returns:
        ``(N, C)`` probabilities.
    """

    def drop(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        keep = 1.0 - float(module.p)  # type: ignore[arg-type]
        mask = torch.empty_like(output[:1]).bernoulli_(keep, generator=generator)
        return output * mask / keep if keep else torch.zeros_like(output)

    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(drop) for module in modes if isinstance(module, nn.Dropout)]
    model.eval()
    try:
        with torch.no_grad():
            parts = [sum(model(part).softmax(-1) for _ in range(samples)) / samples for part in inputs.split(size)]
            return torch.cat(parts)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _digits(seed: int, noise: float) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Noisy digits 0 to 4 as ``{train, val, test}`` pairs (a third, a quarter, the rest), and the images of 5 to 9."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn") from error
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order]
    images = images + noise * torch.randn(images.shape, generator=generator)
    known = labels < KNOWN
    inside, targets = images[known], labels[known]
    cut = [len(inside) // 3, len(inside) // 4, len(inside) - len(inside) // 3 - len(inside) // 4]
    parts = zip(("train", "val", "test"), inside.split(cut), targets.split(cut), strict=True)
    return {name: (x, y) for name, x, y in parts}, images[~known]


def _network(config: Config, dropout: float, train: tuple[Tensor, Tensor]) -> nn.Sequential:
    """A trained 64-H-H-5 network in eval mode."""
    images, labels = train
    hidden = config.hidden
    with private_rng(config.seed):
        model = nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, KNOWN),
        )  # fmt: skip
        decay = config.prior_precision / len(images)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=decay)
        for _ in range(config.epochs):
            for index in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
    return model.eval()


def _predictions(config: Config) -> tuple[dict[str, Tensor], dict[str, dict[str, float]], Tensor, int]:
    """Probabilities of every method for test and unknown digits together, the (N, λ) behind them, test labels, N."""
    parts, unknown = _digits(config.seed, config.noise)
    inputs = torch.cat([parts["test"][0], unknown])
    n_data = len(parts["train"][0])
    generator = torch.Generator().manual_seed(config.seed)
    model = _network(config, 0.0, parts["train"])
    with torch.no_grad():
        probs = {"MAP": model(inputs).softmax(-1)}
    noisy = _network(config, config.dropout, parts["train"])
    probs["MC dropout"] = mc_dropout(noisy, inputs, config.samples, generator)
    settings: dict[str, dict[str, float]] = {}
    for name, (structure, parameters) in POSTERIORS.items():
        posterior = LaplacePosterior(
            model, "categorical", structure=structure, parameters=parameters, prior_precision=config.prior_precision
        )
        posterior.fit(parts["train"])
        settings[f"{name}, untuned"] = {"n_data": float(n_data), "prior_precision": config.prior_precision}
        probs[f"{name}, untuned"] = posterior.predict(
            inputs, method="mc", samples=config.samples, generator=generator
        ).probs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the table marks it
            tuning = posterior.tune(parts["val"], method="mc", samples=config.tune_samples, generator=generator)
        best = {key: tuning.best[key] for key in ("n_data", "prior_precision")}
        settings[f"{name}, tuned"] = {**best, "at_edge": float(tuning.at_edge)}
        probs[f"{name}, tuned"] = posterior.predict(
            inputs, method="mc", samples=config.samples, generator=generator
        ).probs
    return probs, settings, parts["test"][1], n_data


def run(config: Config) -> Report:
    """Train, fit, tune and compare; returns a :class:`laplace_kf.reports.html.Report` and writes nothing."""
    from laplace_kf.reports import metrics, plots
    from laplace_kf.reports.html import Picture, Report, Table

    start = time.perf_counter()
    probs, settings, labels, n_data = _predictions(config)
    found: dict[str, dict[str, float]] = {}
    inside, outside = {}, {}
    for name, p in probs.items():
        inside[name], outside[name] = metrics.entropy(p[: len(labels)]), metrics.entropy(p[len(labels) :])
        found[name] = {
            **metrics.classification(p[: len(labels)], labels),
            "entropy_in": float(inside[name].mean()),
            "entropy_out": float(outside[name].mean()),
            **metrics.out_of_distribution(inside[name], outside[name]),
            **settings.get(name, {}),
        }
    figure, (left, right) = plots.panels(1, 2, width=5.4, height=4.2)
    plots.inverse_entropy_cdf(inside, axis=left, title="digits 0-4 (known), test", classes=KNOWN)
    plots.inverse_entropy_cdf(outside, axis=right, title="digits 5-9 (unknown)", classes=KNOWN)
    plots.legend_below(figure)
    pairs = {name: (p[: len(labels)], labels) for name, p in probs.items()}
    return Report(
        title="Known and unknown digits",
        summary=(
            f"A 64-{config.hidden}-{config.hidden}-{KNOWN} ReLU network learned the digits 0 to 4 from {n_data} "
            f"noisy images (λ = {config.prior_precision:g}). It is tested on {len(labels)} further images of them and "
            f"on {len(probs['MAP']) - len(labels)} images of the digits 5 to 9, which it has never seen. A useful "
            "posterior keeps the accuracy, gives the true class more probability (lower NLL), and is more uncertain "
            "about what it does not know (higher entropy, higher AUROC). Untuned posteriors of a whole network tend to "
            "be far too wide: a few images say nothing about most of the weights, and what the prior allows there "
            "spoils the predictions. Tuning (N, λ) on validation data is meant to mend that."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics=found,
        tables=[Table("Methods", list(_COLUMNS), [_row(name, row) for name, row in found.items()], _NOTE)],
        pictures=[
            Picture("entropy", figure, "Share of inputs whose predictive entropy is above a threshold. On unknown "
                    "digits (right) a high curve is good; on known ones (left) a low one."),
            Picture("reliability", plots.reliability_diagram(pairs),
                    f"Reliability on the known test digits. {plots.RELIABILITY_KEY}"),
        ],
        details={"wall_time_s": time.perf_counter() - start, "stand_ins": []},
    )  # fmt: skip


_COLUMNS = {
    "method": "", "accuracy %": "accuracy", "NLL": "nll", "ECE %": "ece", "entropy in": "entropy_in",
    "entropy out": "entropy_out", "AUROC": "auroc", "FPR95 %": "fpr95", "N": "n_data", "λ": "prior_precision",
}  # fmt: skip
_NOTE = (
    "NLL and entropies in nats; in: test images of 0-4, out: images of 5-9. AUROC and FPR95 (false alarms when 95 % of "
    "the unknown digits are caught) tell unknown from known digits by entropy. *: on the edge of the grid."
)


def _row(name: str, metrics: Mapping[str, float]) -> list[str]:
    """One table row: percentages with one decimal, the rest with three digits."""
    cells = [name]
    for title, key in list(_COLUMNS.items())[1:]:
        value = metrics.get(key)
        if value is None:
            cells.append("")
        elif title.endswith("%"):
            cells.append(f"{100 * value:.1f}")
        else:
            cells.append(f"{value:.3g}" if key in ("n_data", "prior_precision") else f"{value:.3f}")
    return [*cells[:-1], cells[-1] + " *" * bool(metrics.get("at_edge"))]


def main(out: Path, config: Config | None = None) -> None:
    """Run the demo, print the table, and write ``result.json``, PNG files and ``report.html`` into ``out``."""
    config = config or Config()
    with processor_threads(config.threads):
        report = run(config)
        report.save(out)
    print(report.tables[0].text())
    print(f"\n{report.details['wall_time_s']:.1f} s; wrote {', '.join(sorted(p.name for p in out.iterdir()))} to {out}")
