"""E8: the inverse of the Kronecker-factored Fisher is nearly block-tridiagonal, the Fisher itself is not.

The network of E7; the inverse is of the form with factored Tikhonov damping, with the γ of K-FAC's last step.

Source: Martens 2016, 6.4.1, figure 6.2.
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
from experiments.fisher.network import Setup, batched, damped, train
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(Setup):
    """Settings of E8: those of E7."""


STATEMENTS = (
    Statement("blocks of the inverse away from the three diagonals are small (their mean over that of the diagonal)",
              "inverse, far", 0, 0.1),
    Statement("those beside the diagonal are larger than those further away (ratio)", "inverse, near over far", 1.5),
    Statement("the Fisher itself is not tridiagonal: far blocks against the diagonal, relative to its inverse's",
              "far of the matrix over far of the inverse", 2),
)  # fmt: skip


def distances(means: Tensor) -> tuple[float, float]:
    """Mean of the blocks beside the diagonal, and further away, over that of the diagonal; from ``(L, L)`` means."""
    index = torch.arange(len(means))
    apart = (index[:, None] - index).abs()
    middle = float(means[apart == 0].mean())
    return float(means[apart == 1].mean()) / middle, float(means[apart > 1].mean()) / middle


def run(config: Config) -> Report:
    """Means of blocks of the matrix and its inverse."""
    shown: dict[str, Tensor] = {}
    table: list[Table] = []

    def measure(seed: int) -> Found:
        found = train(config, seed)
        structure = lk.diagnostics.fisher_structure(
            found.model, "categorical", batched(found.images), 1.0, found.middle
        )
        both = damped(found, structure)
        means = [structure.block_means(matrix) for matrix in (both.whole, both.inverse)]
        if not shown:
            shown.update({"Kronecker form": both.whole, "inverse": both.inverse, "means of the inverse": means[1]})
            for name, values in zip(("Kronecker form", "inverse"), means, strict=True):
                rows = [(f"layer {i + 2}", *(f"{value:.2e}" for value in row)) for i, row in enumerate(values.tolist())]
                head = ("block", *(f"layer {i + 2}" for i in range(len(values))))
                table.append(Table(f"Mean absolute entries of the {name}, seed {seed}", head, rows))
        near, far = distances(means[1])
        near_matrix, far_matrix = distances(means[0])
        return {
            "training error": found.error, "iterations": len(found.losses), "gamma": found.gamma,
            "inverse, near": near, "inverse, far": far,
            "matrix, near": near_matrix, "matrix, far": far_matrix, "inverse, near over far": near / far,
            "far of the matrix over far of the inverse": far_matrix / far,
        }  # fmt: skip

    def pictures() -> Sequence[Picture]:
        return [
            matrices(f"picture_{k}", f"{name}, absolute values, seed {config.seed}.", {name: matrix})
            for k, (name, matrix) in enumerate(shown.items())
        ]

    return judged(
        "E8: structure of the inverse Kronecker-factored Fisher",
        described(config),
        config,
        measure,
        STATEMENTS,
        size=size(config),
        tables=lambda runs: table,
        pictures=pictures,
    )
