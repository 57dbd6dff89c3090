"""What a continual learning experiment makes of its matrices: numbers, claims, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from experiments.claims import Claim
from laplace_kf import continual
from laplace_kf.reports.html import Picture, Table

if TYPE_CHECKING:
    from experiments.continual import Config
    from experiments.streams import Stream

__all__ = ["CLAIMS", "curve", "methods_table", "numbers", "progress_picture"]

CLAIMS = [
    Claim("Kronecker above diagonal", "average", "Kronecker online", "diagonal online", least=0.0),
    Claim("Kronecker above Synaptic Intelligence", "average", "Kronecker online", "Synaptic Intelligence", least=0.0),
    Claim("within 2 points of joint training", "average", "Kronecker online", "joint training", least=-0.02),
    Claim("projected keeps 99 % of kept", "average", "Kronecker online, projected", "Kronecker online", least=-0.01),
]


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The summary of one sequence: ``test`` is its matrix ``(T, T)``, ``untrained`` the baseline ``(T,)``."""
    matrix = torch.tensor(found["test"], dtype=torch.float64)
    baseline = torch.tensor(found["untrained"], dtype=torch.float64)
    return {
        "average": float(continual.average_accuracy(matrix)[-1]),
        "first": float(matrix[-1, 0]),
        "latest": float(matrix[-1, -1]),
        "minimum": float(matrix[-1].min()),
        "forgetting": float(continual.forgetting(matrix)),
        "forward_transfer": float(continual.forward_transfer(matrix, baseline)),
        "strength": found["strength"],
        "seconds": found["seconds"],
    }


def curve(found: Mapping[str, Any]) -> list[float]:
    """Mean quality over the tasks seen so far, after each of the T tasks."""
    return [float(v) for v in continual.average_accuracy(torch.tensor(found["test"], dtype=torch.float64))]


def methods_table(config: Config, runs: Sequence[Mapping[str, Mapping[str, float]]]) -> Table:
    """Every method's numbers, averaged over seeds."""

    def mean(name: str, key: str) -> float:
        return sum(run[name][key] for run in runs) / len(runs)

    keys = ("average", "first", "latest", "minimum", "forgetting", "forward_transfer")
    rows = [
        [name, *(f"{100 * mean(name, key):.2f}" for key in keys), f"{mean(name, 'strength'):g}",
         f"{mean(name, 'seconds'):.0f}"]
        for name in config.methods
    ]  # fmt: skip
    columns = ["method", "average", "first task", "latest task", "worst task", "forgetting", "forward transfer",
               "strength", "seconds"]  # fmt: skip
    return Table("Accuracy in per cent after the last task", columns, rows, "Strengths were chosen on validation data.")


def progress_picture(stream: Stream, curves: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """Mean test quality over the tasks seen so far, by method; ``curves`` holds a curve for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in curves.items():
        mean = torch.tensor(found, dtype=torch.float64).mean(0)
        axes.plot(range(1, len(mean) + 1), (100 * mean).tolist(), marker="o", markersize=3, label=name)
    axes.set(xlabel="tasks learned", ylabel="mean test accuracy over them (%)")
    axes.legend(fontsize="small")
    return Picture("accuracy", figure, f"Mean test accuracy over the tasks seen so far, {stream.title}.")
