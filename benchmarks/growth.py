"""How the time and memory of a fit grow with width, depth, outputs, examples and positions: a picture of plans.

Every point is what a plan knows of a fit (:mod:`laplace_kf.posterior.planning`), which tries one minibatch: processor
seconds of one thread and bytes at the peak. The picture is ``docs/pictures/growth.png``.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.posterior.planning import Probe
from laplace_kf.reports.style import panels

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "growth.png"
BASE = {"width": 256, "depth": 2, "outputs": 10, "examples": 1000, "positions": 1}
AXES: dict[str, tuple[int, ...]] = {
    "width": (64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8),
    "outputs": (3, 10, 30, 100, 300),
    "examples": (250, 1000, 4000, 16_000),
    "positions": (1, 4, 16, 64),
}
FITS: dict[str, dict[str, Any]] = {
    "Kronecker": {"structure": "kron"},
    "Kronecker, one sample": {"structure": "kron", "estimator": "sampled"},
    "diagonal": {"structure": "diag"},
}
BATCH, INPUTS = 50, 64


def network(width: int, depth: int, outputs: int) -> nn.Module:
    """Layers that use their weights at every position."""
    layers: list[nn.Module] = [nn.Linear(INPUTS, width)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, outputs))


def _data(outputs: int, positions: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (BATCH,) if positions == 1 else (BATCH, positions)
    return torch.randn(*shape, INPUTS, generator=rng), torch.randint(0, outputs, shape, generator=rng)


def run(rounds: int = 5) -> dict[str, Any]:
    """Plans along every axis; a plan takes medians itself, so rounds do not matter."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for axis, values in AXES.items():
        for name, settings in FITS.items():
            rows = []
            for value in values:
                size = {**BASE, axis: value}
                torch.manual_seed(0)
                model = network(size["width"], size["depth"], size["outputs"])
                batch = _data(size["outputs"], size["positions"])
                posterior = lk.LaplacePosterior(model, "categorical", **settings)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    memory, each, rest = Probe(posterior, batch, BATCH, time.process_time).fit()
                seconds = rest + each * size["examples"] / BATCH
                rows.append({axis: value, "fit_seconds": seconds, "fit_bytes": memory})
            found.setdefault(axis, {})[name] = rows
    _draw(found)
    return {"workload": f"{INPUTS} inputs, {BASE}, minibatches of {BATCH}, one thread, float32", "axes": found}


def _draw(found: dict[str, Any]) -> None:
    figure, axes = panels(2, len(AXES), width=3.0, height=2.8)
    colours = dict(zip(FITS, ("#0b62a3", "#4fb3d9", "#8a63c9"), strict=True))
    for row, (what, unit, scale) in enumerate((("seconds", "fit, s", 1.0), ("bytes", "fit, MB", 1e-6))):
        for column, (axis, curves) in enumerate(found.items()):
            panel = axes[row * len(AXES) + column]
            for name, rows in curves.items():
                values = [scale * point[f"fit_{what}"] for point in rows]
                panel.plot([point[axis] for point in rows], values, "o-", color=colours[name], label=name, ms=3)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xlabel(axis)
            if column == 0:
                panel.set_ylabel(unit)
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"]]
    for axis, curves in result["axes"].items():
        for name, rows in curves.items():
            shown = ", ".join(
                f"{row[axis]}: {row['fit_seconds']:.3g} s {row['fit_bytes'] / 1e6:.3g} MB" for row in rows
            )
            lines.append(f"{axis:10} {name:24} {shown}")
    return "\n".join(lines)
