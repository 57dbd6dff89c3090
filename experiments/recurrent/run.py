"""E4: Hessian-free optimisation of recurrent networks on problems with long dependencies.

A tanh network with one recurrent layer learns temporal order, addition and noiseless memorisation of five bits
(``sequences.py``) at several lengths T, from the sparse initialisation, with fresh sequences at every
iteration; with Tikhonov damping alone, and with structural damping μ = 1/30 as well. CG stops once the reduction of the
objective falls below 90 % of the largest one of its run. A run succeeds when less than 1 % of the test sequences are
answered wrongly, and fails when its iterations or its processor time are used up.

Every finished run is kept in ``parts`` and used again by a later run with the same settings; seeds are the outer loop,
and ``problems=``, ``lengths=`` and ``repeats=`` say which runs to make now. The report is on the runs asked for.

Source: Martens 2016, 4.13, figure 4.7; methods 7.3, 7.7, 7.10.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import training
from experiments.common.checks import require
from experiments.recurrent import report as recurrent_report
from experiments.recurrent.sequences import PROBLEMS, Problem
from laplace_kf.optim import HessianFree, sparse_init_
from laplace_kf.optim.recipes import RECIPES
from laplace_kf.registry import Registry
from laplace_kf.reports.html import Report

__all__ = ["Config", "Network", "network", "run"]


@dataclass
class Config:
    """Settings; the defaults are those of ``configs/recurrent.yaml``.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for weights and sequences.
        repeats: number of seeds.
        threads: processor threads, 0 for torch's default.
        problems: which problems, from the registered ones; the published seven are these, "multiplication", "XOR",
            "3-bit temporal order", "random permutation" and "20-bit memorisation".
        lengths: values of T.
        dampings: which dampings, from the registered ones.
        hidden: units of the network.
        nonzero: incoming connections per unit of the sparse initialisation.
        input_scale: standard deviation of the first input weights.
        gradient_size: fresh sequences per iteration, for gradient, line search and λ.
        curvature_size: how many of them give the curvature products.
        cg_steps: CG steps at most.
        test_size: test sequences, the same ones throughout.
        structural: μ.
        tau_structural: first λ with structural damping.
        tau_tikhonov: first λ without.
        tau_by_length: problems with a target at every step, whose first λ with structural damping is multiplied by T.
        double: problems that are computed in float64.
        target: share of wrong test sequences below which a run has succeeded.
        iterations: iterations at most.
        seconds_per_step: processor seconds at most, per step of T; tests not counted.
        progress: whether to print a line for every finished run.
    """

    seed: int = 0
    repeats: int = 3
    threads: int = 1
    problems: list[str] = field(default_factory=lambda: ["temporal order", "addition", "memorisation"])
    lengths: list[int] = field(default_factory=lambda: [20, 30, 50])
    dampings: list[str] = field(default_factory=lambda: list(DAMPINGS))
    hidden: int = 40
    nonzero: int = 15
    input_scale: float = 0.1
    gradient_size: int = 2000
    curvature_size: int = 200
    cg_steps: int = 100
    test_size: int = 2000
    structural: float = 1 / 30
    tau_structural: float = 0.1
    tau_tikhonov: float = 0.3
    tau_by_length: list[str] = field(default_factory=lambda: ["random permutation"])
    double: list[str] = field(default_factory=lambda: ["memorisation"])
    target: float = 0.01
    iterations: int = 300
    seconds_per_step: float = 1.5
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "hidden", "nonzero", "gradient_size", "curvature_size", "cg_steps", "test_size",
                     "iterations"):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("input_scale", "structural", "tau_structural", "tau_tikhonov", "target", "seconds_per_step"):
            require(name, getattr(self, name), getattr(self, name) > 0, "above 0")
        most = self.gradient_size
        require("curvature_size", self.curvature_size, self.curvature_size <= most, f"at most gradient_size={most}")
        require("lengths", self.lengths, self.lengths and min(self.lengths) >= 10, "a list of numbers of at least 10")
        for key, known in (("problems", PROBLEMS), ("dampings", DAMPINGS)):
            require(key, getattr(self, key), getattr(self, key), "one name or more; leave it out for all of them")
            for name in getattr(self, key):
                _ = known[name]
        for name in (*self.double, *self.tau_by_length):
            _ = PROBLEMS[name]


@dataclass(frozen=True)
class Damping:
    """Names of the settings that hold the first λ and, if there is one, μ."""

    tau: str
    structural: str = ""


DAMPINGS: Registry[Damping] = Registry("damping")
DAMPINGS.register("structural")(Damping("tau_structural", "structural"))
DAMPINGS.register("Tikhonov")(Damping("tau_tikhonov"))

_NEUTRAL = ("repeats", "seed", "problems", "lengths", "dampings", "progress", "threads")


class Network(nn.Module):
    """``tanh`` units with a linear read-out: sequences ``(N, L, I)`` to ``(N, C)``, or ``(N, L, C)`` at every step.

    Args:
        problem: says the sizes, and where outputs are read.
        hidden: units.
    """

    def __init__(self, problem: Problem, hidden: int) -> None:
        super().__init__()
        self.problem = problem
        self.rnn = nn.RNN(problem.inputs, hidden, batch_first=True)
        self.out = nn.Linear(hidden, problem.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs at the steps that the problem asks about."""
        outputs: Tensor = self.out(self.problem.select(self.rnn(x)[0]))
        return outputs


def network(problem: Problem, hidden: int, nonzero: int, input_scale: float, rng: torch.Generator) -> Network:
    """A network from the sparse initialisation of methods 7.10.

    Input weights come from ``N(0, input_scale²)``, all others and the biases from ``N(0, 1/nonzero)``.
    """
    model = Network(problem, hidden)
    sparse_init_(model, nonzero, input_scale, generator=rng)
    return model


def _train(config: Config, name: str, length: int, damping: Damping, seed: int) -> dict[str, Any]:
    """One run: test errors after every iteration, and what it took."""
    rng, problem = training.generator(seed), PROBLEMS[name]()
    kind = torch.float64 if name in config.double else torch.float32
    model = network(problem, config.hidden, config.nonzero, config.input_scale, rng).to(kind)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = problem.draw(count, length, generator)
        return x.to(kind), y.to(kind) if y.is_floating_point() else y

    inputs, targets = draw(config.test_size, training.generator(_TEST + seed))
    optimizer = HessianFree(
        model, problem.likelihood(), recipe=replace(RECIPES["recurrent"], limit=config.cg_steps), preconditioner="none",
        generator=rng, tau=getattr(config, damping.tau) * (length if name in config.tau_by_length else 1),
        structural_damping=getattr(config, damping.structural) if damping.structural else None,
    )  # fmt: skip
    found: dict[str, Any] = {"errors": [], "losses": [], "taus": [], "cg_steps": [], "seconds": [], "rejected": 0}
    spent = sequences = 0.0
    while len(found["errors"]) < config.iterations and spent < config.seconds_per_step * length:
        start = time.process_time()
        x, y = draw(config.gradient_size, rng)
        part = None if problem.finite else (x[: config.curvature_size], y[: config.curvature_size])
        loss = optimizer.step(x, y, curvature=part)
        spent += time.process_time() - start
        assert optimizer.run is not None
        steps = len(optimizer.run.values) - 1
        sequences += len(x) + steps * len(x if part is None else part[0])
        with torch.no_grad():
            error = float(problem.wrong(model(inputs), targets).double().mean())
        found["rejected"] += optimizer.diagnostics["rejected"]
        for key, value in (("errors", error), ("losses", float(loss)), ("taus", optimizer.diagnostics["tau"]),
                           ("cg_steps", steps), ("seconds", spent)):  # fmt: skip
            found[key].append(value)
        if error < config.target:
            break
    solved = found["errors"][-1] < config.target
    return {**found, "solved": solved, "iterations": len(found["errors"]), "sequences": sequences}


_TEST = 1_000_000  # test sequences come from seeds of their own


def _runs(config: Config) -> Iterator[tuple[int, str, int, str]]:
    for seed in range(config.seed, config.seed + config.repeats):
        for length in config.lengths:
            for problem in config.problems:
                for damping in config.dampings:
                    yield seed, problem, length, damping


def run(config: Config, folder: Path) -> Report:
    """All problems, lengths, dampings and seeds; every finished run is kept in ``folder`` and used again."""
    folder.mkdir(parents=True, exist_ok=True)
    key = {k: v for k, v in asdict(config).items() if k not in _NEUTRAL}
    found: list[dict[str, Any]] = []
    for seed, name, length, damping in _runs(config):
        part = folder / f"{seed}-{name.replace(' ', '_')}-{length}-{damping}.json"
        if not part.is_file() or json.loads(part.read_text())["config"] != key:
            one = _train(config, name, length, DAMPINGS[damping], seed)
            labels = {"seed": seed, "problem": name, "length": length, "damping": damping}
            part.write_text(json.dumps({"config": key, **labels, **one}))
            if config.progress:
                print(f"seed {seed}, {name}, T = {length}, {damping}: {recurrent_report.cell(one)}", flush=True)
        found.append(json.loads(part.read_text()))
    return _report(config, found)


def _report(config: Config, found: Sequence[dict[str, Any]]) -> Report:
    metrics = recurrent_report.metrics(found)
    claims = recurrent_report.claims(metrics) if set(config.dampings) == set(DAMPINGS) else []
    sizes = f"{config.gradient_size} fresh sequences an iteration, {config.curvature_size} of them for curvature"
    solved = ", ".join(
        f"{sum(one['solved'] for one in found if one['damping'] == name)} with {name} damping"
        for name in config.dampings
    )
    total = math.fsum(one["seconds"][-1] for one in found)
    return Report(
        title="Hessian-free optimisation of recurrent networks on long dependencies",
        summary=f"{config.hidden} units, {sizes} (memorisation: all 32). A run may take {config.iterations} iterations "
        f"and {config.seconds_per_step:g} processor seconds per step of T; {total / 60:.0f} minutes of one thread in "
        f"all. Of {len(found) // len(config.dampings)} runs each, solved: {solved}.",
        seed=config.seed,
        config=asdict(config),
        metrics={name: [run[name] for run in metrics] for name in config.dampings},
        tables=recurrent_report.tables(found, claims),
        pictures=[recurrent_report.picture(found)],
        details={"verdicts": claims, "runs": [recurrent_report.short(one) for one in found]},
    )
