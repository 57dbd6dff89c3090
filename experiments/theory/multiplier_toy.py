"""E24: what the multiplier does to the mode, in two dimensions where everything is Gaussian.

A linear model with two weights learns one task, whose posterior becomes the prior of a second task. The multiplier
``λ_c`` scales the curvature of the first task, so that the mode after the second one moves from the second task's own
optimum (``λ_c`` small) through the exact posterior mean (``λ_c = 1``) to the first task's (``λ_c`` large).

Source: the thesis on Gauss-Newton matrices, section 5.3.1, figure 5.6; methods 11.1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import training
from experiments.common.claims import Claim, verdict_table
from experiments.continual.report import quoted
from laplace_kf import continual
from laplace_kf.likelihoods import Gaussian
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["Config", "mode", "problem", "run"]


@dataclass
class Config:
    """Settings of E24.

    Args:
        seed: decides inputs and noise.
        points: multipliers between ``least`` and ``most``, equally far apart on a log scale; odd, so that 1 is one.
        least: smallest multiplier; ``1 / least`` is the largest.
        count: examples of a task.
        noise: standard deviation of the observations.
        prior_precision: ``λ`` of the first task.
    """

    seed: int = 0
    points: int = 41
    least: float = 0.01
    count: int = 20
    noise: float = 1.0
    prior_precision: float = 0.01

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0:
            raise ValueError(f"points={self.points} is not allowed; it must be odd and at least 3")
        if not 0 < self.least < 1:
            raise ValueError(f"least={self.least} is not allowed; it must be between 0 and 1")
        for name in ("count", "noise", "prior_precision"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be above 0")


Task = tuple[Tensor, Tensor]


def problem(config: Config) -> list[Task]:
    """Two tasks, inputs ``(N, 2)`` and targets ``(N, 1)`` in float64: each knows one direction well."""
    rng = training.generator(config.seed)
    tasks = []
    for spread, weights in (((1.0, 0.3), (-1.0, 1.0)), ((0.3, 1.0), (1.0, -0.5))):
        mixing = torch.tensor([[1.0, 0.4], [-0.4, 1.0]], dtype=torch.float64)
        x = torch.randn(config.count, 2, generator=rng, dtype=torch.float64) * torch.tensor(spread) @ mixing
        noise = config.noise * torch.randn(config.count, 1, generator=rng, dtype=torch.float64)
        tasks.append((x, x @ torch.tensor(weights, dtype=torch.float64)[:, None] + noise))
    return tasks


def mode(config: Config, tasks: list[Task], multiplier: float) -> Tensor:
    """The mode ``(2,)`` after both tasks, by the package: online Laplace with the full curvature.

    Both objectives are quadratic, so one Newton step from anywhere is at their minimum.
    """
    model = nn.Linear(2, 1, bias=False).double()
    learner = continual.OnlineLaplace(
        model, Gaussian(config.noise), "full", multiplier, prior_precision=config.prior_precision
    )
    for x, y in tasks:
        objective = (model(x) - y).square().sum() / (2 * config.noise**2) + learner.penalty()
        (slope,) = torch.autograd.grad(objective, model.weight, create_graph=True)
        rows = [torch.autograd.grad(entry, model.weight, retain_graph=True)[0].flatten() for entry in slope.flatten()]
        with torch.no_grad():
            model.weight -= torch.linalg.solve(torch.stack(rows), slope.flatten())[None]
        learner.after_task((x, y))
    return model.weight.detach().flatten()


def precision_and_mode(config: Config, task: Task, prior: float) -> tuple[Tensor, Tensor]:
    """Precision ``(2, 2)`` and mode ``(2,)`` of one task on its own, in closed form."""
    x, y = task
    precision = x.T @ x / config.noise**2 + prior * torch.eye(2, dtype=torch.float64)
    return precision, torch.linalg.solve(precision, (x.T @ y / config.noise**2).flatten())


CLAIMS = (
    Claim("a large multiplier moves the mode to the prior", "to_prior", "large", "exact", most=-1e-6),
    Claim("a small one moves it to the likelihood's mode", "to_likelihood", "small", "exact", most=-1e-6),
    Claim("every mode is the one of the closed form", "error", "worst", "exact", most=1e-8, other_metric="zero"),
)


def run(config: Config) -> Report:
    """The path of the mode, the two Gaussians, and the distance from the closed form."""
    tasks = problem(config)
    first, start = precision_and_mode(config, tasks[0], config.prior_precision)
    second, end = precision_and_mode(config, tasks[1], 0.0)
    multipliers = torch.logspace(0, 1, config.points, base=1 / config.least**2, dtype=torch.float64) * config.least
    path, errors = [], []
    pull = config.prior_precision * torch.eye(2, dtype=torch.float64)
    for multiplier in multipliers.tolist():
        path.append(mode(config, tasks, multiplier))
        before = multiplier * (first - pull) + pull  # the prior's own precision has no multiplier
        wanted = torch.linalg.solve(before + second, before @ start + second @ end)
        errors.append(float((path[-1] - wanted).norm()))

    def described(k: int) -> dict[str, float]:
        return {
            "multiplier": float(multipliers[k]), "to_prior": float((path[k] - start).norm()),
            "to_likelihood": float((path[k] - end).norm()), "error": errors[k], "zero": 0.0,
        }  # fmt: skip

    middle = config.points // 2
    found = {"small": described(0), "exact": described(middle), "large": described(-1)}
    found["worst"] = {"error": max(errors)}
    claims = [claim.judge([found]) for claim in CLAIMS]
    shown = sorted({0, config.points // 4, middle, 3 * config.points // 4, config.points - 1})
    rows = [
        [f"{float(multipliers[k]):.3g}", *(f"{float(v):.4f}" for v in path[k]),
         f"{described(k)['to_prior']:.4f}", f"{described(k)['to_likelihood']:.4f}"]
        for k in shown
    ]  # fmt: skip
    table = Table("Mode after the second task", ["λ_c", "θ₁", "θ₂", "from prior mean", "from likelihood mode"], rows)
    summary = f"{config.points} multipliers; the largest difference from the closed form is {max(errors):.1e}."
    details: dict[str, Any] = {"verdicts": claims, **quoted(summary, [table]), "path": [p.tolist() for p in path]}
    return Report(
        title="E24: what the multiplier does to the mode",
        summary=summary,
        seed=config.seed,
        config=asdict(config),
        metrics=found,
        tables=[table, verdict_table(claims)],
        pictures=[_picture((first, start), (second, end), torch.stack(path), path[middle])],
        details={**details, "multipliers": multipliers.tolist()},
    )


def _picture(prior: tuple[Tensor, Tensor], likelihood: tuple[Tensor, Tensor], path: Tensor, exact: Tensor) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for (precision, mean), label, colour in ((prior, "prior", "tab:blue"), (likelihood, "likelihood", "tab:orange")):
        edge = mean[:, None] + torch.linalg.solve_triangular(
            torch.linalg.cholesky(precision).mT, circle, upper=True
        )  # one standard deviation
        axes.plot(*edge.tolist(), color=colour, label=f"{label}, one standard deviation")
        axes.plot(*mean.tolist(), "o", color=colour)
    axes.plot(*path.T.tolist(), ".-", color="black", label="mode, λ_c from small to large")
    axes.plot(*exact.tolist(), "*", color="tab:red", markersize=12, label="λ_c = 1")
    axes.set(xlabel="θ₁", ylabel="θ₂", aspect="equal")
    axes.legend(fontsize="small")
    return Picture("path", figure, "The mode for multipliers from the smallest to the largest.")
