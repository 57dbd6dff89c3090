"""E31: error and cost of the output factors: exact, sampled, projected, recursive.

On a small network the output factors ``G_l`` of every estimator are compared with the exact ones, and the Kronecker
blocks with the exact blocks; costs are counted operations, which do not depend on the machine, for networks of more
and more outputs.

Source: Botev 2020, 4.3; Botev et al. 2017, appendix C.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import training
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports import private_rng
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Repeated):
    """Settings of E31.

    Args:
        count: examples.
        inputs, hidden, outputs: widths of the network whose factors are compared.
        samples: numbers of draws of the random estimators, growing.
        draws: repetitions over which their errors are averaged.
        wide: numbers of outputs for which operations are counted, growing.
    """

    count: int = 200
    inputs: int = 10
    hidden: int = 12
    outputs: int = 8
    samples: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    draws: int = 10
    wide: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50, 100])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "wide"):
            values = getattr(self, name)
            require(name, values, len(values) > 1 and values == sorted(values) and values[0] > 0, "growing numbers")
        require("draws", self.draws, self.draws >= 1, "at least 1")
        require("count", self.count, self.count >= 10, "at least 10")


STATEMENTS = (
    Statement("errors of sampled factors fall as 1/√S (measured exponent)", "exponent, sampled", -0.6, -0.4, "-1/2"),
    Statement("errors of projected factors fall as 1/√S (measured exponent)", "exponent, projection", -0.6, -0.4,
              "-1/2"),
    Statement("KFRA's factors differ from the exact ones for more than one example", "error, recursive", 1e-3),
    Statement("and by less than those of one sample", "recursive over sampled", 0, 1),
    Statement("columns cost more than KFRA from some number of outputs on (operations at the most outputs)",
              "exact over recursive, most outputs", 1),
    Statement("KFRA's operations grow less than half as fast with outputs as those of columns", "growth", 0, 0.5),
)  # fmt: skip


def _factors(
    model: nn.Module, data: tuple[Tensor, Tensor], estimator: str, rng: torch.Generator, **options: Any
) -> list[Tensor]:
    mean = lk.curvature.estimate(model, "categorical", data, "kron", estimator, generator=rng, **options).mean()
    return [(block.scale * block.outputs).squeeze(0) for _, block in mean.entries]  # type: ignore[attr-defined]


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative Frobenius error, layers together."""
    off = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(off / sum(float(b.square().sum()) for b in exact))


def run(config: Config) -> Report:
    """Errors of factors, counted operations, and the error of exact factors against exact blocks."""
    errors: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    operations: dict[str, tuple[Sequence[float], Sequence[float]]] = {}

    def network(outputs: int, seed: int) -> nn.Sequential:
        with private_rng(seed):
            return nn.Sequential(
                nn.Linear(config.inputs, config.hidden), nn.Tanh(), nn.Linear(config.hidden, config.hidden), nn.Tanh(),
                nn.Linear(config.hidden, outputs),
            ).double()  # fmt: skip

    def measure(seed: int) -> Found:
        rng = training.generator(seed)
        x = torch.randn(config.count, config.inputs, generator=rng, dtype=torch.float64)
        y = torch.randint(config.outputs, (config.count,), generator=rng)
        model = network(config.outputs, seed)
        with torch.no_grad():
            for parameter in model.parameters():  # as after some training: with small weights all factors are alike
                parameter.mul_(3)
        exact = _factors(model, (x, y), "exact", rng)
        found = {"error, recursive": _error(_factors(model, (x, y), "recursive", rng), exact)}
        for estimator in ("sampled", "projection"):
            means = []
            for samples in config.samples:
                drawn = [
                    _error(_factors(model, (x, y), estimator, rng, samples=samples), exact) for _ in range(config.draws)
                ]
                means.append(sum(drawn) / len(drawn))
                found[f"error, {estimator}, S = {samples}"] = means[-1]
            span = math.log(config.samples[-1] / config.samples[0])
            found[f"exponent, {estimator}"] = math.log(means[-1] / means[0]) / span
            errors.setdefault(estimator, (config.samples, means))
        found["recursive over sampled"] = found["error, recursive"] / found[f"error, sampled, S = {config.samples[0]}"]
        found["Kronecker blocks"] = lk.diagnostics.kronecker_error(model, "categorical", (x, y)).summary.relative
        counted = []
        for outputs in config.wide:
            likelihood = "categorical" if outputs > 1 else "bernoulli"
            labels = (
                torch.randint(outputs, (config.count,), generator=rng) if outputs > 1 else torch.ones_like(x[:, :1])
            )
            counted.append(
                lk.diagnostics.costs(
                    network(outputs, seed), likelihood, (x, labels.to(x) if outputs == 1 else labels)
                ).measured
            )
        for name in ("recursive", "sampled", "exact"):
            operations.setdefault(name, (config.wide, [row[name] for row in counted]))
        found["exact over recursive, one output"] = counted[0]["exact"] / counted[0]["recursive"]
        found["exact over recursive, most outputs"] = counted[-1]["exact"] / counted[-1]["recursive"]
        grown = {name: counted[-1][name] / counted[0][name] for name in ("exact", "recursive")}
        found["growth"] = grown["recursive"] / grown["exact"]
        return found

    def pictures() -> Sequence[Picture]:
        return [
            lines("errors", "Relative error of output factors.", errors, ("S", "error"), ("log", "log")),
            lines("operations", "Counted operations of a fit.", operations, ("outputs", "operations"), ("log", "log")),
        ]

    def tables(runs: Sequence[Found]) -> Sequence[Table]:
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        rows = [(name, f"{value:.3g}") for name, value in mean.items() if "error" in name or "Kron" in name]
        return [
            Table(
                "Relative Frobenius errors",
                ("factors", "error"),
                rows,
                "Kronecker blocks: exact factors against exact blocks.",
            )
        ]

    return judged(
        "E31: error and cost of curvature factors",
        f"{config.inputs}-{config.hidden}-{config.hidden}-{config.outputs} tanh units, {config.count} examples.",
        config,
        measure,
        STATEMENTS,
        size="Derived: the papers have formulas and no experiment.",
        tables=tables,
        pictures=pictures,
    )
