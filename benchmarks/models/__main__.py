"""``python -m benchmarks.models [FAMILY ...] [--out docs/models.md]``: the table of third-party models."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.models.measure import Result, measure
from benchmarks.models.problem import FAMILIES, Row, rows

HEAD = """# Third-party models and tools

Made by `make models` (its own extra, `models`); do not edit by hand. Every model is built at toy size with random
weights, none of them 0; nothing is downloaded. *Error* is the relative error of the diagonal curvature of all trainable
parameters to dense Jacobians of one example after the other, in float64. *Fit* (Kronecker, exact) and *tune* (all
defaults, on the same batch) are in forward and backward passes over the same batch, on one thread; a toy model's pass
is short, so that costs per call weigh more than on a real one. An exact fit sends a column back for every class but one
and for every labelled position; language models have all positions labelled here, images to be segmented four pixels
each. *To pass* is what the call needs beside the model and the likelihood.
Errors of 1e-8 are of models that compute in float32 inside (RMSNorm, rotary positions), whatever their type.
{summary}

| package | model | parameters | fits | error | fit | tune | to pass |
|---|---|--:|---|--:|--:|--:|---|
"""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def summary(results: Sequence[Result], out: Sequence[Row]) -> str:
    """What the table says, in one sentence."""
    wrong = sum(is_wrong(result) for result in results)
    missing = ", ".join(sorted({row.package for row in out}))
    said = f"Of {len(results)} rows {wrong or 'none'} {'is' if wrong < 2 else 'are'} wrong or refused"
    return f"{said}; {len(out)} were left out{f', as {missing} is not installed' if out else ''}."


def is_wrong(result: Result) -> bool:
    """Whether a row was refused, or its error is more than models that compute in float32 inside have."""
    return bool(result.refused) or result.error is None or not result.error < 1e-6


def line(result: Result) -> str:
    """One line of the table."""
    row = result.row
    said = "yes" if not result.refused else result.refused.replace("|", "/")[:160]
    cells = [row.package, row.name, f"{result.parameters:,}", said, _number(result.error, ".0e")]
    cells += [_number(result.fit, ".0f"), _number(result.tune, ".0f"), row.passed]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Makes the table; the exit status is 0 if every row that is installed fits and is exact."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help=f"which of: {', '.join(FAMILIES)}")
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--no-costs", action="store_true", help="only whether it fits, and exactly")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    here, out = rows(options.families or FAMILIES)
    results = []
    for row in here:
        results.append(measure(row, not options.no_costs))
        print(line(results[-1]), flush=True)
    left = "".join(f"| {r.package} | {r.name} | – | not installed | – | – | – | {r.passed} |\n" for r in out)
    print(f"{len(results)} rows; {len(out)} left out (not installed)")
    if options.out is not None:
        options.out.write_text(
            HEAD.replace("{summary}", summary(results, out)) + "".join(line(r) + "\n" for r in results) + left
        )
    return int(any(map(is_wrong, results)))


if __name__ == "__main__":
    sys.exit(main())
