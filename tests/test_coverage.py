"""The table of capabilities: every public name and every test on it exists, and its counts add up."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

from tests.checks import of_every

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| R\d{3} \|", line)
]


def resolve(name: str) -> object:
    """What a dotted public name stands for; raises ``ImportError`` or ``AttributeError``."""
    parts = name.split(".")
    parts[0] = {"lk": "laplace_kf"}.get(parts[0], parts[0])
    for split in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@functools.cache
def defined(path: str) -> frozenset[str]:
    """The names of the functions of a test file, also of those in its classes."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_capability_has_one_row():
    assert [row[0] for row in ROWS] == [f"R{k:03}" for k in range(1, 127)]
    assert all(len(row) == 6 for row in ROWS)


def test_names_and_tests_exist():
    of_every(exists, map(tuple, ROWS))


def exists(*row: str) -> None:
    _, _, _, public, tests, state = row
    kind, _, why = state.partition(": ")
    assert kind in {"done", "partial", "missing"}
    assert bool(why) == (kind != "done"), "what is not done says what is missing"
    if kind == "missing":
        assert (public, tests) == ("–", "–")
        return
    (name,) = re.findall(r"`([^`]+)`", public)
    if name.startswith("python -m "):
        _, _, module, command, *rest = name.split()
        registry = importlib.import_module(f"{module}.registry")
        assert command in {"list", "run", "data"}
        for wanted in rest if command == "run" else ():
            assert registry.EXPERIMENTS[wanted].module, f"{wanted} is not written"
    else:
        resolve(name)
    listed = re.findall(r"`(tests/[^`:]+)::(\w+)`", tests)
    assert listed, "no test"
    for path, test in listed:
        assert test in defined(path), f"{path} has no {test}"


def test_the_counts_are_those_of_the_table():
    said = re.search(r"Done: (\d+), partial: (\d+), missing: (\d+)\.", TEXT)
    assert said is not None
    kinds = [row[5].partition(":")[0] for row in ROWS]
    assert [int(n) for n in said.groups()] == [kinds.count(kind) for kind in ("done", "partial", "missing")]


@pytest.mark.parametrize("name", ["lk.nothing", "laplace_kf.optim.kfacc", "lk.LaplacePosterior.fitted_by_nobody"])
def test_a_name_that_is_not_there_is_noticed(name: str):
    with pytest.raises((ImportError, AttributeError)):
        resolve(name)
