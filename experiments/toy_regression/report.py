"""What E19 found, as a table, claims and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.common.claims import Claim
from experiments.toy_regression.family import ALLOWED
from experiments.toy_regression.problem import LIMIT, STRUCTURES, Pair
from laplace_kf.reports import plots
from laplace_kf.reports.html import Picture, Table

__all__ = ["CLAIMS", "LEVEL", "SCANNED", "WAYS", "Outcome", "picture", "sentences", "table"]

SCANNED = ("best on the grid", "best on the grid that validation allows", "at HMC's level")
"""Of all settings of a structure: a bound on any tuning, one on tuning by these validation points, and of those that
come as near to HMC as they should the one with the lowest loss on the validation points."""
WAYS = {"": "mc", ", linearised": "linearized"}
"""How a posterior predicts, by what its row is called."""
LEVEL = 1.2
"""Times HMC's negative log-likelihood on |x| <= 6: what counts as near to it."""


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
    states = ["Kronecker, tuned", "Kronecker, tuned, linearised",
              *(f"Kronecker, {state}{way}" for way in WAYS for state in SCANNED[:2])]  # fmt: skip
    fits = [Claim(f"negative log-likelihood on |x| <= 6 at most {LEVEL:g} of HMC's: {state}", "grid_over_hmc", state,
                  "HMC", most=LEVEL - 1) for state in states]  # fmt: skip
    price = "the validation points rule out every (N, λ) that is so near to HMC (standard errors behind the tuned one)"
    missed = [Claim(f"{name}{way}: {price}", "val_behind_se", f"{name}, {SCANNED[2]}{way}", f"{name}, tuned{way}",
                    least=ALLOWED) for way in WAYS for name in names]  # fmt: skip
    return (*grows, *wide, *worst, *poor, *closer, *near, *stronger, *fits, *missed)


CLAIMS = _claims()


_COLUMNS = {
    "val NLL": "val_nll", "test NLL |x|≤4": "test_nll_inside", "test NLL |x|≤6": "test_nll_grid",
    "val NLL behind": "val_behind", "sd |x|≤4": "sd_inside", "sd 4<|x|≤6": "sd_outside", "RMSE of sd": "sd_rmse",
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
        "that grid; that validation allows: within two standard errors of the best validation NLL; at HMC's level: of "
        f"those with a test NLL on |x| ≤ 6 of at most {LEVEL:g} times HMC's the one with the best validation NLL (the "
        "nearest, if there is none), and by how much it is behind the tuned one there. Linearised: predictions of the "
        "network linear in its weights, exact; the others by Monte Carlo. *: on the edge of the tuning grid."
    )
    return Table("Methods", ["method", *_COLUMNS], rows, note)


def sentences(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Whether the tuned Kronecker posterior comes near to HMC on the grid, and whether any tuning could, in words."""
    said = []
    for way, words in zip(WAYS, ("By Monte Carlo", "By the linearised network"), strict=True):
        names = [f"Kronecker, {state}{way}" for state in ("tuned", SCANNED[0], SCANNED[2])]
        ratios, nearest = ([run[name]["grid_over_hmc"] for run in runs] for name in names[:2])
        near = [run[names[2]] for run in runs]
        # Whether there is one says the best of all: the one nearest to the limit may be past it when it is drawn anew.
        there = [row for row, best in zip(near, nearest, strict=True) if best <= LEVEL]
        out = [
            row for row, ratio, best in zip(near, ratios, nearest, strict=True)
            if ratio > LEVEL and (best > LEVEL or row["val_behind_se"] > ALLOWED)
        ]  # fmt: skip
        behind = ", ".join(f"{row['val_behind']:.2f} ({row['val_behind_se']:.1f})" for row in there)
        price = (
            f"Settings that do exist for {len(there)} of {len(runs)} seeds; the best of them on the validation points "
            f"is {behind} nats (standard errors) a point behind the tuned one. " if there else "No setting does. "
        )  # fmt: skip
        said.append(
            f"**{words}**, tuned, the Kronecker posterior has {', '.join(f'{ratio:.2f}' for ratio in ratios)} times "
            f"HMC's negative log-likelihood on |x| ≤ 6; {sum(ratio <= LEVEL for ratio in ratios)} of {len(runs)} seeds "
            f"are at most at {LEVEL:g}. {price}The validation points rule out every (N, λ) at that level for "
            f"{len(out)} of {len(runs)} seeds" + (": no tuning on them gets there." if len(out) == len(runs) else ".")
        )
    return said


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
