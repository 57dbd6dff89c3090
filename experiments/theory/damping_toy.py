"""E5: why damping by the diagonal restricts too much, in two dimensions.

``B = u uᵀ + a v vᵀ`` with ``u = (−1, 1)``, ``v = (1, 1)`` and a large ``a`` has a direction of low curvature (u)
between its axes, and a diagonal that only knows the high one. Damping ``λ D`` that halves the step along v is
applied with ``D = I``, ``D = diag B`` and ``D = B``, and ``diag B`` is taken for the matrix itself.

Source: Martens 2016, 3.3.2 and 4.6.3, figures 3.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Repeated, Statement, judged
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["STATEMENTS", "Config", "run", "shares"]


@dataclass
class Config(Repeated):
    """Settings of E5; nothing is random.

    Args:
        a: curvature along v relative to that along u.
        large: the other value that the paper names.
        share: of the undamped step along v that the damping leaves.
    """

    repeats: int = 1
    a: float = 15.0
    large: float = 1e4
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("a", self.a, self.a > 1, "above 1")
        require("large", self.large, self.large > 1, "above 1")
        require("share", self.share, 0 < self.share < 1, "between 0 and 1")


STATEMENTS = (
    Statement("diag B in the place of B leaves little of the step along u (a = 15)", "diagonal matrix", 0, 0.2),
    Statement(
        "damping by diag B that halves the step along v leaves little of that along u", "damped by diag B", 0, 0.1
    ),
    Statement("and it is no better than damping by the identity (difference of the shares)", "gain", -1e-12, 1e-12),
    Statement("damping by B halves both steps alike", "damped by B", 0.5 - 1e-9, 0.5 + 1e-9),
    Statement("with a = 10⁴ the step along u is as good as gone", "damped by diag B, large a", 0, 1e-3),
)


def shares(a: float, share: float) -> dict[str, float]:
    """How much of the undamped step along u is left, by damping; that along v is ``share`` (not of the first)."""
    u, v = torch.tensor([-1.0, 1], dtype=torch.float64), torch.tensor([1.0, 1], dtype=torch.float64)
    matrix = torch.outer(u, u) + a * torch.outer(v, v)
    gradient = matrix @ (u + v)  # the undamped step is −(u + v): 1 along both
    kinds = {
        "the identity": torch.eye(2, dtype=torch.float64),
        "diag B": torch.diag(matrix.diagonal()),
        "B": matrix,
    }

    def along(step: torch.Tensor, direction: torch.Tensor) -> float:
        return float(step @ direction / (direction @ direction))

    found = {"diagonal matrix": along(gradient / matrix.diagonal(), u)}
    for name, extra in kinds.items():
        # v is an eigenvector of both: share = b / (b + λ d)
        b, d = (float(v @ m @ v) for m in (matrix, extra))
        strength = b * (1 - share) / share / d
        step = torch.linalg.solve(matrix + strength * extra, gradient)
        assert abs(along(step, v) - share) < 1e-6, "the damping does not leave the share along v"
        found[f"damped by {name}"] = along(step, u)
    return found


def run(config: Config) -> Report:
    """The shares, the claims, and a curve over ``a``."""

    def measure(seed: int) -> Found:
        found = shares(config.a, config.share)
        found["gain"] = found["damped by diag B"] - found["damped by the identity"]
        return {**found, "damped by diag B, large a": shares(config.large, config.share)["damped by diag B"]}

    def pictures() -> Sequence[Picture]:
        values = torch.logspace(0.1, 4, 40).tolist()
        names = list(shares(2.0, config.share))
        curves = {name: (values, [shares(a, config.share)[name] for a in values]) for name in names}
        text = f"Share of the undamped step along u that is left where {config.share:g} of that along v is."
        return [lines("restriction", text, curves, ("a", "share along u"), ("log", "log"))]

    def tables(runs: Sequence[Found]) -> Sequence[Table]:
        return [Table("Step along u, as a share of the undamped one", ("step", "share"),
                      [(name, f"{value:.4g}") for name, value in runs[0].items() if name != "gain"])]  # fmt: skip

    return judged(
        "E5: damping by the diagonal restricts too much",
        "A quadratic of two dimensions.",
        config,
        measure,
        STATEMENTS,
        size="Exact; the published size.",
        tables=tables,
        pictures=pictures,
    )
