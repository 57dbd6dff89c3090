"""E19: how close are Laplace posteriors to the true one, on a problem small enough to sample from it?

Twenty points of ``y = x³ + ε``, ``ε ~ N(0, 3²)``, ``x`` uniform on [-4, 4], and a 1-7-7-1 network (78 parameters).
Full, diagonal and Kronecker Laplace posteriors, as derived (real ``N``, the ``λ`` of training) and with ``(N, λ)``
tuned on twenty validation points, are compared with Hamiltonian Monte Carlo on the same model, which the Pyro bridge
lifts from the same module. A mean-field variational posterior, also through the bridge, is a second baseline.

Inputs and targets are divided by their standard deviations under the data distribution (4/√3 and 64/√7), so that a
prior precision near 1 is a reasonable one; everything reported is in the units of ``y`` again.

Source: the thesis on Gauss-Newton matrices, section 5.2.1, figure 5.1 (data as in Hernández-Lobato and Adams 2015). The
thesis gives neither the prior precision nor the activation function: ``λ`` and tanh are ours.

Beside the tuned setting of each structure stand the best one on the grid of any (an upper bound on every way of tuning)
and the best of those that the validation points do not rule out (:mod:`experiments.toy_regression.family`), by Monte
Carlo and by the linearised network, and the one that comes as near to HMC as it should for the least loss on validation
points: where even that loss is beyond their noise, no tuning on them gets there.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experiments.common.checks import require
from experiments.common.claims import verdict_table
from experiments.common.training import generator
from experiments.toy_regression import family, report
from experiments.toy_regression.problem import (
    EDGE,
    INPUT_SCALE,
    LIMIT,
    NOISE,
    STRUCTURES,
    TARGET_SCALE,
    Pair,
    draw_points,
)
from laplace_kf.likelihoods import Gaussian, Prediction
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import metrics, private_rng
from laplace_kf.reports.html import Report

__all__ = ["Config", "fit_network", "run"]

TINY = 1e-12
SCORED = 50
"""HMC draws of the network's function whose effective sample size is reported."""


@dataclass
class Config:
    """Settings of E19; the defaults are those of ``configs/toy_regression.yaml``.

    Args:
        seed: first seed; repetition ``i`` uses ``seed + i`` for data, initial weights and every draw.
        repeats: number of seeds.
        threads: processor threads.
        points: training points, and as many validation points.
        width: of both hidden layers.
        prior_precision: ``λ``.
        restarts: random initial weights from which the MAP estimate is sought; the best optimum counts.
        estimator: of the curvature; ``sampled`` draws one label per point, as published.
        samples: Monte Carlo samples of a Laplace or variational prediction.
        n_data_factors: grid of tuning and of the scan of all settings, as multiples of the real ``N``.
        prior_precisions: grid of tuning for ``λ``.
        tune_samples: Monte Carlo samples per grid point.
        search: evaluations of the searches for N and λ beyond the grids.
        hmc_samples: draws kept.
        hmc_warmup: draws before them, in which step size and mass matrix are adapted.
        hmc_steps: leapfrog steps per draw.
        vi_steps: optimisation steps of the variational posterior, 0 to leave it out.
        grid: points of the grid on ``|x| <= 6``.
    """

    seed: int = 0
    repeats: int = 3
    threads: int = 1
    points: int = 20
    width: int = 7
    prior_precision: float = 1.0
    restarts: int = 5
    estimator: Literal["exact", "sampled"] = "exact"
    samples: int = 1000
    n_data_factors: list[float] = field(default_factory=lambda: [10 ** (k / 2) for k in range(-6, 5)])
    prior_precisions: list[float] = field(default_factory=lambda: [10 ** (k / 2) for k in range(-4, 9)])
    tune_samples: int = 200
    search: int = 60
    hmc_samples: int = 2000
    hmc_warmup: int = 500
    hmc_steps: int = 40
    vi_steps: int = 5000
    grid: int = 121

    def __post_init__(self) -> None:
        for name in ("repeats", "points", "width", "restarts", "samples", "tune_samples", "search", "hmc_samples",
                     "hmc_warmup", "hmc_steps"):  # fmt: skip
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("prior_precision", self.prior_precision, self.prior_precision > 0, "above 0")
        require("grid", self.grid, self.grid >= 13, "at least 13")
        require("vi_steps", self.vi_steps, self.vi_steps >= 0, "at least 0")
        for name in ("n_data_factors", "prior_precisions"):
            require(name, grid := getattr(self, name), grid and min(grid) > 0, "a list of numbers above 0")


def fit_network(config: Config, likelihood: Gaussian, train: Pair, seed: int) -> nn.Sequential:
    """The MAP estimate: the best of several optima of the full-batch log joint."""
    x, y = train

    def attempt(number: int) -> tuple[float, nn.Sequential]:
        with private_rng(1000 * seed + number):
            width = config.width
            model = nn.Sequential(
                nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
            ).double()
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=2000, tolerance_grad=1e-8, tolerance_change=1e-14, history_size=50,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def energy() -> Tensor:
            optimizer.zero_grad()
            squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
            value = config.prior_precision / 2 * squares - likelihood.log_prob(model(x), y).sum()
            value.backward()
            return value

        optimizer.step(energy)
        return float(energy().detach()), model

    return min((attempt(k) for k in range(config.restarts)), key=lambda found: found[0])[1].eval()


def _hmc(
    config: Config, model: nn.Module, likelihood: Gaussian, train: Pair, inputs: Tensor, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Outputs ``(S, N, 1)`` at HMC draws, and how well the chain mixed."""
    from laplace_kf.bridges import pyro as bridge  # first: if Pyro is missing, it says what to install

    from pyro.infer import HMC, MCMC  # isort: skip
    from pyro.ops.stats import effective_sample_size  # isort: skip

    lifted = bridge.lift(model, likelihood, config.prior_precision)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kernel = HMC(potential_fn=lambda values: -lifted.log_joint(values, *train), step_size=0.01,
                 num_steps=config.hmc_steps, target_accept_prob=0.8)  # fmt: skip
    with private_rng(seed):
        chain = MCMC(kernel, config.hmc_samples, config.hmc_warmup, initial_params=start, disable_progbar=True)
        chain.run()
    draws = chain.get_samples()
    with torch.no_grad():
        outputs = torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (inputs,)))(draws)
    acceptance = chain.diagnostics()["acceptance rate"]["chain 0"]
    # weights have symmetries; what has to mix is the function
    chosen = torch.linspace(0, len(inputs) - 1, min(SCORED, len(inputs))).long()
    sizes = effective_sample_size(outputs[None, :, chosen, 0], chain_dim=0, sample_dim=1)
    found = {
        "acceptance": float(acceptance),
        "step_size": float(kernel.step_size),
        "effective_samples_least": float(sizes.min()),
        "effective_samples_median": float(sizes.median()),
    }
    return outputs, found


def _mean_field(
    config: Config, model: nn.Module, likelihood: Gaussian, train: Pair, inputs: Tensor, seed: int
) -> Tensor:
    """Outputs ``(S, N, 1)`` at draws of a mean-field variational posterior, started at the MAP estimate."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value
    from pyro.optim import ClippedAdam

    from laplace_kf.bridges import pyro as bridge

    lifted = bridge.lift(model, likelihood, config.prior_precision)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    store = pyro.get_param_store().get_state()
    try:
        with private_rng(seed):
            guide = AutoDiagonalNormal(lifted, init_loc_fn=init_to_value(values=start), init_scale=0.05)
            decay = 0.01 ** (1 / config.vi_steps)
            inference = SVI(lifted, guide, ClippedAdam({"lr": 0.01, "lrd": decay}), Trace_ELBO(num_particles=1))
            for _ in range(config.vi_steps):
                inference.step(*train)
            with torch.no_grad():
                draws = [guide(*train) for _ in range(config.samples)]
                return torch.stack([torch.func.functional_call(model, weights, (inputs,)) for weights in draws])
    finally:
        pyro.get_param_store().set_state(store)


def _repetition(config: Config, seed: int) -> report.Outcome:
    """Everything for one seed."""
    rng = generator(seed)
    train, val = draw_points(config.points, rng), draw_points(config.points, rng)
    grid = torch.linspace(-LIMIT, LIMIT, config.grid, dtype=torch.float64)[:, None]
    noisy = grid**3 + NOISE * torch.randn(grid.shape, generator=rng, dtype=torch.float64)
    inputs, targets = torch.cat([val[0], grid / INPUT_SCALE]), torch.cat([val[1], noisy / TARGET_SCALE])
    likelihood = Gaussian(scale=NOISE / TARGET_SCALE)
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    model = fit_network(config, likelihood, train, seed)
    lap("training")
    outputs, mixing = _hmc(config, model, likelihood, train, inputs, seed)
    exact = likelihood.predict(outputs)
    for half, part in zip(("first", "second"), outputs.chunk(2), strict=True):
        mixing[f"test_nll_grid_{half}_half"] = _grid_nll(config, likelihood.predict(part), targets)
    level = report.LEVEL * _grid_nll(config, exact, targets)
    lap("HMC")
    predictions: dict[str, Prediction] = {}
    behinds: dict[str, dict[str, float]] = {}
    settings: dict[str, dict[str, float]] = {}
    tuning: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        predictions["MAP"] = likelihood.predict(model(inputs)[None])
    for name, structure in STRUCTURES.items():
        posterior = LaplacePosterior(
            model, likelihood, structure=structure, estimator=config.estimator, prior_precision=config.prior_precision
        ).fit(train, generator=rng)
        settings[f"{name}, untuned"] = {"n_data": posterior.n_data, "prior_precision": config.prior_precision}
        predictions[f"{name}, untuned"] = posterior.predict(inputs, method="mc", samples=config.samples, generator=rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a best value on the grid's edge: the table marks it
            result = posterior.tune(
                val, n_data=[factor * config.points for factor in config.n_data_factors],
                prior_precision=config.prior_precisions, method="mc", samples=config.tune_samples, generator=rng,
            )  # fmt: skip
        tuning[name] = {"best": result.best, "at_edge": result.at_edge, "table": result.table}
        settings[f"{name}, tuned"] = {key: result.best[key] for key in ("n_data", "prior_precision")}
        predictions[f"{name}, tuned"] = posterior.predict(inputs, method="mc", samples=config.samples, generator=rng)

        members = _members(config, posterior, inputs, targets, seed, level)
        for label, (one, behind, prediction) in members.items():
            settings[f"{name}, {label}"] = {"n_data": one.n_data, "prior_precision": one.prior_precision}
            behinds[f"{name}, {label}"] = behind
            predictions[f"{name}, {label}"] = prediction
        behinds[f"{name}, tuned"] = {"val_behind": 0.0, "val_behind_se": 0.0}
    lap("Laplace")
    if config.vi_steps:
        predictions["mean field"] = likelihood.predict(_mean_field(config, model, likelihood, train, inputs, seed))
        lap("mean field")
    predictions["HMC"] = exact
    found, bands = _measure(config, predictions, targets, grid[:, 0])
    for name, row in found.items():
        row.update(settings.get(name, {}) | behinds.get(name, {}))
        if name in settings:
            precision = settings[name]["n_data"] * settings[name]["prior_precision"]
            row["regularisation"] = math.log10(precision / (config.points * config.prior_precision))
    scaled = (train[0] * INPUT_SCALE, train[1] * TARGET_SCALE)
    return report.Outcome(scaled, bands, found, tuning, mixing, seconds)


def _grid_nll(config: Config, prediction: Prediction, targets: Tensor) -> float:
    """Negative log-likelihood of the grid's points, in the units of ``y``; validation points come first."""
    return float(math.log(TARGET_SCALE) - prediction.log_prob(targets)[config.points :].mean())


def _members(
    config: Config, posterior: LaplacePosterior, inputs: Tensor, targets: Tensor, seed: int, level: float
) -> dict[str, tuple[family.Setting, dict[str, float], Prediction]]:
    """Of all N and λ those that ``report.SCANNED`` names, and the tuned one of the linearised network.

    Args:
        level: negative log-likelihood of the grid's points that counts as near to HMC's, in the units of ``y``.

    Returns:
        Name of the row → the setting, how much it loses on validation points beside the family's best one, its
        prediction.
    """
    near = family.reaching(level - math.log(TARGET_SCALE))
    found = {}
    for way, method in report.WAYS.items():

        def predicted(samples: int, method: str = method) -> Prediction:
            if method == "linearized":
                return posterior.predict(inputs, method=method)
            return posterior.predict(inputs, method=method, samples=samples, generator=generator(seed))

        kin = family.Family(posterior, partial(predicted, config.tune_samples), targets, config.points)
        scan = kin.scan([factor * config.points for factor in config.n_data_factors], config.prior_precisions)
        first = family.chosen(scan)
        ends = (
            kin.refined(family.best(scan), lambda one: one.grid, config.search),
            family.best(family.allowed(scan)),
            kin.refined(min(scan, key=near), near, config.search),
        )
        rows = dict(zip(report.SCANNED, ends, strict=True)) | ({"tuned": first} if way else {})
        for label, one in rows.items():
            more, error = family.behind(one, first)
            behind = {"val_behind": more, "val_behind_se": more / max(error, TINY)}
            with kin.using(one.n_data, one.prior_precision):
                found[label + way] = one, behind, predicted(config.samples)
    return found


def _measure(
    config: Config, predictions: Mapping[str, Prediction], targets: Tensor, grid: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, tuple[Tensor, Tensor]]]:
    """Metrics and bands of every method; log-likelihoods are of ``y`` in its own units."""
    inside, cut = grid.abs() <= EDGE, config.points  # validation points come first
    bands = {
        name: (TARGET_SCALE * p.mean[cut:, 0], TARGET_SCALE * p.epistemic_variance[cut:, 0].sqrt())
        for name, p in predictions.items()
    }
    reference_mean, reference_sd = bands["HMC"]
    found = {}
    for name, prediction in predictions.items():
        log_prob = prediction.log_prob(targets) - math.log(TARGET_SCALE)
        on_grid = log_prob[cut:]
        mean, sd = bands[name]
        found[name] = {
            "val_nll": float(-log_prob[:cut].mean()),
            "test_nll_inside": float(-on_grid[inside].mean()),
            "test_nll_grid": float(-on_grid.mean()),
            "sd_inside": float(sd[inside].mean()),
            "sd_outside": float(sd[~inside].mean()),
            "sd_growth": float(sd[~inside].mean() - sd[inside].mean()),
            "sd_rmse": float((sd - reference_sd).square().mean().sqrt()),
            "sd_rmse_inside": float((sd - reference_sd)[inside].square().mean().sqrt()),
            "mean_rmse_inside": float((mean - reference_mean)[inside].square().mean().sqrt()),
        }
    for row in found.values():
        row["grid_over_hmc"] = row["test_nll_grid"] / found["HMC"]["test_nll_grid"]
    return found, bands


def run(config: Config) -> Report:
    """Train, fit, tune, sample and compare, for every seed; writes nothing."""
    outcomes = [_repetition(config, config.seed + i) for i in range(config.repeats)]
    runs = [outcome.found for outcome in outcomes]
    methods = list(runs[0])
    summary = {method: metrics.mean_std([found[method] for found in runs]) for method in methods}
    verdicts = [claim.judge(runs) for claim in report.CLAIMS]
    confirmed = sum(verdict["verdict"] == "confirmed" for verdict in verdicts)
    seeds = [config.seed + i for i in range(config.repeats)]
    least = min(outcome.hmc["effective_samples_least"] for outcome in outcomes)
    return Report(
        title="E19: Laplace posteriors against Hamiltonian Monte Carlo on a toy regression",
        summary=(
            f"A 1-{config.width}-{config.width}-1 tanh network on {config.points} points of y = x³ + N(0, 9), prior "
            f"precision {config.prior_precision:g}; {config.hmc_samples} HMC draws after {config.hmc_warmup} of "
            f"warm-up (at least {least:.0f} effective ones for the network's output anywhere on the grid), over "
            f"{config.repeats} seed{'s' * (config.repeats > 1)}. Standard deviations are epistemic, without the "
            f"noise of {NOISE:g}. {confirmed} of {len(verdicts)} published observations are confirmed."
        ),
        seed=config.seed,
        config=asdict(config),
        metrics=summary,
        tables=[report.table(summary, outcomes), verdict_table(verdicts)],
        pictures=[report.picture(outcomes[0], seeds[0])],
        details={
            "seeds": seeds,
            "verdicts": verdicts,
            "sentences": report.sentences(runs),
            "tuning": {str(seed): outcome.tuning for seed, outcome in zip(seeds, outcomes, strict=True)},
            "hmc": {str(seed): outcome.hmc for seed, outcome in zip(seeds, outcomes, strict=True)},
            "seconds": {str(seed): outcome.seconds for seed, outcome in zip(seeds, outcomes, strict=True)},
            "stand_ins": [],
        },
    )
