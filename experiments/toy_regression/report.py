"""What E19 found, as a table, claims and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.common.claims import Claim
from experiments.toy_regression.problem import LIMIT, STRUCTURES, Pair
from laplace_kf.reports import plots
from laplace_kf.reports.html import Picture, Table

__all__ = ["CLAIMS", "SCANNED", "Outcome", "picture", "table"]

SCANNED = ("best on the grid", "best on the grid that validation allows")
"""Of all settings of a structure: an upper bound on any tuning, and on one by these validation points."""


@dataclass
class Outcome:
    """One repetition. Bands are ``{method: (mean, epistemic sd)}``, each ``(grid,)`` in the units of ``y``."""

    train: Pair
    bands: dict[str, tuple[Tensor, Tensor]]
    found: dict[str, dict[str, float]]
    tuning: dict[str, dict[str, Any]]
    hmc: dict[str, float]
    seconds: dict[str, float]


TINY = 1e-12


def _claims() -> tuple[Claim, ...]:
    names = list(STRUCTURES)
    grows = [Claim(f"{name}, tuned: more uncertain away from the data than near them", "sd_growth", f"{name}, tuned",
                   "MAP", least=TINY) for name in names]  # fmt: skip
    wide = [Claim(f"{name}, untuned: overestimates the uncertainty near the data", "sd_inside", f"{name}, untuned",
                  "HMC", least=TINY) for name in names]  # fmt: skip
    worst = [Claim(f"untuned, near the data: full is wider than {name}", "sd_inside", "full, untuned",
                   f"{name}, untuned", least=TINY) for name in names[1:]]  # fmt: skip
    poor = [Claim(f"untuned, near the data: the mean of full is further from HMC's than that of {name}",
                  "mean_rmse_inside", "full, untuned", f"{name}, untuned", least=TINY)
            for name in names[1:]]  # fmt: skip
    closer = [Claim(f"{name}: tuning brings the uncertainty closer to HMC's on |x| <= 6", "sd_rmse", f"{name}, tuned",
                    f"{name}, untuned", most=-TINY) for name in names]  # fmt: skip
    near = [Claim(f"{name}: and near the data", "sd_rmse_inside", f"{name}, tuned", f"{name}, untuned", most=-TINY)
            for name in names]  # fmt: skip
    stronger = [
        Claim("tuned regularisation, log10 of N λ: full above diagonal", "regularisation", "full, tuned",
              "diagonal, tuned", least=TINY),
        Claim("tuned regularisation, log10 of N λ: diagonal above Kronecker", "regularisation", "diagonal, tuned",
              "Kronecker, tuned", least=TINY),
    ]  # fmt: skip
    fits = [
        Claim(f"negative log-likelihood on |x| <= 6 at most 1.2 of HMC's: Kronecker, {state}", "grid_over_hmc",
              f"Kronecker, {state}", "HMC", most=0.2) for state in ("tuned", *SCANNED)
    ]  # fmt: skip
    return (*grows, *wide, *worst, *poor, *closer, *near, *stronger, *fits)


CLAIMS = _claims()


_COLUMNS = {
    "val NLL": "val_nll", "test NLL |x|≤4": "test_nll_inside", "test NLL |x|≤6": "test_nll_grid",
    "sd |x|≤4": "sd_inside", "sd 4<|x|≤6": "sd_outside", "RMSE of sd": "sd_rmse",
    "RMSE of mean |x|≤4": "mean_rmse_inside", "N": "n_data", "λ": "prior_precision",
}  # fmt: skip


def table(summary: Mapping[str, Mapping[str, Any]], outcomes: list[Outcome]) -> Table:
    """One row a method: means over the seeds."""
    edges = {f"{name}, tuned" for outcome in outcomes for name, found in outcome.tuning.items() if found["at_edge"]}
    rows = []
    for name, found in summary.items():
        cells = [name]
        for key in _COLUMNS.values():
            value = found.get(key)
            cells.append("" if value is None else f"{value['mean']:.3g}" if key in ("n_data", "prior_precision")
                         else f"{value['mean']:.2f}")  # fmt: skip
        rows.append([*cells[:-1], cells[-1] + " *" * (name in edges)])
    note = (
        "Means over seeds; NLL in nats per point, the rest in the units of y. RMSE of sd: root mean square difference "
        "of the epistemic standard deviation from HMC's on |x| ≤ 6. Best on the grid: of all (N, λ), by the points of "
        "that grid; that validation allows: within two standard errors of the best validation NLL. *: on the edge of "
        "the tuning grid."
    )
    return Table("Methods", ["method", *_COLUMNS], rows, note)


def picture(outcome: Outcome, seed: int) -> Picture:
    """The bands of every method in one repetition."""
    chosen = [f"{name}, {state}" for state in ("untuned", "tuned") for name in STRUCTURES]
    chosen = [*chosen[:3], "HMC", *chosen[3:], *(["mean field"] if "mean field" in outcome.bands else [])]
    figure, axes = plots.panels(2, 4, width=3.3, height=2.9)
    grid = torch.linspace(-LIMIT, LIMIT, len(outcome.bands["HMC"][0]))
    for axis in axes[len(chosen) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, chosen, strict=False):
        mean, sd = outcome.bands[name]
        plots.regression_band(
            grid, mean, sd, points=outcome.train, truth=grid**3, reference=outcome.bands["MAP"][0],
            reference_label="MAP", axis=axis, title=name, limits=(-130, 130), labels=("x", "y"),
        )  # fmt: skip
    plots.legend_below(figure, columns=6)
    return Picture(
        "bands", figure,
        f"Predictive mean with one and two epistemic standard deviations, seed {seed}. Dashed: y = x³; dotted: the "
        "network itself.",
    )  # fmt: skip
