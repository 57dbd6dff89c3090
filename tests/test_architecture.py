"""The rules that keep the package in shape, checked on its source instead of being left to reviewers' eyes."""

from __future__ import annotations

import ast
import configparser
import importlib
import os
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import laplace_kf
from laplace_kf.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "laplace_kf"
# Folders of interchangeable rules: one file per likelihood, layer family, estimator, structure.
RULE_FOLDERS = ("likelihoods", "layers", "estimators", "structures")
# What the files of such a folder may import from it: its base classes, and the types that every likelihood returns.
SHARED = {
    "base",
    "drawing",
    "elementwise",
    "joined",
    "mixed",
    "noise",
    "normal",
    "predicting",
    "prediction",
    "reading",
    "roots",
}
# Registered names that are also values of an option of another kind: `damping="exact"` is no estimator.
OTHER_OPTIONS = {"damping": {"exact"}}
CLOCKS = re.compile(r"(perf_counter|process_time|thread_time|monotonic)(_ns)?|timeit|default_timer|time_ns")
# A slash in front, so that words, URLs and relative paths that end in one of the names do not count.
MACHINE_PATH = re.compile(r"(?<![\w./:-])/(?:work|root|home|Users)/")


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def repository_files() -> Iterator[Path]:
    """Every file of the checkout except hidden folders (but .ci), caches, build products and results."""
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if (not name.startswith(".") or name == ".ci")
            and not name.endswith(".egg-info")
            and name not in {"__pycache__", "build", "dist", "results"}
        ]
        yield from (Path(directory, name) for name in files if name != ".git")  # a file in worktrees


def imported_modules(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of everything that ``module`` imports, relative imports resolved.

    ``from a.b import c`` yields both ``a.b`` and ``a.b.c``, because the source does not tell whether c is a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def sibling_imports(source: str, module: str, siblings: set[str]) -> list[str]:
    """Imports by ``module`` of a sibling file of its folder that is not shared."""
    folder, _, own = module.rpartition(".")
    forbidden = {f"{folder}.{name}" for name in siblings - SHARED - {own}}
    found = {(line, name) for line, name in imported_modules(ast.parse(source), module) if name in forbidden}
    return [f"{module}:{line} imports {name}" for line, name in sorted(found)]


def name_comparisons(source: str, names: set[str]) -> list[int]:
    """Lines that compare something with one of ``names``, by ``==``, ``!=``, ``in``, ``not in`` or ``match``."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            if not all(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops):
                continue
        elif isinstance(node, ast.Match):
            operands = [node.subject, *(case.pattern for case in node.cases)]
        else:
            continue
        subjects = {getattr(operand, "attr", getattr(operand, "id", "")) for operand in operands}
        others = set().union(*(OTHER_OPTIONS.get(subject, set()) for subject in subjects))
        # A literal collection counts ("x in ('kron', 'full')"), the arguments of a call do not.
        literals = {
            part.value
            for operand in operands
            if not isinstance(operand, ast.Call | ast.Subscript | ast.Dict | ast.JoinedStr | ast.ListComp)
            for part in ast.walk(operand)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        }
        if literals & (names - others):
            lines.append(node.lineno)
    return lines


def clock_readings(source: str) -> list[int]:
    """Lines that read a clock (or import a function that does)."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            reads = bool(CLOCKS.fullmatch(node.attr)) or (
                node.attr == "time" and isinstance(node.value, ast.Name) and node.value.id == "time"
            )
        elif isinstance(node, ast.ImportFrom):
            reads = node.module in {"time", "timeit"} and any(alias.name != "sleep" for alias in node.names)
        elif isinstance(node, ast.Import):
            reads = any(alias.name == "timeit" for alias in node.names)
        else:
            continue
        if reads:
            lines.append(node.lineno)
    return lines


def registered_names() -> set[str]:
    """The names in every registry of the package that holds likelihoods, estimators or structures."""
    names: dict[str, set[str]] = {}
    for info in pkgutil.walk_packages(laplace_kf.__path__, "laplace_kf."):
        if info.name.endswith("__main__") or info.name.startswith("laplace_kf.bridges."):  # other libraries
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, Registry):
                names.setdefault(value.kind, set()).update(value)
    missing = {"likelihood", "estimator", "structure"} - {kind for kind, entries in names.items() if entries}
    assert not missing, f"no registry (or an empty one) of kind {sorted(missing)}; kinds found: {sorted(names)}"
    return names["likelihood"] | names["estimator"] | names["structure"]


def test_modules_import_only_from_lower_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "setup.cfg"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("folder", RULE_FOLDERS)
def test_rules_of_one_folder_do_not_know_each_other(folder: str):
    files = {path.stem: path for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}
    assert "base" in files, f"laplace_kf/{folder}/base.py holds what the files of that folder share"
    found = [
        line
        for stem, path in files.items()
        for line in sibling_imports(path.read_text(encoding="utf-8"), f"laplace_kf.{folder}.{stem}", set(files))
    ]
    assert not found, "what two rules share belongs in base.py or in a lower rank:\n" + "\n".join(found)


@pytest.mark.parametrize("folder", RULE_FOLDERS)
def test_what_others_of_a_folder_of_rules_import_has_its_place_in_the_contract(folder: str):
    """These contracts are not exhaustive, so that a new rule needs no line; nothing else of the folder is left out."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    section = f"importlinter:contract:{folder}"
    files = {path.stem: path for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"}
    if not config.has_section(section):
        assert len(files) <= 8, f"laplace_kf/{folder} has grown: give it a contract in setup.cfg"
        return
    listed = set(re.findall(r"\w+", config[section]["layers"]))
    imported = {
        name.removeprefix(f"laplace_kf.{folder}.").split(".")[0]
        for stem, path in files.items()
        for _, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), f"laplace_kf.{folder}.{stem}")
        if name.startswith(f"laplace_kf.{folder}.")
    }
    assert imported & set(files), "this test found no import"
    assert not imported & set(files) - listed, "to be listed in setup.cfg"
    assert not listed - set(files), "no such file"


def test_package_does_not_import_what_is_not_installed():
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(PACKAGE)
        for line, name in imported_modules(
            ast.parse(path.read_text(encoding="utf-8")), ".".join(path.relative_to(ROOT).with_suffix("").parts)
        )
        if name.split(".")[0] in {"experiments", "benchmarks", "tests"}
    ]
    assert not found, "\n".join(found)


def test_names_are_looked_up_never_compared():
    names = registered_names()
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files(PACKAGE)
        for line in name_comparisons(path.read_text(encoding="utf-8"), names)
    ]
    assert not found, "compares a registered name; ask the object that the registry returns:\n" + "\n".join(found)


def test_no_test_depends_on_wall_time():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files(ROOT / "tests")
        # commands with a time limit of their own, and what --cpu shows: no tests
        if path.parent.name != "mutation" and path.name not in ("meter.py", "matrix.py")
        for line in clock_readings(path.read_text(encoding="utf-8"))
    ]
    assert not found, "reads a clock; count calls or sizes instead, timings belong in benchmarks/:\n" + "\n".join(found)


def test_no_paths_of_one_machine():
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), start=1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "names a folder of somebody's machine:\n" + "\n".join(found)


# The checks themselves, on code that breaks (or only seems to break) each rule.


@pytest.mark.parametrize(
    "line",
    [
        "from laplace_kf.structures.kron import KronMatrix",
        "from laplace_kf.structures import kron",
        "from . import kron",
        "from .kron import KronMatrix",
        "import laplace_kf.structures.kron",
    ],
)
def test_sibling_imports_are_seen(line: str):
    assert sibling_imports(line, "laplace_kf.structures.ekfac", {"base", "kron", "ekfac"})


@pytest.mark.parametrize(
    "line",
    ["from laplace_kf.structures.base import Matrix", "from .base import Matrix", "from laplace_kf import engine"],
)
def test_allowed_imports_pass(line: str):
    assert not sibling_imports(line, "laplace_kf.structures.ekfac", {"base", "kron", "ekfac", "engine"})


@pytest.mark.parametrize(
    "code",
    [
        "structure == 'kron'",
        "'kron' != self.structure",
        "x in ('kron', 'other')",
        "estimator == 'exact'",
        "match s:\n    case 'kron' | 'diag':\n        pass",
    ],
)
def test_name_comparisons_are_seen(code: str):
    assert name_comparisons(code, {"kron", "exact"})


@pytest.mark.parametrize(
    "code", ["space == 'weights'", "damping == 'exact'", "f('kron') == 3", "d['kron'] == 3", "structure = 'kron'"]
)
def test_other_comparisons_pass(code: str):
    assert not name_comparisons(code, {"kron", "exact"})


@pytest.mark.parametrize(
    "code",
    ["time.time()", "time.perf_counter()", "from time import perf_counter", "import timeit", "time.monotonic_ns()"],
)
def test_clocks_are_seen(code: str):
    assert clock_readings(code)


def test_machine_paths_are_told_from_other_paths():
    slash = "/"
    assert MACHINE_PATH.search(f'open("{slash}root{slash}x")')
    assert not MACHINE_PATH.search("https://example.org/work/x ../shared/work/x network/root/")
