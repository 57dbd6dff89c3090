"""``python -m benchmarks [NAME ...] [--rounds R] [--out DIR]``: runs benchmarks, prints and saves their results."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.timing import RESULTS, save

NAMES = (
    "attribution",
    "attribution_peers",
    "auto_estimator",
    "bayesian_optimisation",
    "cells",
    "distributed",
    "fit_cost",
    "growth",
    "importance",
    "linearized",
    "montecarlo",
    "many_outputs",
    "many_predictions",
    "migrating",
    "optimizers",
    "penalty",
    "per_example",
    "plans",
    "pruning",
    "tuning",
    "wide_factors",
)


def main() -> int:
    """Runs the benchmarks that were named (all by default); the exit status is 0 if every one ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help=f"which of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    for name in options.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        result = module.run(options.rounds)
        print(module.text(result))
        print(f"written to {save(name, result, options.out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
