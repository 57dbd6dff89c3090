"""What E26 found, as a table, claims and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from experiments.common.claims import Claim
from experiments.continual.methods import LEARNERS
from experiments.continual.settings import Config
from experiments.continual.tasks import Measure
from laplace_kf.reports.html import Picture, Table

__all__ = ["claims", "picture", "table"]

Found = Mapping[str, Mapping[str, float]]
SHOWN = {"first": "first task", "latest": "latest task", "average": "average"}


def claims(kron: str, diag: str, config: Config) -> list[Claim]:
    """What the source says of the two methods, over the multipliers of ``config``."""
    low, high = (f"{kron}, {pick(config.multipliers):g}" for pick in (min, max))
    best, other = f"{kron}, best", f"{diag}, best"
    return [
        Claim("the smallest multiplier forgets: first task below latest", "first", low, low, most=0.0,
              other_metric="latest"),
        Claim("the largest reverses the order", "first", high, high, least=0.0, other_metric="latest"),
        Claim("a multiplier in between or the smallest is best on average", "average", best, high, least=0.0),
        *(Claim(f"Kronecker above diagonal, {text}", key, best, other, least=0.0) for key, text in SHOWN.items()),
    ]  # fmt: skip


def _mean(runs: Sequence[Found], label: str, key: str) -> float:
    return sum(found[label][key] for found in runs) / len(runs)


def table(runs: Sequence[Found], labels: Sequence[str], measure: Measure) -> Table:
    """One row a method and strength: means over the seeds."""
    rows = []
    for label in labels:
        cells = [f"{measure.scale * _mean(runs, label, key):.2f}" for key in SHOWN]
        rows.append([*label.rsplit(", ", 1), *cells])
    return Table(f"Test {measure.name} after the last task", ["method", "strength", *SHOWN.values()], rows)


def picture(config: Config, runs: Sequence[Found], labels: Sequence[str], measure: Measure) -> Picture:
    """The three numbers of every method against its strength; a strength at which some seed diverged is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in zip(config.methods, ("tab:blue", "tab:orange", "tab:green", "tab:red") * 3, strict=False):
        grid = LEARNERS[name].strengths(config)
        for (key, text), style in zip(SHOWN.items(), ("--", ":", "-"), strict=True):
            values = [
                measure.scale * _mean(runs, f"{name}, {s:g}", key) if f"{name}, {s:g}" in labels else math.nan
                for s in grid
            ]
            axes.plot(grid, values, style, color=colour, marker="o", markersize=3, label=f"{name}: {text}")
    axes.set(xlabel="multiplier λ_c", ylabel=f"test {measure.name} after the last task", xscale="log")
    axes.legend(fontsize="small")
    return Picture("sweep", figure, "Accuracy on the first and the latest task, and the average, by multiplier.")
