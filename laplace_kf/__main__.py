"""``python -m laplace_kf demo [--out DIR]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from laplace_kf.errors import LaplaceKFError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit status is 0 only on success."""
    parser = argparse.ArgumentParser(prog="python -m laplace_kf", description="Posteriors for trained networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="compare MAP, MC dropout and Laplace posteriors on handwritten digits")
    demo.add_argument("--out", type=Path, default=Path("results/demo"), help="where to write (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        from laplace_kf import demo as module

        module.main(chosen.out)
    except (LaplaceKFError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
