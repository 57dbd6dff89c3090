"""What a continual learning experiment makes of its matrices: numbers, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from laplace_kf import continual
from laplace_kf.reports.html import Picture, Table

if TYPE_CHECKING:
    from experiments.continual.tasks import Measure, Stream, Task

__all__ = [
    "batch_table", "curve", "described", "heat_map", "methods_table", "numbers", "progress_picture", "quoted",
    "task_table",
]  # fmt: skip

Runs = Sequence[Mapping[str, Mapping[str, float]]]  # numbers by seed, method and name
FEW = 12
"""Up to this many tasks, tables and heat maps name each of them."""


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """The summary of one sequence: ``test`` is its matrix ``(T, T)``, ``untrained`` the baseline ``(T,)``."""
    matrix = torch.tensor(found["test"], dtype=torch.float64)
    baseline = torch.tensor(found["untrained"], dtype=torch.float64)
    return {
        "average": float(continual.average_accuracy(matrix)[-1]),
        "first": float(matrix[-1, 0]),
        "latest": float(matrix[-1, -1]),
        "minimum": float(matrix[-1].min()),
        "learned": float(matrix.diagonal().mean()),
        "forgetting": float(continual.forgetting(matrix)),
        "forward_transfer": float(continual.forward_transfer(matrix, baseline)),
        **{key: value for key, value in found["closing"].items() if isinstance(value, float)},
        "strength": found["strength"],
        "seconds": found["seconds"],
        "processor_seconds": found["processor_seconds"],
    }


def curve(found: Mapping[str, Any]) -> list[float]:
    """Mean quality over the tasks seen so far, after each of the T tasks: ``T`` numbers."""
    return [float(v) for v in continual.average_accuracy(torch.tensor(found["test"], dtype=torch.float64))]


def described(tasks: Sequence[Task], absent: Mapping[str, str], remarks: Mapping[str, str]) -> str:
    """The sizes of the tasks, what is left out, and remarks on the data, for the summary."""
    sizes = {(len(t.train[1]), len(t.val[1]), len(t.test[1])) for t in tasks}
    if len(sizes) == 1:
        text = ["{:,} training, {:,} validation and {:,} test examples a task.".format(*sizes.pop())]
    else:
        listed = [f"{t.name} {len(t.train[1]):,}, {len(t.val[1]):,} and {len(t.test[1]):,}" for t in tasks]
        text = [f"Training, validation and test examples: {'; '.join(listed)}."]
    text += [f"Left out: {name} ({why})." for name, why in absent.items()]
    text += [f"{name}: {remark}." for name, remark in remarks.items()]
    return " ".join(text)


def methods_table(measure: Measure, runs: Runs, chosen: bool) -> Table:
    """Every method's numbers, averaged over seeds; ``chosen`` says whether any had more than one strength to choose."""
    shown = {
        "average": "average", "first": "first task", "latest": "latest task", "minimum": "worst task",
        "learned": "when learned",
    }  # fmt: skip
    rows = []
    for name in runs[0]:
        cells = [_shown(measure, _mean(runs, name, key)) for key in shown]
        cells += [_shown(measure, _mean(runs, name, key), signed=False) for key in ("forgetting", "forward_transfer")]
        strengths = sorted({run[name]["strength"] for run in runs})
        seconds = _mean(runs, name, "processor_seconds")
        rows.append([name, *cells, ", ".join(f"{value:g}" for value in strengths), f"{seconds:.0f}"])
    columns = ["method", *shown.values(), "forgetting", "forward transfer", "strength", "processor s"]
    note = "Strengths were chosen on validation data. " if chosen else "One strength was run. "
    note += "When learned: each task right after it, averaged."
    return Table(f"Test {measure.name} after the last task", columns, rows, note)


def task_table(
    measure: Measure, tasks: Sequence[Task], last: Mapping[str, Sequence[Sequence[float]]],
    published: Mapping[str, Mapping[str, float]],
) -> Table:  # fmt: skip
    """Every task after the last one, with what was published (per cent) in brackets.

    Args:
        measure: of the stream.
        tasks: the T tasks.
        last: the last row of the matrix, ``T`` numbers, by method and seed.
        published: by method and task.
    """
    names = [task.name for task in tasks]
    rows = []
    for method, found in last.items():
        mean = torch.tensor(found, dtype=torch.float64).mean(0)
        theirs = published.get(method, {})
        values = [*mean.tolist(), float(mean.mean())]
        known = [*(theirs.get(name) for name in names), _average([theirs[name] for name in names if name in theirs])]
        cells = [
            _shown(measure, value) + (f" ({known_value:.2f})" if known_value is not None else "")
            for value, known_value in zip(values, known, strict=True)
        ]
        rows.append([method, *cells])
    note = "In brackets: the published numbers; their average is over the tasks shown here." if published else ""
    return Table(f"Test {measure.name} of every task after the last one", ["method", *names, "average"], rows, note)


def batch_table(closing: Mapping[str, Sequence[Mapping[str, Any]]], batch: str, noise: float) -> Table:
    """Predictions of the last posterior beside those of the ``batch`` method's, which had all data at once.

    Args:
        closing: ``mean`` and ``std`` of the function ``(N,)``, ``log_likelihood``, ``error``, by method and seed.
        batch: the method to compare with.
        noise: standard deviation of the noise, the unit of the difference.
    """
    rows = []
    for name, found in closing.items():
        gaps, spreads = [], []
        for one, reference in zip(found, closing[batch], strict=True):
            mean, std, other, width = (
                torch.tensor(values, dtype=torch.float64)
                for values in (one["mean"], one["std"], reference["mean"], reference["std"])
            )
            gaps.append(float((mean - other).square().mean().sqrt()) / noise)
            spreads.append(float((std / width).mean()))
        error, density = (_average([one[key] for one in found]) or 0.0 for key in ("error", "log_likelihood"))
        spread = _average(spreads) or 0.0
        rows.append(
            [name, f"{error:.4f}", f"{density:.4f}", f"{_average(gaps):.3f}", f"{spread:.3f}" if spread else "–"]
        )
    columns = ["method", "test error", "log-likelihood", "from batch (noise units)", "spread / batch"]
    note = (
        "All test rows. Log-likelihood: of the linearised prediction where the method has a posterior, of the network "
        "and the noise otherwise. Spread: standard deviation of the function beside the batch posterior's, with the "
        "full curvature of all rows at once."
    )
    return Table(f"Against the batch posterior ({batch})", columns, rows, note)


def progress_picture(stream: Stream, curves: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """Mean test quality over the tasks seen so far, by method; ``curves`` holds a curve for every seed."""
    from matplotlib.figure import Figure

    measure = stream.measure
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, found in curves.items():
        mean = measure.sign * measure.scale * torch.tensor(found, dtype=torch.float64).mean(0)
        axes.plot(range(1, len(mean) + 1), mean.tolist(), marker="o", markersize=3, label=name)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="tasks learned", ylabel=f"mean test {measure.name} over them")
    axes.legend(fontsize="small")
    return Picture(stream.picture, figure, f"Mean test {measure.name} over the tasks seen so far, {stream.title}.")


def heat_map(stream: Stream, tasks: Sequence[Task], method: str, found: Sequence[Sequence[Sequence[float]]]) -> Picture:
    """The matrix of a method, ``(T, T)`` for every seed, averaged; numbers stand in the cells of short streams."""
    from matplotlib.figure import Figure

    measure = stream.measure
    matrix = measure.sign * measure.scale * torch.tensor(found, dtype=torch.float64).mean(0)
    few = len(tasks) <= FEW
    side = 2.5 + 0.45 * min(len(tasks), FEW)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.tolist(), cmap="viridis" if measure.sign > 0 else "viridis_r")
    figure.colorbar(image, ax=axes, label=f"test {measure.name}")
    axes.set(xlabel="on task", ylabel="after task")
    if few:
        names = [task.name for task in tasks]
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        middle = float((matrix.nan_to_num().max() + matrix.nan_to_num().min()) / 2)
        for t, row in enumerate(matrix.tolist()):
            for i, value in enumerate(row):
                dark = (value < middle) == (measure.sign > 0)
                if math.isfinite(value):
                    axes.text(
                        i, t, f"{value:.{min(measure.digits, 2)}f}" if measure.scale == 1 else f"{value:.0f}",
                        ha="center", va="center", fontsize=7, color="white" if dark else "black",
                    )  # fmt: skip
    return Picture("matrix", figure, f"Test {measure.name} of every task after every task: {method}, {stream.title}.")


def quoted(summary: str, tables: Sequence[Table]) -> dict[str, Any]:
    """What pages quote of a report, as JSON-able entries of its result file."""
    found = [{"title": t.title, "columns": list(t.columns), "rows": [list(row) for row in t.rows], "note": t.note}
             for t in tables]  # fmt: skip
    return {"summary": summary, "tables": found}


def _mean(runs: Runs, name: str, key: str) -> float:
    return sum(run[name][key] for run in runs) / len(runs)


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(measure: Measure, value: float, signed: bool = True) -> str:
    """A stored number as printed; of a difference (``signed`` off), positive stays positive."""
    factor = measure.scale * (measure.sign if signed else 1)
    return f"{factor * value:.{measure.digits}f}" if math.isfinite(value) else "–"
