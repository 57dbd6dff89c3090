"""A parameter that no layer rule covers: per-example gradients, vectorised, against a loop over examples.

The parameter scales the features of a small network inside an einsum of three factors, which has no rule. The cost is
that of a diagonal fit of all parameters, in training epochs; a test keeps the vectorised path in use, this row its
cost.
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


class Gated(nn.Module):
    """Features ``(N, I)`` times a vector that is used twice in one einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.einsum("nd,d,d->nd", x, self.gate, self.gate).sin())
        return out


@contextmanager
def looped() -> Iterator[None]:
    """One example after another meanwhile, as where a model cannot be vectorised."""

    def refuse(self: ExampleGradients, *args: Any) -> Any:
        raise RuntimeError

    plain = ExampleGradients._vectorised
    ExampleGradients._vectorised = refuse  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ExampleGradients._vectorised = plain  # type: ignore[method-assign]


def run(rounds: int = 5) -> dict[str, Any]:
    """Costs of both paths in training epochs, and whether the vectorised one keeps its limit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x, y = Gated(), torch.randn(EXAMPLES, WIDTH), torch.arange(EXAMPLES) % CLASSES
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    def fit() -> Tensor:
        return lk.curvature.estimate(model, "categorical", batches, structure="diag").mean().diag()

    def loop() -> Tensor:
        with looped():
            return fit()

    difference = float((fit() - loop()).norm() / fit().norm())
    jobs: dict[str, Callable[[], Any]] = {"epoch": lambda: epoch(model, batches), "vectorised": fit, "loop": loop}
    costs = ratios(in_turn(jobs, rounds), "epoch")
    share = costs["vectorised"]["ratio"] / costs["loop"]["ratio"]
    return {
        "workload": f"diagonal fit, {EXAMPLES} examples, a gate of {WIDTH} without a rule, one thread, float32",
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
