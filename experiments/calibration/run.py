"""Do the defaults help? ``fit``, ``tune`` and ``predict`` as they come, on twelve real data sets.

A network with one hidden layer of 50 units is trained on each of nine UCI regression tables and three sets of small
images. A part of the training split is held out; every method may use it to choose its settings:

* ``MAP``: the network itself. For regression its noise is the one that suits the held-out part best.
* ``MAP, temperature``: its logits divided by the temperature that suits the held-out part best. For regression the
  noise is that already, and the two are one.
* ``laplace_kf``: ``LaplacePosterior(model, likelihood).fit(train)``, ``tune(val)``, ``predict(test)``, nothing else.
* ``laplace_kf, linearized``: the same with ``method="linearized"`` in both calls.
* ``laplace_kf, probit``: likewise, for classes.
* ``laplace_kf, mixture``: default posteriors of five networks that started from other weights, tuned together.
* ``deep ensemble``: the equal mixture of these networks themselves; for regression the held-out part chooses the noise.
* ``MC dropout``: networks of the same shape trained with dropout; the held-out part chooses rate and noise.
* ``laplace-torch, marglik`` and ``laplace-torch, gridsearch``: Kronecker, all weights (``peers.py``).

All but MC dropout share the network. What counts is the difference to MAP in test NLL, split by split: with its mean
``d`` and standard error ``e`` (0.001 nats at least) a method is *better* if ``d < -e``, *worse* if ``d > e``, else *not
worse*.

Finished splits are kept in ``parts`` of the results folder, and used again by a later run with the same settings, so
that the benchmark can be run set by set: ``python -m experiments run calibration sets=[yacht,energy]``; the report is
on all the sets that are there. ``anew`` names methods to measure once more, on the same networks, where the columns of
the others stay. Regression sets: Hernández-Lobato and Adams's splits.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.calibration import peers
from experiments.calibration.problems import SETS, Forecast, Problem, problem
from experiments.calibration.report import (
    DROPOUT,
    ENSEMBLE,
    LINEARIZED,
    MAP,
    MIXTURE,
    OURS,
    PEERS,
    PROBIT,
    SCALED,
    claims,
    claims_table,
    compare,
    difference_table,
    metrics_table,
    picture,
    summarise,
)
from experiments.common import training
from experiments.common.checks import require
from experiments.common.stacked import train_stacked
from laplace_kf.errors import IncompatiblePair, UnknownName
from laplace_kf.posterior import LaplacePosterior, Mixture
from laplace_kf.predictive import mc_dropout
from laplace_kf.reports import machine, versions
from laplace_kf.reports.html import Report

__all__ = ["Config", "run"]


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/calibration.yaml``.

    Args:
        seed: of initial weights, order, held-out rows, choice of images and draws.
        threads: processor threads, 0 for torch's default.
        sets: which sets to run now.
        splits: the first so many standard splits of a table, or so many random subsets of images.
        hidden: units of the hidden layer.
        steps: minibatches of training.
        batch: examples per minibatch.
        lr: largest step size of Adam; it falls to zero as a cosine.
        prior_precision: ``λ``; training uses the weight decay ``λ/N``.
        val_share: share of the training rows that is held out for tuning.
        val_most: held-out rows at most.
        train_most: images to train on at most, the held-out ones included.
        test_most: test images at most; tables are used whole.
        members: networks of the deep ensemble and of the mixture, the network itself among them; 1 leaves both out.
        dropout: rates that MC dropout's own network, of the same shape, is trained with; validation chooses. Without
            any it is left out.
        peers: whether to run laplace-torch.
        peer_grid: points of its grid search (its default is 100, over the same range).
        peer_most: laplace-torch is left out of sets with more training rows.
        anew: methods to measure once more in splits that are kept, on networks that must give the kept numbers of MAP.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    sets: list[str] = field(default_factory=lambda: list(SETS))
    splits: int = 5
    hidden: int = 50
    steps: int = 2000
    batch: int = 64
    lr: float = 1e-2
    prior_precision: float = 0.1
    val_share: float = 0.2
    val_most: int = 1000
    train_most: int = 2000
    test_most: int = 2000
    members: int = 5
    dropout: list[float] = field(default_factory=lambda: [0.05, 0.2])
    peers: bool = True
    peer_grid: int = 21
    peer_most: int = 50_000
    anew: list[str] = field(default_factory=list)
    progress: bool = True

    def __post_init__(self) -> None:
        counts = "splits", "hidden", "steps", "batch", "val_most", "train_most", "test_most", "members", "peer_grid"
        for name in counts:
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        for name in ("lr", "prior_precision"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        require("val_share", self.val_share, 0 < self.val_share < 1, "between 0 and 1")
        require("dropout", self.dropout, all(0 < rate < 1 for rate in self.dropout), "rates between 0 and 1")
        require("sets", self.sets, bool(self.sets) and set(self.sets) <= set(SETS), f"some of {list(SETS)}")
        require("anew", self.anew, set(self.anew) <= set(COMPARED), f"some of {list(COMPARED)}")


Settings = dict[str, Any]
Method = Callable[[list[nn.Sequential], Problem, Config, int], tuple[Forecast, Settings]]
"""From the trained networks, of which the first is the one that all methods but mixtures use."""


def _map(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
    outputs = training.outputs(models[0], given.val[0])
    prediction = given.task.plain(outputs, given.val)(training.outputs(models[0], given.test[0]))
    return Forecast(prediction.log_prob(given.test[1]), given.task.point(prediction)), {}


def _scaled(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
    outputs = training.outputs(models[0], given.val[0])
    temperature = given.task.temperature(outputs, given.val[1])
    prediction = given.task.plain(outputs, given.val)(training.outputs(models[0], given.test[0]) / temperature)
    settings = {"temperature": temperature}
    return Forecast(prediction.log_prob(given.test[1]), given.task.point(prediction)), settings


def _ours(**method: Any) -> Method:
    def forecast(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
        rng = training.generator(seed)
        posterior = LaplacePosterior(models[0], given.task.likelihood).fit(given.train, generator=rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the settings say so
            tuned = posterior.tune(given.val, generator=rng, **method)
        prediction = posterior.predict(given.test[0], generator=rng, **method)
        settings = {
            "method": posterior.method,
            "n_data_factor": posterior.n_data / posterior.counted_data,
            "prior_precision": posterior.prior_precision,
            **posterior.likelihood.parameters(),
            "at_edge": tuned.at_edge,
        }
        return Forecast(prediction.log_prob(given.test[1]), given.task.point(prediction)), settings

    return forecast


def _peer(how: str) -> Method:
    def forecast(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
        return peers.laplace_torch(models[0], given, how, grid=config.peer_grid, seed=seed)

    return forecast


def _ensemble(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
    """The network and others that started elsewhere, mixed equally."""

    def outputs(x: Tensor) -> Tensor:
        return torch.stack([training.outputs(one, x) for one in models])

    return _best({"": outputs}, outputs(given.val[0])[0], given)


def _mixture(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
    """Default posteriors of the ensemble's networks, tuned together."""
    rng = training.generator(seed)
    posteriors = [LaplacePosterior(one, given.task.likelihood).fit(given.train, generator=rng) for one in models]
    mixture = Mixture(posteriors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tuned = mixture.tune(given.val, generator=rng)
    prediction = mixture.predict(given.test[0], generator=rng)
    settings = {"method": mixture.method, "cost": tuned.cost}
    return Forecast(prediction.log_prob(given.test[1]), given.task.point(prediction)), settings


def _dropout(models: list[nn.Sequential], given: Problem, config: Config, seed: int) -> tuple[Forecast, Settings]:
    """Networks trained with dropout, whose masks are drawn again at test time; validation chooses the rate."""
    nets = {rate: _thinned(config, given, seed, rate) for rate in config.dropout}

    def outputs(net: nn.Module, x: Tensor) -> Tensor:
        masks = training.generator(seed)
        found = mc_dropout(net, given.task.likelihood, generator=masks)(x, keep_samples=True).samples
        assert found is not None
        return found

    plain = training.outputs(nets[config.dropout[0]], given.val[0])
    return _best({f"{rate:g}": partial(outputs, net) for rate, net in nets.items()}, plain, given)


def _best(
    makes: Mapping[str, Callable[[Tensor], Tensor]], outputs: Tensor, given: Problem
) -> tuple[Forecast, Settings]:
    """Of several mixtures, each with every likelihood that the task offers, the one that suits validation data best.

    Args:
        makes: from inputs ``(N, D)`` to outputs ``(S, N, C)`` of what is mixed, by name.
        outputs: of a network ``(N, C)`` at validation inputs, by which the likelihoods are placed.
        given: the problem.
    """
    scores: dict[tuple[str, int], float] = {}
    likelihoods = given.task.likelihoods(outputs, given.val[1])
    for name, make in makes.items():
        found = make(given.val[0])
        for number, likelihood in enumerate(likelihoods):
            scores[name, number] = float(likelihood.predict(found).log_prob(given.val[1]).mean())
    name, number = max(scores, key=lambda key: scores[key] if math.isfinite(scores[key]) else -math.inf)
    prediction = likelihoods[number].predict(makes[name](given.test[0]))
    settings = {"chosen": name, **likelihoods[number].parameters()}
    return Forecast(prediction.log_prob(given.test[1]), given.task.point(prediction)), settings


COMPARED: dict[str, Method] = {
    MAP: _map,
    SCALED: _scaled,
    OURS: _ours(),
    LINEARIZED: _ours(method="linearized"),
    PROBIT: _ours(method="probit"),
    MIXTURE: _mixture,
    ENSEMBLE: _ensemble,
    DROPOUT: _dropout,
    **dict(zip(PEERS, (_peer("marglik"), _peer("gridsearch")), strict=True)),
}
OPTIONAL = LINEARIZED, PROBIT
"""Methods that a version of this package or a task may lack; failures of another package's are results."""


def _left_out(title: str, config: Config, rows: int) -> str:
    """Why a method is not run, given the number of training rows; empty if it is."""
    if title in (MIXTURE, ENSEMBLE):
        return "left out" if config.members == 1 else ""
    if title == DROPOUT:
        return "" if config.dropout else "left out"
    if title in PEERS:
        too_many = f"more than {config.peer_most} training rows" if rows > config.peer_most else ""
        return too_many if config.peers else "left out"
    return ""


def _trained(config: Config, given: Problem, seed: int) -> list[nn.Sequential]:
    """The network and the others of the ensemble, which start from other weights and see the rows in other orders."""
    models = [_network(config, given, seed + 100_000 * k) for k in range(config.members)]
    count = len(given.train[0])
    train_stacked(
        models, [given.train], [0] * len(models), loss=given.task.loss, epochs=_epochs(config, count),
        batch=config.batch, lr=config.lr, decays=[config.prior_precision / count] * len(models), seed=seed,
    )  # fmt: skip
    return models


def _thinned(config: Config, given: Problem, seed: int, rate: float) -> nn.Sequential:
    """A network trained with dropout."""
    model = _network(config, given, seed, rate)
    batches = training.Batches(*given.train, config.batch, training.generator(seed))
    epochs = _epochs(config, len(given.train[0]))
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.lr, weight_decay=config.prior_precision / len(given.train[0]), fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    training.train(model, batches, optimizer, epochs, loss=given.task.loss, after_step=schedule.step, seed=seed)
    return model


def _network(config: Config, given: Problem, seed: int, dropout: float = 0.0) -> nn.Sequential:
    """One that is not trained yet."""
    return training.mlp([given.train[0].shape[1], config.hidden, given.outputs], dropout=dropout, seed=seed)


def _epochs(config: Config, count: int) -> int:
    return max(1, round(config.steps / max(1, count // config.batch)))


def _split(config: Config, name: str, split: int, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """Metrics, settings, seconds and failures of every method on one split, or of some where the others' are kept."""
    given = problem(
        name, split, seed=config.seed, val_share=config.val_share, val_most=config.val_most,
        train_most=config.train_most, test_most=config.test_most,
    )  # fmt: skip
    seed = 1000 * config.seed + split
    models = _trained(config, given, seed)
    found: dict[str, Any] = {
        "sizes": {part: len(getattr(given, part)[0]) for part in ("train", "val", "test")},
        "metrics": {}, "settings": {}, "seconds": {}, "failures": {},
    }  # fmt: skip
    for title, method in COMPARED.items():
        if kept is not None and title not in (MAP, *config.anew):
            for column in ("metrics", "settings", "seconds", "failures"):
                if title in kept[column]:
                    found[column][title] = kept[column][title]
            continue
        if why := _left_out(title, config, len(given.train[0])):
            found["failures"][title] = why
            continue
        start = time.process_time()
        try:
            forecast, settings = method(models, given, config, seed)
        except Exception as error:  # another package may fail in any way, and that is a result too
            if title not in PEERS and not (title in OPTIONAL and isinstance(error, UnknownName | IncompatiblePair)):
                raise
            found["failures"][title] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        scores = given.task.scores(forecast, given.test[1], given.scale)
        if not all(map(math.isfinite, scores.values())):
            found["failures"][title] = "its predictions are not finite"
            continue
        found["metrics"][title], found["settings"][title] = scores, settings
        found["seconds"][title] = time.process_time() - start
        if title == MAP and kept is not None and found["metrics"][MAP] != kept["metrics"][MAP]:
            raise ValueError(
                f"{name}, split {split}: MAP gives {found['metrics'][MAP]} where {kept['metrics'][MAP]} is kept, so "
                "the columns would be of different networks; empty the parts folder and run all methods"
            )
    return found


def _part(config: Config, name: str, folder: Path) -> dict[str, Any]:
    """The splits of one set, run and kept in ``folder`` unless they are there already."""
    splits = _kept(config, name, folder)
    for split in range(config.splits):
        kept = splits.get(str(split))
        if kept is not None and not config.anew:
            continue
        start = time.perf_counter()
        splits[str(split)] = _split(config, name, split, kept)
        folder.mkdir(parents=True, exist_ok=True)
        part = {"settings": _decisive(config), "versions": versions(), "machine": machine(), "splits": splits}
        (folder / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
        if config.progress:
            tqdm.write(f"{name}, split {split}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return splits


def _kept(config: Config, name: str, folder: Path) -> dict[str, Any]:
    """Finished splits of a set by number, if they were made with the settings of ``config``."""
    path = folder / f"{name}.json"
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # cut short: run it again
        return {}
    same = part.get("settings") == _decisive(config)
    return {number: found for number, found in part["splits"].items() if same and int(number) < config.splits}


def _decisive(config: Config) -> dict[str, Any]:
    """The settings that a split's numbers depend on."""
    free = {"sets", "splits", "threads", "anew", "progress"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def run(config: Config, folder: Path) -> Report:
    """Run the sets that were asked for and report on all that are finished; keeps splits in ``folder``."""
    for name in config.sets:
        _part(config, name, folder)
    found = {name: list(_kept(config, name, folder).values()) for name in SETS}
    found = {name: splits for name, splits in found.items() if len(splits) == config.splits}
    comparisons, verdicts = compare(found), claims(found)
    missing = [name for name in SETS if name not in found]
    return Report(
        title="Calibration: the defaults against MAP and laplace-torch",
        summary=(
            f"One hidden layer of {config.hidden} units on {len(found)} of {len(SETS)} data sets, {config.splits} "
            f"split(s) each, {config.val_share:.0%} of the training rows (at most {config.val_most}) held out for the "
            "settings of every method. Differences are in test NLL, paired by split, with their standard error. "
            + (f"Not run: {', '.join(missing)}." if missing else "")
        ),
        seed=config.seed,
        config=asdict(config),
        metrics=summarise(found),
        tables=[difference_table(found, comparisons), metrics_table(found), claims_table(verdicts)],
        pictures=[picture(comparisons)] if found else [],
        details={
            "comparisons": comparisons,
            "verdicts": verdicts,
            "splits": found,
            "seconds": {
                name: sum(sum(split["seconds"].values()) for split in splits) for name, splits in found.items()
            },
            "not_run": missing,
            "data": {"images": "14x14 averages of random subsets", "uci-regression": "standard splits"},
            "stand_ins": [],
        },
    )
