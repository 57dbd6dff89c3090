"""No circle of imports of any kind: at import time, deferred inside functions, or for types only."""

from __future__ import annotations

import ast
import configparser
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, RULE_FOLDERS, python_files

Graph = dict[str, dict[str, int]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: Path) -> Graph:
    """Who imports whom inside a package, with the line. ``from a import b`` means ``a.b`` where that is a module."""
    files = {module_name(path, package.parent): path for path in python_files(package)}
    graph: Graph = {name: {} for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [
                    full if (full := f"{node.module}.{alias.name}") in files else node.module for alias in node.names
                ]
            graph[name].update({target: node.lineno for target in found if target in files and target != name})
    return graph


def circles(graph: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """The strongly connected sets of two or more modules (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in graph:
        if name not in index:
            visit(name)
    return found


@pytest.mark.parametrize("package", ["laplace_kf", "experiments", "benchmarks"])
def test_no_circles(package: str):
    graph = import_graph(ROOT / package)
    told = [
        "\n".join(f"  {a}:{line} imports {b}" for a in members for b, line in graph[a].items() if b in members)
        for members in circles(graph)
    ]
    assert not told, "circles of imports:\n" + "\n\n".join(told)


MANY = 8  # files of a folder from which their order is a contract of its own


def test_large_folders_have_an_order_inside():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    ordered = {
        config[name]["containers"].strip(): set(re.split(r"[|:\s]+", config[name]["layers"].strip()))
        for name in config.sections()
        if name.startswith("importlinter:contract:")
    }
    for folder in sorted({path.parent for path in python_files(ROOT / "laplace_kf")}):
        names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        package = module_name(folder / "__init__.py", ROOT)
        if len(names) > MANY and folder.name not in RULE_FOLDERS:  # whose files do not know each other
            assert package in ordered, f"{package} has {len(names)} files: give it a contract in setup.cfg"
    for package, names in ordered.items():
        for name in names:
            path = ROOT.joinpath(*package.split("."), name)
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{package}.{name} is not there"


def test_circles_of_every_kind_are_seen(tmp_path: Path):
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("from house.a import x\n")
    (package / "a.py").write_text("def f():\n    from house import b\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.a import f\n")
    (package / "c.py").write_text("import house.a\n")
    graph = import_graph(package)
    assert circles(graph) == [["house.a", "house.b"]]
    assert graph["house.b"] == {"house.a": 3}
