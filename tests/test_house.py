"""The pages for those who change the package tell the truth: ranks, trails, long files."""

from __future__ import annotations

import ast
import re

import pytest

from docs.ranks import PICTURE, drawn, ranks
from tests.test_architecture import ROOT, python_files

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LONG = 500


def section(title: str) -> str:
    """The text under a heading of the architecture page, down to the next heading of the same level or above."""
    level, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", PAGE, re.MULTILINE | re.DOTALL).groups()  # type: ignore[union-attr]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """The rows of the tables under a heading, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "`" in line]


def defined(source: str) -> set[str]:
    """Qualified names of the classes and functions of a file."""
    found: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return found


def test_the_picture_of_the_ranks_is_up_to_date() -> None:
    assert PICTURE.read_text(encoding="utf-8") == drawn(ranks()), "run python docs/ranks.py"


def test_every_rank_is_described() -> None:
    told = {name for row in rows("Ranks") for name in re.findall(r"`(\w+)`", row[0])}
    assert told == {name for rank in ranks() for name in rank}


@pytest.mark.parametrize("trail", ["fit", "predict", "tune", "update", "step"])
def test_trails_resolve(trail: str) -> None:
    steps = rows(trail)
    assert len(steps) > 5
    for file, function, what in steps:
        path = ROOT / file.strip("`")
        assert path.is_file(), f"{trail}: {file} is not there"
        name = function.strip("`")
        assert name in defined(path.read_text(encoding="utf-8")), f"{trail}: {file} has no {name}"
        assert what


def test_long_files_say_why() -> None:
    told = {row[0].strip("`") for row in rows("Files above 500 lines")}
    folders = ("laplace_kf", "experiments", "benchmarks", "examples", "tests", "docs")
    long = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in python_files(ROOT / folder)
        if len(path.read_text(encoding="utf-8").splitlines()) > LONG
    }
    assert not long - told, f"longer than {LONG} lines: split them, or say why in docs/architecture.md"
    assert all((ROOT / file).is_file() for file in told)


def test_nested_functions_and_methods_are_found() -> None:
    assert defined("class A:\n    def f(self):\n        def g(): pass\ndef h(): pass\n") == {"A", "A.f", "A.f.g", "h"}
