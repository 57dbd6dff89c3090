"""dattri and kronfluence beside this package: scores of one network of the attribution experiment, and their quality.

The network has seen its half of 5,000 digits five times, the queries' losses are those of the 50 networks of the
experiment (``python -m experiments run attribution`` leaves them in ``results/attribution/parts``; what is missing is
trained). Scores are of 5,000 x 500 pairs in one thread, with what has to be fitted before. Damping is the
experiment's, 10 / 5,000 of the mean curvature, and for kronfluence also its own rule, a tenth of the mean eigenvalue.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk
from benchmarks.timing import kept
from experiments.attribution.run import Bench, Config
from experiments.attribution.scores import datamodelling_score

KEPT = Path("results/attribution_peers.jsonl")  # finished methods; to be deleted where the settings change
PARTS = Path("results/attribution/parts")
EPOCHS, PROJECTED = 5, 512
AT_ONCE = 500  # examples of the peers' batches
TRAINING = 2500  # ... of dattri's training batches: it makes the gradients of all queries anew for each of them
Pair = tuple[Tensor, Tensor]


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """``log p / (1 - p)`` of the labels, ``(N,)``."""
    rows = torch.arange(len(y))
    others = logits.clone()
    others[rows, y] = -torch.inf
    return logits[rows, y] - others.logsumexp(1)


def _loader(data: Pair, size: int) -> Any:
    return DataLoader(TensorDataset(*data), size)


def ours(damping: str, of: str) -> Callable[[nn.Module, Pair, Pair, float], Tensor]:
    """Kronecker scores of this package."""

    def scores(model: nn.Module, train: Pair, queries: Pair, prior: float) -> Tensor:
        posterior = lk.LaplacePosterior(model, "categorical", prior_precision=prior, damping=damping).fit(train)
        return lk.attribution.influence(posterior, train, queries, of, accuracy=1e-2)

    return scores


def ours_ekfac(model: nn.Module, train: Pair, queries: Pair, prior: float) -> Tensor:
    """EK-FAC scores of this package."""
    posterior = lk.LaplacePosterior(model, "categorical", structure="ekfac", prior_precision=prior).fit(train)
    return lk.attribution.influence(posterior, train, queries, "margin")


def dattri_trak(model: nn.Module, train: Pair, queries: Pair, prior: float) -> Tensor:
    """TRAK of one network (Park et al. 2023) as dattri has it."""
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    def logits(weights: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, weights, (x[None],))
        return out

    def margin(weights: Any, pair: Any) -> Tensor:
        loss = nn.functional.cross_entropy(logits(weights, pair[0]), pair[1][None])
        p = (-loss).exp()
        return (p / (1 - p).clamp_min(1e-12)).log()

    def right(weights: Any, pair: Any) -> Tensor:
        return (-nn.functional.cross_entropy(logits(weights, pair[0]), pair[1][None])).exp()

    task = AttributionTask(loss_func=margin, model=model, checkpoints=model.state_dict())
    attributor = TRAKAttributor(
        task=task, correct_probability_func=right, device="cpu", projector_kwargs={"proj_dim": PROJECTED}
    )
    attributor.cache(_loader(train, AT_ONCE))
    found: Tensor = attributor.attribute(_loader(queries, AT_ONCE)).T
    return found


def dattri_ekfac(model: nn.Module, train: Pair, queries: Pair, prior: float) -> Tensor:
    """EK-FAC influence as dattri has it, on losses."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask

    def loss(weights: Any, pair: Any) -> Tensor:
        x, y = pair
        x, y = (x[None], y[None]) if y.dim() == 0 else (x, y)
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = IFAttributorEKFAC(task=task, device="cpu", damping=prior / len(train[0]))
    attributor.cache(_loader(train, AT_ONCE))
    found: Tensor = attributor.attribute(_loader(train, TRAINING), _loader(queries, AT_ONCE)).T
    return found


def kronfluence(own_damping: bool) -> Callable[[nn.Module, Pair, Pair, float], Tensor]:
    """EK-FAC influence on margins as kronfluence has it."""

    def scores(model: nn.Module, train: Pair, queries: Pair, prior: float) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Digits(Task):  # type: ignore[misc, unused-ignore]
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                logits = model(batch[0])
                y = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sample else batch[1]
                return nn.functional.cross_entropy(logits, y, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return -_margin(model(batch[0]), batch[1]).sum()

        with tempfile.TemporaryDirectory() as folder:
            made = prepare_model(model, Digits())
            analyzer = Analyzer(
                "digits", made, Digits(), cpu=True, disable_tqdm=True, output_dir=folder, log_level=logging.ERROR
            )
            sets = [TensorDataset(*data) for data in (train, queries)]
            analyzer.fit_all_factors(
                "factors", sets[0], per_device_batch_size=500, factor_args=FactorArguments(strategy="ekfac")
            )
            settings = ScoreArguments(damping_factor=None if own_damping else prior / len(train[0]))
            analyzer.compute_pairwise_scores(
                "scores", "factors", sets[1], sets[0], per_device_query_batch_size=500,
                per_device_train_batch_size=500, score_args=settings,
            )  # fmt: skip
            found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
        return found

    return scores


METHODS: dict[str, tuple[str, Callable[[nn.Module, Pair, Pair, float], Tensor]]] = {
    "laplace_kf, Kronecker, factored damping, margin": ("laplace_kf", ours("factored", "margin")),
    "laplace_kf, Kronecker, exact damping, margin": ("laplace_kf", ours("exact", "margin")),
    "laplace_kf, Kronecker, factored damping, loss": ("laplace_kf", ours("factored", "loss")),
    "laplace_kf, EK-FAC, margin": ("laplace_kf", ours_ekfac),
    "kronfluence, EK-FAC, margin": ("kronfluence", kronfluence(False)),
    "kronfluence, EK-FAC, margin, its damping": ("kronfluence", kronfluence(True)),
    f"dattri, TRAK, {PROJECTED} projections": ("dattri", dattri_trak),
    "dattri, EK-FAC, loss": ("dattri", dattri_ekfac),
}


def run(rounds: int = 1) -> dict[str, Any]:
    """Datamodelling score and processor seconds of every method, once; ``rounds`` is not used."""
    torch.set_num_threads(1)
    config = Config()
    bench = Bench(config, PARTS)
    truth = bench.truth()

    def one(scores: Callable[[nn.Module, Pair, Pair, float], Tensor]) -> dict[str, Any]:
        (model,) = bench.networks([0], EPOCHS)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            start = time.process_time()
            try:
                made = scores(model, bench.train, bench.queries, config.damping).detach()
            except Exception as error:
                return {"not_run": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
            seconds = time.process_time() - start
        return {"score": float(datamodelling_score(made, *truth).mean()), "seconds": seconds}

    found: dict[str, Any] = {}
    for name, (package, scores) in METHODS.items():
        if importlib.util.find_spec(package) is None:
            found[name] = {"not_run": f"{package} is not installed"}
        else:
            found[name] = kept(KEPT, name, partial(one, scores))
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for package in ("dattri", "kronfluence"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "workload": f"one network 784-128-64-10 after {EPOCHS} passes over a half of 5000 digits; 5000 x 500 pairs; "
        f"losses of {config.subsets} networks trained on other halves",
        "methods": found,
        "peers": versions,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'method':50} {'LDS':>6} {'s':>8}"]
    for name, each in result["methods"].items():
        shown = each["not_run"] if "not_run" in each else f"{each['score']:6.3f} {each['seconds']:8.1f}"
        lines.append(f"{name:50} {shown}")
    return "\n".join(lines)
