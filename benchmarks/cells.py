"""Fits, small jobs and K-FAC steps beside hand-written code and other libraries, one process a cell, one thread.

A cell's jobs take turns in one process; its cost is the least processor time of a job over the least of the unit (a
training epoch, or an SGD step). Libraries that are not installed, or that have no such job, are said so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import laplace_kf as lk
from benchmarks import by_hand
from benchmarks.many_predictions import growth
from benchmarks.networks import NETWORKS, Problem
from benchmarks.others import FITS, asdl_steps

__all__ = ["CELLS", "LIMIT", "run", "text"]

ALIKE = "without momentum, step length, adaptation and weight decay, factors where inverses are made"
LIMIT = 1.15  # times the hand-written cost that a cell may take without a reason
REFRESH, CYCLE = 10, 20
HAND, OURS = "by hand", "laplace_kf"
Job = Callable[[], Any]

CELLS: dict[str, tuple[str, str, str]] = {
    "wide, kron exact": ("wide", "kron", "exact"),
    "wide, kron sampled": ("wide", "kron", "sampled"),
    "wide, diag exact": ("wide", "diag", "exact"),
    "wide, ekfac exact": ("wide", "ekfac", "exact"),
    "wide, last layer full exact": ("wide", "full", "exact"),
    "lenet, kron exact": ("lenet", "kron", "exact"),
    "lenet, kron sampled": ("lenet", "kron", "sampled"),
    "lenet, diag exact": ("lenet", "diag", "exact"),
    "autoencoder, kron sampled": ("autoencoder", "kron", "sampled"),
    "autoencoder, kron recursive": ("autoencoder", "kron", "recursive"),
    "residual, kron sampled": ("residual", "kron", "sampled"),
    "transformer, kron sampled": ("transformer", "kron", "sampled"),
    "transformer, kron exact": ("transformer", "kron", "exact"),
    "wide, steps": ("wide", "steps", ""),
    "autoencoder, steps": ("autoencoder", "steps", ""),
    "tiny, small jobs": ("tiny", "small", ""),
}

# From profiles of the jobs; what was not profiled says so.
REASONS: dict[str, str] = {
    "wide, kron sampled": (
        "of a profile 4 % divide the sums by N and by positions, 3 % complete them, 2 % are random numbers that belong "
        "to examples, 2 % copy the weights, 1 % fill the sums with zeros; products are three quarters of it, as by hand"
    ),
    "wide, diag exact": (
        "90 % of a profile are products and squares, as by hand; 1 % copy the weights, 2 % free the columns of the "
        "minibatch before; the rest is spread"
    ),
    "wide, ekfac exact": (
        "two decompositions a layer and a basis of their null spaces that does not hang on rounding are a good "
        "third of a profile (without the products that were left out since)"
    ),
    "wide, last layer full exact": (
        "two thirds of a profile are the products; a fifth puts the matrix into the order of the parameters and "
        "completes it, 5 % divide it by N, 4 % fill it with zeros; the sum and the mean are both held"
    ),
    "lenet, kron sampled": (
        "of a profile of three minibatches 12 % ask once which positions count (before windows of poolings were "
        "those of one image), 5 % are the second forward pass of the first minibatch (do trial weights reach the "
        "outputs?), 16 % copy patches, as the hand-written code does"
    ),
    "lenet, kron exact": (
        "not profiled; the passes of the first minibatch as of one sample, and columns held together"
    ),
    "lenet, diag exact": ("not profiled; the passes of the first minibatch as of one sample"),
    "autoencoder, kron sampled": (
        "a fifth of a profile of two minibatches is done once a fit: 8 % complete the sums, 7 % divide them by N "
        "and by positions, 2 % each fill them with zeros, look at them and copy the weights; 7 % are random "
        "numbers that belong to examples, 784 for each"
    ),
    "autoencoder, kron recursive": ("not profiled; what a fit does once is as of one sample"),
    "residual, kron sampled": (
        "11 % of a profile of two minibatches are the second forward pass of the first one (do trial weights "
        "reach the outputs?) and the pass that asks which positions count"
    ),
    "transformer, kron sampled": (
        "7 % of a fit of four minibatches is the second forward pass of the first one (do trial weights reach the "
        "outputs?), 2 % plans the blocks; the rest of the difference is spread over the tape's calls"
    ),
    "wide, steps": (
        "of a profile of nine steps with one search for ζ: 31 % are its three candidates (half of that their "
        "inverses), 19 % the other solves, 4 % what weight decay adds to them, 12 % the gradient, 10 % new "
        "factors and 5 % their average, 9 % momentum's exact products, 4 % the loss after the step; the rest are "
        "sums of vectors. Theirs have no momentum, no search and no look at the loss"
    ),
    "autoencoder, steps": (
        "in SGD steps, of 4.2 without refresh: 1.0 the gradient, 0.65 momentum's exact products of two directions "
        "with 128 examples, 0.6 new factors and 0.2 their average (theirs are made every tenth step), 0.3 the "
        "loss after the step, before it is accepted; 1.1 by its count of products are the solves in the space of "
        "the data (2.05 as measured outside of it); the rest are sums of vectors. A cycle of 20 adds 1.0: two "
        "refreshes, each with what weight decay adds, and a search for ζ with three candidates"
    ),
    "tiny, small jobs": (
        "a fit is 2,500 Python calls and a prediction 3,100, none above 4 % of it: checks of arguments and "
        "batches, of weights and modes of the model, and of whether anything was replaced since the call before. "
        "By torch's autograd, evidence and slope are a variable and an empty backward pass, which alone take a "
        "third, and the nodes of the formula; the slope in closed form needs neither"
    ),
}


def run(rounds: int = 3, names: list[str] | None = None) -> dict[str, Any]:
    """All cells, or those named, each in a process of its own."""
    cells: dict[str, Any] = {}
    for name in names or CELLS:
        call = [sys.executable, "-m", "benchmarks.cells", name, str(rounds)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        cells[name] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": done.stderr[-300:]}
        print(f"{name}: {cells[name]}", file=sys.stderr, flush=True)
    return {
        "workload": "six networks with random data (benchmarks/networks.py), one thread, float32",
        "unit": "processor time of one training epoch over the same minibatches; of one SGD step for steps; ms for "
        "small jobs; bytes by which resident memory grows at most during one more run of a job",
        "cells": cells,
        "reasons": REASONS,
    }


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One cell in this process."""
    torch.set_num_threads(1)
    network, structure, estimator = CELLS[name]
    torch.manual_seed(0)
    make = NETWORKS[network]
    if structure == "steps":
        return _steps(make, rounds)
    if structure == "small":
        return _small(make(), rounds)
    problem = make()
    sampled = estimator == "sampled"
    hand = {"ekfac": by_hand.ekfac, "full": by_hand.last_layer, "recursive": by_hand.kfra}
    alone = hand.get(structure, hand.get(estimator))
    jobs: dict[str, Job] = {
        "unit": problem.epoch,
        HAND: partial(by_hand.fit, problem, structure, sampled) if alone is None else partial(alone, problem),
        OURS: partial(_fit, problem, structure, estimator),
    }
    missing = {}
    for peer, maker in FITS.items() if alone is None else ():  # none of them has such a job
        try:
            torch.manual_seed(0)
            job = maker(make(), structure, sampled)
        except Exception as error:  # whatever keeps another library from it is its answer
            missing[peer] = f"{type(error).__name__}: {error}"[:120]
            continue
        if job is not None:
            jobs[peer] = job
    seconds = _in_turn(jobs, rounds, missing)
    unit = min(seconds.pop("unit"))
    costs = {peer: min(values) / unit for peer, values in seconds.items()}
    return {"costs": costs, "bytes": {peer: growth(jobs[peer]) for peer in costs}, "missing": missing}


def _fit(problem: Problem, structure: str, estimator: str) -> lk.LaplacePosterior:
    parameters = "last_layer" if structure == "full" and problem.likelihood == "categorical" else "all"
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood, structure, estimator, parameters)
    return posterior.fit(problem.batches)


def _in_turn(jobs: dict[str, Job], rounds: int, missing: dict[str, str]) -> dict[str, list[float]]:
    """Processor seconds of the jobs in turn, after one warm-up; a job that fails goes to ``missing``."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            if name in missing:
                continue
            start = time.process_time()
            try:
                job()
            except Exception as error:
                if name in ("unit", HAND, OURS):
                    raise
                missing[name] = f"{type(error).__name__}: {error}"[:120]
                del seconds[name]
                continue
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def _steps(make: Callable[[], Problem], rounds: int) -> dict[str, Any]:
    """Mean steps over whole cycles, so that refreshes and searches are in them."""
    problems = {}
    for name in ("unit", HAND, OURS, "laplace_kf, as the others", "asdl"):
        torch.manual_seed(0)
        problems[name] = make()
    sgd = torch.optim.SGD(problems["unit"].model.parameters(), 1e-4)
    hand = by_hand.kfac(problems[HAND], REFRESH)
    plain: dict[str, Any] = {"momentum": False, "adapt_tau": False, "adapt_zeta": False, "rescale": False, "lr": 1e-4}
    # theirs and the hand-written ones take no other minibatches in, and have no weight decay
    plain |= {"factors_every": REFRESH, "l2": 0.0}
    optimizers = {
        OURS: lk.optim.kfac(problems[OURS].model, problems[OURS].likelihood, refresh=REFRESH),
        "laplace_kf, as the others": lk.optim.kfac(
            problems["laplace_kf, as the others"].model, problems[OURS].likelihood, refresh=REFRESH, **plain
        ),
    }

    def first_order(number: int) -> None:
        problem = problems["unit"]
        sgd.zero_grad()
        problem.loss(*problem.batches[number % len(problem.batches)]).backward()
        sgd.step()

    steps: dict[str, Callable[[int], Any]] = {"unit": first_order, HAND: lambda number: next(hand)}
    steps |= {name: partial(_second_order, optimizer, problems[name]) for name, optimizer in optimizers.items()}
    missing = {}
    try:
        steps["asdl"] = asdl_steps(problems["asdl"], REFRESH)
    except Exception as error:
        missing["asdl"] = f"{type(error).__name__}: {error}"[:120]
    seconds = dict.fromkeys(steps, 0.0)
    for number in range(4 + rounds * CYCLE):
        for name, step in steps.items():
            start = time.process_time()
            step(number)
            if number >= 4:  # the first three get fresh inverses each
                seconds[name] += time.process_time() - start
    costs = {n: s / seconds["unit"] for n, s in seconds.items() if n != "unit"}
    return {"costs": costs, "alike": ALIKE, "missing": missing}


def _second_order(optimizer: lk.optim.GaussNewton, problem: Problem, number: int) -> None:
    optimizer.step(*problem.batches[number % len(problem.batches)])


def _small(problem: Problem, rounds: int) -> dict[str, Any]:
    """Milliseconds of what a small posterior is asked: fits, evidence and its slope, one prediction."""
    x = problem.batches[0][0][:1]
    posterior = lk.LaplacePosterior(problem.model, "gaussian", "kron").fit(problem.batches)

    def evidence() -> None:
        for k in range(100):
            prior = torch.tensor(3.0 + k / 100, dtype=torch.float64, requires_grad=True)
            posterior.evidence(prior_precision=prior).total.backward()

    def closed() -> None:
        for k in range(100):
            found = posterior.evidence(prior_precision=3.0 + k / 100)
            _ = found.total, found.slope

    def autograd_alone() -> None:
        for k in range(100):
            prior = torch.tensor(3.0 + k / 100, dtype=torch.float64, requires_grad=True)
            (prior * 2).backward()

    jobs: dict[str, Job] = {
        f"fit, {structure}": partial(_fit, problem, structure, "exact") for structure in ("diag", "kron", "full")
    }
    jobs["fit, kron, by hand"] = lambda: by_hand.fit(problem, "kron", False)
    jobs["evidence and its slope in closed form, 100 times"] = closed
    jobs |= {"the same by a backward pass each": evidence, "2 λ and its slope by a backward pass": autograd_alone}
    jobs["one linearised prediction"] = lambda: posterior.predict(x, "linearized")
    seconds = _in_turn(jobs, 10 * rounds, {})
    return {"milliseconds": {name: 1e3 * min(values) for name, values in seconds.items()}}


def text(result: dict[str, Any]) -> str:
    """The result as lines: what is behind another library, or more than the limit from the hand-written cost."""
    lines = [result["workload"]]
    for name, cell in result["cells"].items():
        costs = cell.get("costs", cell.get("milliseconds", {}))
        lines.append(f"{name:28} " + ", ".join(f"{peer} {cost:.2f}" for peer, cost in costs.items()))
        lines += [f"{'':28} not measured: {peer}: {why}" for peer, why in cell.get("missing", {}).items()]
        if "failed" in cell:
            lines.append(f"{'':28} failed: {cell['failed']}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
