"""The command line of the experiments.

python -m experiments list
python -m experiments run ID_OR_CONFIG [key=value ...] [--out DIR]
python -m experiments report
python -m experiments data fetch NAME
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import runner
from experiments.common import data
from experiments.registry import EXPERIMENTS
from laplace_kf.errors import LaplaceKFError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; the exit status is 0 only on success."""
    parser = _parser()
    chosen, extra = parser.parse_known_args(arguments)
    # argparse gives up on key=value words that stand after --out; they are settings like the others
    late = [word for word in extra if chosen.command == "run" and not word.startswith("-")]
    settings = [*getattr(chosen, "settings", []), *late]
    unknown = [word for word in extra if word not in late]
    if unknown:
        parser.error(f"unrecognised: {' '.join(unknown)}")
    try:
        if chosen.command == "list":
            _list()
        elif chosen.command == "readme":
            from experiments import readme  # all experiments' reports: seconds, of which the others need none

            readme.write()
        elif chosen.command == "report":
            from experiments import readme

            print(f"see {readme.report()}")
        elif chosen.command == "data":
            for path in data.fetch(chosen.name):
                print(f"ready: {path}")
        else:
            _run(chosen.experiment, settings, chosen.out)
    except (LaplaceKFError, ImportError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all experiments, and which of them are ready")
    run = commands.add_parser("run", help="run one experiment")
    run.add_argument(
        "experiment", metavar="ID_OR_CONFIG", help="E1 to E35, a word of the list, or a file of configs/ (name or path)"
    )
    run.add_argument("settings", metavar="key=value", nargs="*", help="settings that differ from the file's")
    run.add_argument("--out", type=Path, help="where to write (default: results/<id>)")
    commands.add_parser("readme", help="collect results into docs/ and put their tables into README.md")
    commands.add_parser("report", help="all claims of the papers on one page, docs/results/index.html")
    sets = commands.add_parser("data", help="data sets").add_subparsers(dest="action", required=True)
    fetch = sets.add_parser("fetch", help="download the public originals of a data set into the user cache")
    fetch.add_argument("name", metavar="NAME", help=", ".join(data.DATA_SETS))
    return parser


def _list() -> None:
    names = runner.config_names()
    for entry in EXPERIMENTS.values():
        state = "ready" if entry.module else "not yet"
        configs = f"  [{', '.join(names[entry.id])}]" if entry.module else ""
        print(f"{entry.id:11} {state:8} {entry.title}{configs}")


def _run(name: str, settings: Sequence[str], out: Path | None) -> None:
    experiment, config = runner.resolve(name, settings)
    target = out or Path("results") / experiment.id
    report = runner.run(experiment, config, target)
    print("\n\n".join(table.text() for table in report.tables))
    print(f"\n{report.details['wall_time_s']:.1f} s; see {target / 'report.html'}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # stiff penalties drive numbers there, and products with them are many times slower
    sys.exit(main())
