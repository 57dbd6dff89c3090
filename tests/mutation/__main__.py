"""One-line mutants of the package against the tests next to them: ``make mutate``, or ``python -m tests.mutation``.

A mutant is the package with one operator, number, condition or call changed. Every mutant runs in a fork of this
process (which has torch, but not the package) in a copy of the tree, with the tests of its folder. What was run is kept
in ``results/mutants.json``, so that a run goes on where the last one stopped; ``--table`` writes ``docs/mutants.md``.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.judged import JUDGED
from tests.mutation.named import NAMED

ROOT = Path(__file__).resolve().parents[2]
KEPT, TABLE = ROOT / "results" / "mutants.json", ROOT / "docs" / "mutants.md"
# The tests next to each folder, fastest first; a mutant that they do not notice survives, whatever else would.
NEAREST = {
    "operators": [
        "tests/test_operators.py",
        "tests/optim/test_guards.py",
        "tests/optim/test_inverses.py",
        "tests/continual/test_update.py",
    ],
    "estimators": ["tests/optim/test_guards.py", "tests/test_columns.py", "tests/contracts/test_curvature.py"],
    "likelihoods": ["tests/likelihoods", "tests/predictive/test_links.py"],
    "structures": ["tests/structures", "tests/contracts/test_curvature.py"],
    "layers": ["tests/contracts/test_curvature.py", "tests/architectures/test_shared_tensors.py"],
    "tape": ["tests/tape", "tests/test_owners.py", "tests/contracts/test_curvature.py"],
    "optim": ["tests/optim"],
}
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file of the package with ``old`` at ``(line, column)`` replaced by ``new``."""

    file: str
    line: int
    column: int
    old: str
    new: str

    @property
    def key(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line}:{self.column} `{old}` -> `{new}`"

    def apply(self, source: str) -> str:
        start = sum(len(line) for line in source.splitlines(keepends=True)[: self.line - 1]) + self.column
        assert source[start:].startswith(self.old), self.key
        return source[:start] + self.new + source[start + len(self.old) :]


def by_name() -> dict[Mutant, list[str]]:
    """The named mutants with their tests."""
    found = {}
    for file, old, new, tests in NAMED:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, (file, old)
        before = source[: source.index(old)]
        found[Mutant(file, before.count("\n") + 1, len(before) - before.rfind("\n") - 1, old, new)] = tests
    return found


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """What a node could be mistaken for."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Constant(...)
    guards = {"clamp", "clamp_min", "clamp_max", "abs", "sqrt", "square"}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in guards:
        yield node.func.value


def mutants(path: Path) -> Iterator[Mutant]:
    """All of one file; not in annotations, messages of errors, docstrings and lists of names."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, ast.AST):
                    yield from walk(one)

    for node in walk(ast.parse(source)):
        if getattr(node, "lineno", 0) != getattr(node, "end_lineno", 1):
            continue
        text = lines[node.lineno - 1].encode()  # type: ignore[attr-defined]
        column = len(text[: node.col_offset].decode())  # type: ignore[attr-defined]
        old = text[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]
        for other in changed(node):
            new = ast.unparse(ast.fix_missing_locations(other))
            whole = isinstance(node, ast.Expr)
            yield Mutant(str(path.relative_to(ROOT)), node.lineno, column, old, new if whole else f"({new})")  # type: ignore[attr-defined]


def verdict(tree: Path, tests: list[str], limit: float) -> str:
    """``killed``, ``survived`` or ``timeout`` of the tests in a copy of the tree, run in a fork."""
    child = os.fork()
    if child == 0:
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
    return "timeout"


def sampled(seed: int) -> list[Mutant]:
    """All mutants, in a random order that takes the folders in turn."""
    chance = random.Random(seed)
    queues = []
    for folder in NEAREST:
        found = [m for path in sorted((ROOT / "laplace_kf" / folder).glob("*.py")) for m in mutants(path)]
        queues.append(chance.sample(found, len(found)))
    return [queue[k] for k in range(max(map(len, queues))) for queue in queues if k < len(queue)]


def run(arguments: argparse.Namespace) -> None:
    found: dict[str, str] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    named = by_name()
    todo = [m for m in [*named, *sampled(arguments.seed)] if m.key not in found]
    end, done = time.monotonic() + 60 * arguments.minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("laplace_kf", "tests", "docs", "experiments", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name in ("setup.cfg", "pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, tree / name)
        compileall.compile_dir(tree / "laplace_kf", quiet=2)
        for mutant in todo:
            if time.monotonic() > end or (arguments.sample is not None and done >= arguments.sample):
                break
            target, clean = tree / mutant.file, (ROOT / mutant.file).read_text(encoding="utf-8")
            target.write_text(mutant.apply(clean), encoding="utf-8")
            begun = time.monotonic()
            nearest = named.get(mutant) or NEAREST[mutant.file.split("/")[1]]
            found[mutant.key] = verdict(tree, nearest, arguments.limit)
            target.write_text(clean, encoding="utf-8")
            done += 1
            print(f"{found[mutant.key]:9} {time.monotonic() - begun:5.0f} s  {mutant.key}", flush=True)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(found, indent=1, ensure_ascii=False))


def table() -> str:
    """The page: what was run by folder, and the survivors with what was found out about them."""
    found: dict[str, str] = json.loads(KEPT.read_text())
    named = {mutant.key for mutant in by_name()}
    count = Counter((key.split("/")[1], what) for key, what in found.items() if key not in named)
    lines = [
        "# Mutants", "", "Made by `python -m tests.mutation --table` from runs of `make mutate`: the package with one "
        "thing changed, against", "the tests next to it (`tests/mutation/__main__.py` says which).", "",
        "| folder | run | killed | survived | ran out of time |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for folder in NEAREST:
        row = [count[folder, what] for what in ("killed", "survived", "timeout")]
        lines.append(f"| {folder} | {sum(row)} | {row[0]} | {row[1]} | {row[2]} |")
    lines += ["", "## Named mutants", "", "Details of the papers that once no test looked at.", ""]
    lines += [f"* {found[key]}: {key}" for key in sorted(found) if key in named]
    left = [key for key, what in found.items() if what == "survived" and key not in named]
    judged = (f"* {key}: {JUDGED.get(key, 'not judged yet')}" for key in left)
    return "\n".join([*lines, "", "## Survivors", "", *judged, ""])


if __name__ == "__main__":
    import numpy  # noqa: F401 (imported once, before the forks)
    import pytest
    import scipy.optimize  # noqa: F401
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--sample", type=int, help="mutants to run at most")
    parser.add_argument("--minutes", type=float, default=25.0, help="time to run for")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="write docs/mutants.md from what was run")
    chosen = parser.parse_args()
    if chosen.table:
        TABLE.write_text(table(), encoding="utf-8")
    else:
        run(chosen)
