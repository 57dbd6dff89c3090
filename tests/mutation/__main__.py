"""One-line mutants of the package against the tests: ``make mutate``, or ``python -m tests.mutation``.

A mutant is the package with one operator, number, condition or call changed. One process imports the package and
collects the tests; each mutant is a fork of it with the changed code in its functions (:mod:`tests.mutation.session`).
What lies outside of functions, and the named mutants, run in a copy of the tree that is imported afresh. Verdicts are
kept in ``found.json`` beside this file, so that a run goes on where the last one stopped; ``--table`` writes
``docs/mutants.md``.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.mutation.judged import JUDGED
from tests.mutation.mutants import FOLDERS, ROOT, Mutant, by_name, mutants, sampled
from tests.mutation.patched import inside, source_of

FOUND, TABLE = Path(__file__).with_name("found.json"), ROOT / "docs" / "mutants.md"
# What a mutant can be noticed by: the tests of these folders, of subjects below and just above the seven folders.
POOL = (
    "tests/contracts/test_curvature.py", "tests/test_operators.py", "tests/likelihoods", "tests/tape",
    "tests/structures", "tests/test_columns.py", "tests/test_owners.py", "tests/test_engine.py",
    "tests/test_aliases.py", "tests/optim", "tests/layouts", "tests/architectures/test_shared_tensors.py",
    "tests/padding", "tests/contracts/test_toys.py", "tests/architectures/test_precision.py",
    "tests/continual/test_update.py", "tests/continual/test_bounded.py", "tests/predictive/test_links.py",
    "tests/predictive/test_linearized.py", "tests/predictive/test_montecarlo.py", "tests/posterior/test_condition.py",
    "tests/posterior/test_evidence.py", "tests/posterior/test_shared_blocks.py", "tests/posterior/test_tuning.py",
    "tests/estimators", "tests/test_details.py", "tests/test_lookups.py", "tests/test_unused.py",
)  # fmt: skip
# For what lies outside of functions: the tests next to each folder, fastest first, in a fresh process.
NEAREST = {
    "operators": ["tests/test_operators.py", "tests/optim/test_guards.py", "tests/optim/test_inverses.py"],
    "estimators": ["tests/optim/test_guards.py", "tests/test_columns.py", "tests/contracts/test_curvature.py"],
    "likelihoods": ["tests/likelihoods", "tests/predictive/test_links.py"],
    "structures": ["tests/structures", "tests/contracts/test_curvature.py"],
    "layers": ["tests/contracts/test_curvature.py", "tests/architectures/test_shared_tensors.py"],
    "tape": ["tests/tape", "tests/test_owners.py", "tests/contracts/test_curvature.py"],
    "optim": ["tests/optim"],
}
NOTICED = ("killed", "hung")


@dataclass
class Verdicts:
    """What was found out about each mutant, on disk after every one: its verdict, and the test that noticed."""

    rows: dict[str, dict[str, Any]]

    @classmethod
    def read(cls) -> Verdicts:
        return cls(json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {})

    def add(self, mutant: Mutant, verdict: str, by: str, seconds: float) -> None:
        if verdict == "not reached" and mutant.key in self.rows:  # by these tests; others did
            return
        self.rows[mutant.key] = {"verdict": verdict, "by": by}
        FOUND.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{verdict:11} {seconds:5.0f} s  {mutant.key}  {by}", flush=True)


def afresh(mutant: Mutant, tests: list[str], limit: float) -> str:
    """The verdict of the tests in a copy of the tree, imported in a fork of this process (which has torch only)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("laplace_kf", "tests", "docs", "experiments", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name in ("setup.cfg", "pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, tree / name)
        (tree / mutant.file).write_text(source_of(mutant), encoding="utf-8")
        compileall.compile_dir(tree / "laplace_kf", quiet=2)
        child = os.fork()
        if child == 0:
            import pytest

            os.setsid()
            os.chdir(tree)
            sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
                del sys.modules[name]
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests])
            os._exit(int(code))
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "survived" if status == 0 else "killed"
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "no end"


def fingerprint(todo: list[Mutant]) -> str:
    """Of everything that decides which tests reach which mutants."""
    digest = sha256("\n".join(m.key for m in todo).encode())
    for path in sorted((ROOT / "laplace_kf").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run(arguments: argparse.Namespace) -> None:
    import pytest
    import torch

    torch.set_num_threads(1)
    verdicts, named = Verdicts.read(), by_name()
    sample = sampled(arguments.seed)
    known = {m.key for m in (*sample, *named)}
    verdicts.rows = {key: row for key, row in verdicts.rows.items() if key in known}  # the others' lines have changed
    sample = [m for place, m in enumerate(sample) if place < arguments.sample or m.key in verdicts.rows]
    end = time.monotonic() + 60 * arguments.minutes
    in_functions = [m for m in sample if inside(m)]
    others = [(m, named.get(m) or NEAREST[m.folder]) for m in (*named, *sample) if m in named or not inside(m)]
    if arguments.only != "outside":
        from tests.mutation.session import Mutants

        reached = ROOT / "results" / f"reached-{fingerprint(in_functions)}.jsonl"
        reached.parent.mkdir(exist_ok=True)
        open_ = {key for key, row in verdicts.rows.items() if arguments.again and row["verdict"] not in NOTICED}
        done = verdicts.rows.keys() - {key for key in open_ if not JUDGED.get(key, "").startswith("equivalent")}
        plugin = Mutants(
            in_functions, done, reached, verdicts.add, (arguments.reaching, arguments.beside), arguments.thin, end
        )
        options = ["-q", "-p", "no:cacheprovider", "--timeout=0"]
        pytest.main([*options, *(str(ROOT / path) for path in arguments.tests or POOL)], plugins=[plugin])
    for mutant, tests in others if arguments.only != "inside" else ():
        again = verdicts.rows.get(mutant.key, {}).get("verdict") in (None, "unfit")
        if again and time.monotonic() < end:
            begun = time.monotonic()
            verdicts.add(mutant, afresh(mutant, tests, arguments.limit), "", time.monotonic() - begun)


def explained(key: str) -> bool:
    """Whether what is known of a survivor is why it survived, or what notices it now."""
    return JUDGED.get(key, "").startswith(("equivalent", "killed"))


def table() -> str:
    """The page: what was run by folder, and the survivors with what was found out about them."""
    rows, named = Verdicts.read().rows, {mutant.key for mutant in by_name()}
    count = Counter((key.split("/")[1], row["verdict"]) for key, row in rows.items() if key not in named)
    left = [key for key, row in rows.items() if row["verdict"] not in NOTICED and key not in named]
    lines = [
        "# Mutants", "",
        "Made by `python -m tests.mutation --table` from runs of `make mutate`: the package with one thing changed (an",
        "operator, a number, a condition, a call left out), against the tests that reach the changed line. The sample",
        "is drawn from all mutants of these folders in turn, in an order that stays the same as the code changes. A",
        "mutant met one in ten of the parameters of each test that reaches it, eight seconds at most (`--thin 10",
        "--reaching 8 --beside 0`); those that survived met the tests next to them once more, old and new ones",
        "(`--again --tests ...`). Those outside of functions were left out (`--only inside`). The whole suite notices",
        "more.", "",
        "| folder | mutants | run | noticed | of these, hanging | survived | reached by no test | explained |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    total = [0] * 7
    for folder in FOLDERS:
        there = sum(len(list(mutants(path))) for path in sorted((ROOT / "laplace_kf" / folder).glob("*.py")))
        killed, hung, no_test = (count[folder, what] for what in ("killed", "hung", "not reached"))
        run_ = sum(number for (where, _), number in count.items() if where == folder)
        known = sum(explained(key) for key in left if key.split("/")[1] == folder)
        row = [there, run_, killed + hung, hung, run_ - killed - hung - no_test, no_test, known]
        total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append(f"| {folder} | {' | '.join(map(str, row))} |")
    lines += [f"| all | {' | '.join(map(str, total))} |", ""]
    lines += [
        f"Noticed when they were run: {total[2]} of {total[1]} ({100 * total[2] / max(total[1], 1):.0f} %). Of the",
        f"others, {total[6]} are explained below: no test can notice them, or one that was written since does.",
        f"Together that is {100 * (total[2] + total[6]) / max(total[1], 1):.0f} %.", "", "## Named mutants", "",
        "Details of the papers that once no test looked at.", "",
    ]  # fmt: skip
    lines += [f"* {rows[key]['verdict']}: {key}" for key in sorted(rows) if key in named]
    judged = (f"* {key}: {JUDGED.get(key, 'not judged yet')}" for key in sorted(left))
    return "\n".join([*lines, "", "## Survivors", "", *judged, ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--sample", type=int, default=175, help="mutants of the sample")
    parser.add_argument("--minutes", type=float, default=25.0, help="time to run for")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one mutant that is imported afresh")
    parser.add_argument("--reaching", type=float, default=20.0, help="seconds of tests that reach a mutant")
    parser.add_argument("--beside", type=float, default=5.0, help="seconds of other tests in their files")
    parser.add_argument("--thin", type=int, default=1, help="try one in so many parameters of each test")
    parser.add_argument("--only", choices=["inside", "outside"], help="mutants in functions, or the others")
    parser.add_argument("--again", action="store_true", help="also those not noticed, but for equivalent ones")
    parser.add_argument("--tests", nargs="*", help="tests for mutants in functions, in place of POOL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="write docs/mutants.md from what was run")
    chosen = parser.parse_args()
    if chosen.table:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        run(chosen)
