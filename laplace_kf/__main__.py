"""``python -m laplace_kf demo [--out DIR]``, ``... evaluate POSTERIOR ...`` and ``... attribute POSTERIOR ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from laplace_kf import attribute
from laplace_kf.errors import LaplaceKFError
from laplace_kf.evaluate import arguments as declare

__all__ = ["main"]


def _demo(chosen: argparse.Namespace) -> None:
    from laplace_kf import demo

    demo.main(chosen.out)


def _evaluate(chosen: argparse.Namespace) -> None:
    from laplace_kf import evaluate

    evaluate.main(chosen)


def _attribute(chosen: argparse.Namespace) -> None:
    attribute.main(chosen)


RUN = {"demo": _demo, "evaluate": _evaluate, "attribute": _attribute}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit status is 0 only on success."""
    parser = argparse.ArgumentParser(prog="python -m laplace_kf", description="Posteriors for trained networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="compare MAP, MC dropout and Laplace posteriors on handwritten digits")
    demo.add_argument("--out", type=Path, default=Path("results/demo"), help="where to write (default: %(default)s)")
    scoring = commands.add_parser("evaluate", help="out-of-distribution scores of a saved posterior: table and page")
    declare(scoring)
    tracing = commands.add_parser("attribute", help="the most helpful and harmful training examples of queries")
    attribute.arguments(tracing)
    chosen = parser.parse_args(arguments)
    try:
        RUN[chosen.command](chosen)
    except (LaplaceKFError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
