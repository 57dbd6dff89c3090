"""A parameter that no layer rule covers: per-example gradients, vectorised, against a loop over examples.

The parameter acts through ``tensordot`` of its square, which no rule covers. The cost is that of a diagonal fit of all
parameters, in training epochs; a test keeps the vectorised path in use, this benchmark its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from laplace_kf.tape.examples import ExampleGradients

EXAMPLES, WIDTH, CLASSES, BATCH = 512, 20, 10, 256
LIMIT = 0.25  # the vectorised path, in costs of the loop


class Mixed(nn.Module):
    """Features ``(N, I)`` mixed by the squares of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Parameter(torch.rand(WIDTH, WIDTH) / WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tensordot(x, self.mix * self.mix, 1).sin())
        return out


@contextmanager
def looped() -> Iterator[list[int]]:
    """One example after another meanwhile, as where a model cannot be vectorised; how often that was refused."""
    refused: list[int] = []

    def refuse(self: ExampleGradients, *args: Any) -> Any:
        refused.append(len(refused))
        raise RuntimeError

    plain = ExampleGradients._vectorised
    ExampleGradients._vectorised = refuse  # type: ignore[assignment,method-assign]
    try:
        yield refused
    finally:
        ExampleGradients._vectorised = plain  # type: ignore[method-assign]


def run(rounds: int = 5) -> dict[str, Any]:
    """Costs of both paths in training epochs, and whether the vectorised one keeps its limit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(EXAMPLES, WIDTH), torch.arange(EXAMPLES) % CLASSES
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    def fit() -> Tensor:
        return lk.curvature.estimate(model, "categorical", batches, structure="diag").mean().diag()

    def loop() -> Tensor:
        with looped() as refused:
            found = fit()
        assert refused, "no per-example gradients were asked for"
        return found

    difference = float((fit() - loop()).norm() / fit().norm())
    jobs: dict[str, Callable[[], Any]] = {"epoch": lambda: epoch(model, batches), "vectorised": fit, "loop": loop}
    costs = ratios(in_turn(jobs, rounds), "epoch")
    share = costs["vectorised"]["ratio"] / costs["loop"]["ratio"]
    return {
        "workload": f"diagonal fit, {EXAMPLES} examples, {WIDTH} x {WIDTH} weights without a rule, one thread, float32",
        "unit": "one training epoch (forward and backward)",
        "costs": costs,
        "difference": difference,
        "share_of_loop": share,
        "met": share <= LIMIT,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'path':12} {'epochs':>8} {'seconds':>9}"]
    lines += [f"{name:12} {cost['ratio']:8.1f} {cost['seconds']:9.3f}" for name, cost in result["costs"].items()]
    lines.append(
        f"vectorised / loop {result['share_of_loop']:.3f} (limit {LIMIT}: {'met' if result['met'] else 'NOT met'}), "
        f"difference of the diagonals {result['difference']:.0e}"
    )
    return "\n".join(lines)
