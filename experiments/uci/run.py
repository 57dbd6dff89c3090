"""Nine regression tables, standard splits: networks, posteriors and mixtures beside published figures.

Networks with one hidden layer of 50 units (100 for protein), as in Gal and Ghahramani 2016 and Lakshminarayanan et al.
2017. On every split a fifth of the training rows chooses the head (constant or predicted noise), the weight decay, and
the settings of every method; then networks are trained anew on all training rows, and the settings travel.

* ``MAP`` and ``laplace_kf``: one network; the second is ``fit`` and ``tune`` as they come, N counted anew.
* ``deep ensemble``: the equal mixture of the normal variables of five networks.
* ``mixture``: the same of five linearised posteriors with the dense Gauss-Newton matrix, tuned together.

Conformal intervals are those of a network of the first stage. About half of the held-out rows calibrate them, and no
choice sees these rows: head, weight decay and the posterior's settings come from the other half alone, the units from
the rows that were trained on. Beside it absolute residuals of the same network (split-conformal on MAP).

Finished tables are kept in ``parts`` of the results folder: ``python -m experiments run uci sets=[yacht]``.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.common import data, training
from experiments.common.checks import require
from experiments.common.stacked import train_stacked
from experiments.continual.report import quoted
from experiments.uci.methods import HEADS, Chosen, Member, choose, likelihood, log_density, loss, member
from experiments.uci.report import conformal_table, judged, log_likelihood_table, targets_table
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import machine, versions
from laplace_kf.reports.html import Report

__all__ = ["Config", "run"]

Pair = tuple[Tensor, Tensor]
Plan = tuple[str, float]
"""Head and λ."""
LEVEL = 0.9
FORMAT = 2
"""Of what is kept; 1 calibrated on rows that had chosen the network."""


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/uci.yaml``.

    Args:
        seed: of initial weights, order and held-out rows.
        threads: processor threads, 0 for torch's default.
        sets: which tables to run now.
        splits: the first so many standard splits, of tables that have them.
        members: networks of the mixtures.
        trial_members: networks by which head and weight decay are chosen.
        steps: minibatches of training, at least one pass.
        batch: examples per minibatch.
        lr: largest step size of Adam; it falls to zero as a cosine.
        priors: values of λ to choose from; training uses the weight decay ``λ/N``.
        val_share: share of the training rows that chooses.
        curvature_most: training rows of the dense Gauss-Newton matrix at most; it is a mean.
        at_a_time: splits whose networks are trained as one stack.
        progress: whether to say what is going on.
    """

    seed: int = 0
    threads: int = 1
    sets: list[str] = field(default_factory=data.tables)
    splits: int = 20
    members: int = 5
    trial_members: int = 2
    steps: int = 3000
    batch: int = 50
    lr: float = 1e-2
    priors: list[float] = field(default_factory=lambda: [0.03, 0.3, 2.0, 10.0])
    val_share: float = 0.2
    curvature_most: int = 4000
    at_a_time: int = 5
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("splits", "members", "trial_members", "steps", "batch", "curvature_most", "at_a_time"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("threads", self.threads, self.threads >= 0, "at least 0")
        require("lr", self.lr, self.lr > 0, "above 0")
        require("priors", self.priors, self.priors and min(self.priors) > 0, "some numbers above 0")
        require("val_share", self.val_share, 0 < self.val_share < 1, "between 0 and 1")
        known = bool(self.sets) and set(self.sets) <= set(data.tables())
        require("sets", self.sets, known, f"some of {data.tables()}")


@dataclass(frozen=True)
class Rows:
    """The rows of one split, int64 each; no row is in two of them.

    Args:
        choosing: held-out rows of which every choice may make use.
        calibrating: held-out rows that calibrate conformal intervals, and that no choice for these makes use of.
        train: the other training rows of the split.
        test: its test rows.
    """

    choosing: Tensor
    calibrating: Tensor
    train: Tensor
    test: Tensor


def _rows(config: Config, table: data.Regression, number: int) -> Rows:
    """A part of the training rows held out, by seed and number of the split; about half of it calibrates."""
    rows, test = table.splits[number]
    order = rows[torch.randperm(len(rows), generator=training.generator(1000 * config.seed + number))]
    held = int(config.val_share * len(rows))
    # conformal intervals cover ceil(0.9 (n + 1))/(n + 1) on average: 9, 19, 29, ... rows give 90 % and not more
    calibrating = 10 * max(1, round((held / 2 + 1) / 10)) - 1
    require("val_share", config.val_share, calibrating < held, f"enough for {calibrating + 1} held-out rows")
    choosing = held - calibrating
    return Rows(order[:choosing], order[choosing:held], order[held:], test)


@dataclass(frozen=True)
class Split:
    """One split, standardised by the part to train on first.

    Args:
        train: what is trained on first.
        choosing: held-out rows by which the conformal network is chosen and tuned.
        calibrating: held-out rows that calibrate its intervals.
        val: both of them, by which everything else is chosen and tuned.
        all: all training rows.
        test: the test rows.
        scale: unit of the targets.
    """

    train: Pair
    choosing: Pair
    calibrating: Pair
    val: Pair
    all: Pair
    test: Pair
    scale: float


def _split(config: Config, table: data.Regression, number: int) -> Split:
    rows = _rows(config, table, number)

    def standardised(values: Tensor) -> Tensor:
        known = values[rows.train]
        spread = known.std(0)
        return ((values - known.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))).float()

    x, y = standardised(table.features), standardised(table.target)
    val = torch.cat([rows.choosing, rows.calibrating])
    parts = {
        "train": rows.train, "choosing": rows.choosing, "calibrating": rows.calibrating, "val": val,
        "all": torch.cat([val, rows.train]), "test": rows.test,
    }  # fmt: skip
    pairs = {name: (x[part], y[part]) for name, part in parts.items()}
    return Split(**pairs, scale=float(table.target[rows.train].std()))


def _train(config: Config, sets: Sequence[Pair], head: str, priors: Sequence[float], members: int, seed: int) -> Any:
    """Networks by ``[set][prior][member]``."""
    count, width = sets[0][0].shape
    hidden = 100 if count > 30_000 else 50
    keys = [(s, p, m) for s in range(len(sets)) for p in priors for m in range(members)]
    models = [training.mlp([width, hidden, HEADS[head]], seed=seed + 100 * s + m) for s, _, m in keys]
    epochs = max(1, round(config.steps / max(1, count // config.batch)))
    train_stacked(
        models, sets, [s for s, _, _ in keys], loss=loss, epochs=epochs, batch=config.batch, lr=config.lr,
        decays=[p / count for _, p, _ in keys], seed=seed,
    )  # fmt: skip
    found = iter(models)
    return [[[next(found) for _ in range(members)] for _ in priors] for _ in sets]


def _some(pair: Pair, most: int) -> Pair:
    return pair[0][:most], pair[1][:most]


def _quiet_tune(posterior: LaplacePosterior, val: Pair, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a win of MAP, or the edge of the search
        posterior.tune(val, generator=training.generator(seed))


def _default(one: Split, head: str, trial: nn.Module, final: nn.Module, seed: int) -> tuple[Tensor, str]:
    """Log densities ``(N,)`` of the tuned default, its settings on a posterior of all rows; and the method."""
    tuned = LaplacePosterior(trial, likelihood(head)).fit(one.train)
    _quiet_tune(tuned, one.val, seed)
    noise = tuned.likelihood.noise_scale
    posterior = LaplacePosterior(final, likelihood(head, 1.0 if noise is None else float(noise))).fit(one.all)
    posterior.n_data = tuned.n_data * len(one.all[0]) / len(one.train[0])
    posterior.prior_precision, posterior.method = tuned.prior_precision, tuned.method
    posterior.temperature = tuned.temperature
    found = posterior.predict(one.test[0], generator=training.generator(seed))
    return found.log_prob(one.test[1]), tuned.method


def _conformal(one: Split, head: str, model: nn.Module, seed: int) -> dict[str, float]:
    """Coverage and mean width (standardised) of 90 % intervals, by the posterior and by residuals of the network."""
    second = one.calibrating
    posterior = LaplacePosterior(model, likelihood(head)).fit(one.train)
    _quiet_tune(posterior, one.choosing, seed)
    posterior.calibrate(second, generator=training.generator(seed))
    low, high = posterior.predict_interval(one.test[0], LEVEL, generator=training.generator(seed))
    residuals = (training.outputs(model, second[0])[:, 0] - second[1][:, 0]).abs().sort().values
    bound = residuals[math.ceil(round((len(residuals) + 1) * LEVEL, 9)) - 1]
    errors = (training.outputs(model, one.test[0])[:, 0] - one.test[1][:, 0]).abs()
    inside = (low <= one.test[1]) & (one.test[1] <= high)
    return {
        "coverage": float(inside.double().mean()), "width": float((high - low).mean()),
        "MAP coverage": float((errors <= bound).double().mean()), "MAP width": float(2 * bound),
    }  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """What was trained for one split.

    Args:
        head: and the prior precision λ, chosen on the held-out rows.
        prior: λ.
        trial: networks of the first stage, trained without those rows.
        final: networks trained on all training rows.
        conformal_head: chosen without the rows that calibrate.
        conformal_prior: λ, likewise.
        conformal: one network of the first stage of that head and λ.
    """

    head: str
    prior: float
    trial: list[nn.Module]
    final: list[nn.Module]
    conformal_head: str
    conformal_prior: float
    conformal: list[nn.Module]


def _networks(config: Config, splits: Sequence[Split]) -> list[Networks]:
    """Head and weight decay chosen, and networks trained anew on all rows, for several splits of a table."""
    trials: list[dict[Plan, list[nn.Module]]] = [{} for _ in splits]
    for head in HEADS:
        nets = _train(config, [one.train for one in splits], head, config.priors, config.trial_members, config.seed)
        for found, mine in zip(trials, nets, strict=True):
            found.update({(head, p): mine[k] for k, p in enumerate(config.priors)})
    plans = [_plan(trials[s], one.val, len(one.train[0])) for s, one in enumerate(splits)]
    conformal = [_plan(trials[s], one.choosing, len(one.train[0])) for s, one in enumerate(splits)]
    finals: dict[int, list[nn.Module]] = {}
    for plan in sorted(set(plans)):
        own = [s for s, chosen in enumerate(plans) if chosen == plan]
        nets = _train(config, [splits[s].all for s in own], plan[0], [plan[1]], config.members, config.seed + 7)
        finals |= {s: nets[k][0] for k, s in enumerate(own)}
    return [
        Networks(*plan, trials[s][plan], finals[s], *conformal[s], trials[s][conformal[s]][:1])
        for s, plan in enumerate(plans)
    ]


def _plan(trials: Mapping[Plan, list[nn.Module]], data: Pair, count: int) -> Plan:
    """Head and λ of the networks whose mixture, with the noise that suits it best, makes ``data`` likeliest.

    Args:
        trials: networks by head and λ.
        data: what decides.
        count: training rows.
    """
    scores: dict[Plan, float] = {}
    for plan, nets in trials.items():
        found = [member(net, plan[0], None, data[0]) for net in nets]
        scores[plan] = float(log_density(found, choose(found, data[1], count), data[1]).mean())
    return max(scores, key=lambda plan: scores[plan] if math.isfinite(scores[plan]) else -math.inf)


def _table(config: Config, name: str, numbers: Sequence[int], folder: Path) -> dict[str, Any]:
    """Some splits of one table, by number; their networks are kept in ``folder`` and used again."""
    table = data.regression(name)
    splits = {number: _split(config, table, number) for number in numbers}
    paths = {number: folder / "networks" / f"{name}-{number}.pt" for number in numbers}
    loaded = {number: _loaded(config, paths[number], splits[number]) for number in numbers}
    missing = [number for number in numbers if loaded[number] is None]
    if missing:
        for number, found in zip(missing, _networks(config, [splits[number] for number in missing]), strict=True):
            loaded[number] = found
            _save(config, found, paths[number])
    return {
        str(number): _measured(config, splits[number], networks, 1000 * config.seed + number)
        for number, networks in loaded.items()
        if networks is not None
    }


def _save(config: Config, networks: Networks, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nets = {name: [net.state_dict() for net in getattr(networks, name)] for name in ("trial", "final", "conformal")}
    plans = {name: getattr(networks, name) for name in ("head", "prior", "conformal_head", "conformal_prior")}
    torch.save({"settings": _decisive(config), "format": FORMAT, **plans, **nets}, path)


def _loaded(config: Config, path: Path, one: Split) -> Networks | None:
    """Networks that are kept, if they were trained with the same settings."""
    if not path.is_file():
        return None
    kept = torch.load(path, weights_only=True)
    if kept["settings"] != _decisive(config) or kept.get("format") != FORMAT:
        return None

    def nets(states: list[dict[str, Tensor]], head: str) -> list[nn.Module]:
        found: list[nn.Module] = []
        for state in states:
            hidden = len(next(iter(state.values())))
            net = training.mlp([one.train[0].shape[1], hidden, HEADS[head]])
            net.load_state_dict(state)
            found.append(net.eval())
        return found

    head, other = kept["head"], kept["conformal_head"]
    trial, final, conformal = nets(kept["trial"], head), nets(kept["final"], head), nets(kept["conformal"], other)
    return Networks(head, kept["prior"], trial, final, other, kept["conformal_prior"], conformal)


def _measured(config: Config, one: Split, networks: Networks, seed: int) -> dict[str, Any]:
    """Mean test log likelihood by method, in original units, and the conformal intervals, of one split."""
    head, count, trial, final = networks.head, len(one.train[0]), networks.trial, networks.final
    shrink = count / len(one.all[0])
    some, every = _some(one.train, config.curvature_most), _some(one.all, config.curvature_most)
    before: list[Member] = [member(net, head, some, one.val[0]) for net in trial]
    after: list[Member] = [member(net, head, every, one.test[0]) for net in final]
    bare = [Member(each.mean, each.noise, each.variances[:0]) for each in before]
    settings = {
        "MAP": (choose(bare[:1], one.val[1], count), 1), "deep ensemble": (choose(bare, one.val[1], count), len(after)),
        "linearized, full": (choose(before[:1], one.val[1], count), 1),
        "mixture": (choose(before, one.val[1], count), len(after)),
    }  # fmt: skip
    logs = {
        name: log_density(after[:size], Chosen(c.ratio, c.size * shrink, c.noise), one.test[1])
        for name, (c, size) in settings.items()
    }
    logs["laplace_kf"], method = _default(one, head, trial[0], final[0], seed)
    errors = torch.stack([each.mean for each in after]) - one.test[1][:, 0]
    return {
        "head": head, "prior": networks.prior, "method": method,
        "log likelihood": {name: float(value.mean()) - math.log(one.scale) for name, value in logs.items()},
        "rmse": {"one network": one.scale * float(errors[0].square().mean().sqrt()),
                 "five networks": one.scale * float(errors.mean(0).square().mean().sqrt())},
        "settings": {name: asdict(c) for name, (c, _) in settings.items()},
        "conformal": _conformal(one, networks.conformal_head, networks.conformal[0], seed),
        "conformal network": {"head": networks.conformal_head, "prior": networks.conformal_prior},
        "scale": one.scale,
    }  # fmt: skip


def _part(config: Config, name: str, folder: Path) -> None:
    """The splits of one table, a few at a time, run and kept in ``folder`` unless they are there already."""
    wanted = range(min(config.splits, len(data.regression(name).splits)))
    while missing := [number for number in wanted if str(number) not in _kept(config, name, folder)]:
        start = time.perf_counter()
        kept = _kept(config, name, folder)
        splits = {**kept, **_table(config, name, missing[: config.at_a_time], folder)}
        folder.mkdir(parents=True, exist_ok=True)
        spent = (_seconds(name, folder) if kept else 0.0) + time.perf_counter() - start
        part = {
            "settings": _decisive(config),
            "format": FORMAT,
            "versions": versions(),
            "machine": machine(),
            "seconds": spent,
        }
        part["splits"] = splits
        (folder / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
        if config.progress:
            tqdm.write(f"{name}, {len(splits)} splits: {time.perf_counter() - start:.1f} s", file=sys.stderr)


def _seconds(name: str, folder: Path) -> float:
    """What the splits of a table that are kept have taken, by the clock."""
    return float(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")).get("seconds", 0.0))


def _kept(config: Config, name: str, folder: Path) -> dict[str, Any]:
    """Finished splits of a table by number, if they were made with the settings of ``config``."""
    path = folder / f"{name}.json"
    try:
        part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # cut short: run it again
        return {}
    same = part.get("settings") == _decisive(config) and part.get("format") == FORMAT
    return dict(part["splits"]) if same else {}


def _decisive(config: Config) -> dict[str, Any]:
    """The settings that a table's numbers depend on."""
    free = {"sets", "splits", "threads", "progress"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def run(config: Config, folder: Path) -> Report:
    """Run the tables that were asked for and report on all that are finished; keeps them in ``folder``."""
    for name in config.sets:
        _part(config, name, folder)
    found = {name: list(splits.values()) for name in data.tables() if (splits := _kept(config, name, folder))}
    verdicts = judged(found)
    tables = [log_likelihood_table(found), conformal_table(found), targets_table(verdicts)]
    missing = [name for name in data.tables() if name not in found]
    return Report(
        title="Regression tables beside published figures",
        summary=(summary := (
            f"One hidden layer of 50 units (100 for protein), {config.steps} steps; head and weight decay chosen on "
            f"{config.val_share:.0%} of the training rows, then refitted on all; mixtures of {config.members}. "
        )),
        seed=config.seed,
        config=asdict(config),
        metrics={name: [split["log likelihood"] for split in splits] for name, splits in found.items()},
        tables=tables,
        pictures=[],
        details={
            **quoted(summary, tables), "splits": found, "verdicts": verdicts, "not_run": missing, "stand_ins": [],
            "seconds": {name: _seconds(name, folder) for name in found},
        },
    )  # fmt: skip
