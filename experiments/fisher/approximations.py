"""E9: block-diagonal and block-tridiagonal approximations of the Fisher, and their inverses.

The network of E7. ``F̌`` keeps the diagonal blocks of ``F̃``, ``F̂`` has its three block diagonals and a
block-tridiagonal inverse; all with factored Tikhonov damping and the γ of K-FAC's last step.

Source: Martens 2016, 6.4.4, figures 6.4 and 6.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import laplace_kf as lk
from experiments.common.drawing import matrices
from experiments.common.statements import Found, Statement, judged
from experiments.fisher.exact import described, size
from experiments.fisher.network import Setup, batched, damped, parts, train
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Setup):
    """Settings of E9: those of E7."""


STATEMENTS = (
    Statement("the block-tridiagonal form has the three block diagonals exactly (largest relative error)",
              "tridiagonal blocks", 0, 1e-8),
    Statement("and the others nearly (relative error of the blocks further away)", "far blocks", 0, 0.3),
    Statement("its inverse is the better one (error over that of the block-diagonal inverse)", "inverse", 0, 0.8),
    Statement("also on the diagonal blocks", "inverse, diagonal blocks", 0, 0.8),
    Statement("the block-diagonal inverse is closer than the block-diagonal matrix (ratio of relative errors)",
              "diagonal: inverse over matrix", 0, 0.8),
)  # fmt: skip


def run(config: Config) -> Report:
    """Errors of both approximations and of their inverses."""
    shown: dict[str, Tensor] = {}

    def measure(seed: int) -> Found:
        found = train(config, seed)
        structure = lk.diagnostics.fisher_structure(
            found.model, "categorical", batched(found.images), 1.0, found.middle
        )
        all_six = damped(found, structure)
        if not shown:
            shown.update({
                "inverse": all_six.inverse, "tridiagonal, error": all_six.tridiagonal_inverse - all_six.inverse,
                "diagonal, error": all_six.diagonal_inverse - all_six.inverse,
            })  # fmt: skip
        whole, close = parts(structure, all_six.whole), parts(structure, all_six.tridiagonal)
        count = len(whole)

        def off(chosen: Sequence[tuple[int, int]]) -> float:
            size = sum(float(whole[i][j].square().sum()) for i, j in chosen)
            return (sum(float((whole[i][j] - close[i][j]).square().sum()) for i, j in chosen) / size) ** 0.5

        pairs = [(i, j) for i in range(count) for j in range(count)]

        def error(approximate: Tensor, exact: Tensor) -> float:
            return float((approximate - exact).norm() / exact.norm())

        def blocks(matrix: Tensor) -> Tensor:
            return torch.block_diag(*[row[i] for i, row in enumerate(parts(structure, matrix))])

        inverse = blocks(all_six.inverse)
        rows = {
            "tridiagonal inverse": error(all_six.tridiagonal_inverse, all_six.inverse),
            "diagonal inverse": error(all_six.diagonal_inverse, all_six.inverse),
            "tridiagonal inverse, diagonal blocks": error(blocks(all_six.tridiagonal_inverse), inverse),
            "diagonal inverse, diagonal blocks": error(blocks(all_six.diagonal_inverse), inverse),
            "diagonal matrix": error(all_six.diagonal, all_six.whole),
        }
        return {
            **rows, "training error": found.error, "iterations": len(found.losses), "gamma": found.gamma,
            "tridiagonal blocks": max(off([(i, j)]) for i, j in pairs if abs(i - j) <= 1),
            "far blocks": off([(i, j) for i, j in pairs if abs(i - j) > 1]),
            "inverse": rows["tridiagonal inverse"] / rows["diagonal inverse"],
            "inverse, diagonal blocks": rows["tridiagonal inverse, diagonal blocks"]
            / rows["diagonal inverse, diagonal blocks"],
            "diagonal: inverse over matrix": rows["diagonal inverse"] / rows["diagonal matrix"],
        }  # fmt: skip

    def pictures() -> Sequence[Picture]:
        return [matrices("inverses", f"Absolute values, one scale, seed {config.seed}.", shown)]

    return judged(
        "E9: block-diagonal and block-tridiagonal Fisher and their inverses",
        described(config),
        config,
        measure,
        STATEMENTS,
        size=size(config),
        pictures=pictures,
    )
