"""The pages for those who change the package tell the truth: ranks, trails, long files."""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import NAMES as BENCHMARKS
from docs.ranks import PICTURE, drawn, ranks, with_table
from experiments.registry import EXPERIMENTS
from tests.checks import of_every
from tests.contracts.toys import FOLDER, unregistered
from tests.test_architecture import ROOT, python_files
from tests.test_documentation import PYTHON_BLOCK
from tests.workers import _heard

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
    assert with_table(PAGE, ranks()) == PAGE, "run python docs/ranks.py"
    assert [row[1].strip("`") for row in rows("Ranks")] == [name for rank in ranks() for name in rank]
    assert all(row[2] for row in rows("Ranks"))


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


# ------------------------------------------------------------------------------------------------ CONTRIBUTING.md

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks() -> dict[str, list[str]]:
    """The python blocks of CONTRIBUTING.md by the heading they stand under."""
    parts = re.split(r"^#+ (.*)$", CONTRIBUTING, flags=re.MULTILINE)
    found = {title: PYTHON_BLOCK.findall(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {title: code for title, code in found.items() if code}


@pytest.mark.parametrize(
    ("title", "toy"),
    [("layer rule", "layer"), ("estimator",) * 2, ("structure",) * 2, ("likelihood",) * 2],
)
def test_rules_are_walked_through_with_the_toys_that_keep_the_contract(title: str, toy: str) -> None:
    article = "an" if title[0] in "aeiou" else "a"
    assert blocks()[f"Add {article} {title}"] == [(FOLDER / f"{toy}.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("title", ["Add a preset", "Add a bridge", "Add an experiment"])
def test_other_examples_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(EXPERIMENTS._entries)
    module = types.ModuleType("contributed")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    try:
        with unregistered(), torch.random.fork_rng():
            torch.manual_seed(0)
            for code in blocks()[title]:
                exec(compile(code, f"CONTRIBUTING.md, {title}", "exec"), vars(module))
    finally:
        EXPERIMENTS._entries.clear()
        EXPERIMENTS._entries.update(before)


def test_every_kind_of_addition_is_walked_through() -> None:
    assert len(blocks()) == 7


def test_commands_and_files_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", CONTRIBUTING)) <= targets
    for name in re.findall(r"`((?:laplace_kf|experiments|tests|docs|configs)/[\w/]+(?:\.py|\.md)?)`", CONTRIBUTING):
        assert (ROOT / name).exists(), name
    file, test = re.findall(r'"(tests/[\w/]+\.py)::(\w+)"', CONTRIBUTING)[0]
    assert test in defined((ROOT / file).read_text(encoding="utf-8"))


def test_pre_commit_runs_what_make_lint_runs() -> None:
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    wanted = re.findall(r"\$\(BIN\)/(.*)", lint)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [hook.replace(" --force-exclude", "") for hook in hooks] == [line.removesuffix(" .") for line in wanted]


def test_benchmarks_that_pages_name_exist_and_every_benchmark_runs_by_its_name() -> None:
    folder = ROOT / "benchmarks"
    written = {p.stem for p in folder.glob("*.py") if {"run", "text"} <= defined(p.read_text(encoding="utf-8"))}
    assert set(BENCHMARKS) == written
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"python -m benchmarks (\w+)", text))
    assert named and named <= written
    assert {path.stem for path in (folder / "results").glob("*.json")} <= written


def test_what_is_raised_is_typed() -> None:
    """Users catch ``lk.errors.LaplaceKFError``; what stays a plain error is for whoever extends the package."""
    plain = re.compile(r"raise ([A-Z]\w*(?:Error|Exception))\b")
    found = {}
    for path in sorted((ROOT / "laplace_kf").rglob("*.py")):
        names = set(plain.findall(path.read_text(encoding="utf-8"))) & set(dir(builtins))
        if names:
            found[path.relative_to(ROOT / "laplace_kf").as_posix()] = names
    assert found == {
        "__init__.py": {"AttributeError"},  # dunders
        "members.py": {"AttributeError"},  # likewise
        "distributed/assignment.py": {"ValueError"},  # internal: costs of blocks
        "engine.py": {"ValueError"},  # of a checkpoint: becomes CorruptFile
        "files.py": {"OSError"},  # becomes UnusableFile
        "layers/base.py": {"ValueError"},  # registering a rule twice
        "likelihoods/base.py": {"ValueError"},  # of a file: becomes CorruptFile
        "likelihoods/distribution.py": {"NotImplementedError"},  # abstract, not reached
        "likelihoods/loss.py": {"NotImplementedError"},  # likewise
        "operators/curvature.py": {"KeyError"},  # a mapping's own
        "posterior/store.py": {"ValueError"},  # of a file: becomes CorruptFile
        "registry.py": {"ValueError"},  # registering a name twice
        "structures/auto.py": {"AssertionError"},  # not reached
        "tape/examples.py": {"RuntimeError"},  # caught beside: falls back to loops
    }


def test_a_loop_over_cases_looks_at_all_and_names_those_that_fail() -> None:
    seen: list[int] = []

    def case(number: int) -> None:
        seen.append(number)
        if number == 2:  # what pytest itself raises is no Exception
            with pytest.raises(ValueError, match="nothing"):
                pass
        assert number != 4, "an even one"
        if number == 5:
            raise KeyError("lost")

    with pytest.raises(AssertionError) as found:
        of_every(case, [1, 2, 3, 4, 5, 6])
    assert seen == [1, 2, 3, 4, 5, 6]
    named = [line.split(":")[0] for line in str(found.value).splitlines() if line[:1].isdigit()]
    assert named == ["3 of 6 fail", "2", "4", "5"]
    of_every(case, [1, 3])
    with pytest.raises(AssertionError, match="no case"):
        of_every(case, [])


def test_processes_leave_out_only_what_says_nothing() -> None:
    """pytest itself makes the reports: passed, failed and skipped, at each stage, with and without words."""
    sent: list[str] = []
    tell = _heard(lambda name, **content: sent.append(name + content.get("data", {}).get("nodeid", "")))
    for name in ("logstart", "logfinish", "runtest_protocol_complete", "warning_recorded", "workerfinished"):
        tell(name)
    for when, outcome, measured, printed in itertools.product(
        ("setup", "call", "teardown"), ("passed", "failed", "skipped"), ([], [("cpu", 1.0)]), ([], [("stdout", "a")])
    ):
        report = pytest.TestReport(f" {when} {outcome} {len(measured)} {len(printed)}", ("", 0, ""), {}, outcome, None,  # type: ignore[arg-type]
                                   when, printed, user_properties=measured)  # type: ignore[arg-type]  # fmt: skip
        tell("testreport", data=report._to_json())
    assert sent[:3] == ["runtest_protocol_complete", "warning_recorded", "workerfinished"]
    assert len(sent) == 3 + 36 - 2
    assert not {"testreport setup passed 0 0", "testreport teardown passed 0 0"} & set(sent)


def test_a_process_that_is_handed_tests_tells_less(request: pytest.FixtureRequest) -> None:
    """Of this very run, if it is one of several processes and nobody asked for all that they say."""
    config = request.config
    asks = config.getoption("durations") is not None or config.getoption("xmlpath") or config.getoption("verbose") > 0
    if hasattr(config, "workerinput") and not asks:
        (told,) = [p for p in config.pluginmanager.get_plugins() if type(p).__name__ == "WorkerInteractor"]
        assert told.sendevent.__module__ == "tests.workers"


def test_every_process_that_runs_tests_has_one_thread() -> None:
    """Set in tests/conftest.py, whether tests run here or are handed out."""
    assert torch.get_num_threads() == 1
    assert torch.accelerator.is_available() or torch.manual_seed.__module__ == "tests.conftest"
