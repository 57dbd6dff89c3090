"""The page of all test suites, their kinds and counts, made by pytest's own collection: ``python docs/suites.py``.

What a suite is about is the first line of each of its files; what kind its tests are is read off their source.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "suites.md"
ORACLES = re.compile(r"\b(oracles|dense|jacrev|jacobian|hessian|enumerat|plain loop|float64|double)\w*", re.IGNORECASE)
KINDS = {
    "exact": "numbers beside an independent reference: dense float64 matrices, enumeration, plain loops, closed forms",
    "refusals": "`pytest.raises`: what is not right is refused with the error and the words it should have",
    "unchanged": "nothing of the caller's is changed: weights, modes, buffers, hooks, random states, files",
    "properties": "inputs drawn by hypothesis",
    "processes": "other processes: killed, resumed, several at once, the command line",
    "pages": "what the documentation shows runs, what it says is so, and the house is in order",
    "behaviour": "anything else: what is returned, stored, counted, warned or printed",
}


def files() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


def suite(path: Path) -> str:
    """The folder of a test file, or its name where it stands in ``tests`` itself."""
    inside = path.relative_to(ROOT / "tests").parts
    return f"{inside[0]}/" if len(inside) > 1 else inside[0]


def about(path: Path) -> str:
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"test_documentation", "test_pages", "test_site", "test_house", "test_coverage", "test_architecture",
         "test_circles", "test_page", "test_readme", "test_table", "test_release", "test_suites"}  # fmt: skip


def kind(path: Path, source: str, module: str) -> str:
    """The kind of one test function by what it is made of; the first that fits."""
    if path.stem in PAGES:
        return "pages"
    if "@given" in source:
        return "properties"
    if re.search(r"\bsubprocess\b|\bos\.kill\b|\bspawn|run_processes|multiprocessing|\bmain\(\[", source):
        return "processes"
    if re.search(r"unchanged|untouched|bit.identical|preserved|leaves?_no_trace|snapshot", source):
        return "unchanged"
    if "pytest.raises" in source or "refus" in source.split("(")[0]:
        return "refusals"
    if re.search(r"assert_close|allclose|approx\(|torch\.equal|assert_equal", source) or (
        ORACLES.search(source) and "assert" in source
    ):
        return "exact"
    return "exact" if ORACLES.search(module) and re.search(r"\bcheck|compare|agree", source) else "behaviour"


@cache
def kinds(path: Path) -> dict[str, str]:
    """The kind of each test function of a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            found[node.name] = kind(path, "\n".join(lines[first : node.end_lineno]), ast.get_docstring(tree) or "")
    return found


def collected() -> Counter[tuple[str, str]]:
    """How many tests there are, by file and function, nightly ones too."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    rows = re.findall(r"^(tests/\S+?\.py)::(?:\w+::)?(test_\w+)", done.stdout, re.MULTILINE)
    return Counter(rows)


def page(counts: Counter[tuple[str, str]]) -> str:
    """The page as markdown.

    Args:
        counts: tests by file and function.
    """
    by_suite: dict[str, Counter[str]] = {}
    by_file: Counter[str] = Counter()
    for path in files():
        name = str(path.relative_to(ROOT))
        for function, what in kinds(path).items():
            number = counts[name, function]
            by_suite.setdefault(suite(path), Counter())[what] += number
            by_file[name] += number
    total: Counter[str] = sum(by_suite.values(), Counter())
    functions = sum(len(kinds(path)) for path in files())
    lines = [
        "# Tests: suites, kinds, counts", "",
        f"Made by `python docs/suites.py` from what pytest collects: {sum(total.values()):,} tests of {functions:,}",
        f"test functions in {len(files())} files. The kind of a test is read off its source, the first that fits:", "",
        "| kind | tests | what it is |", "|---|---|---|",
        *(f"| {name} | {total[name]:,} | {what} |" for name, what in KINDS.items()),
        "", "`make test` runs all but those marked `nightly` (long ones), and of some long lists of cases one in two, the",
        "number of which is counted here; `make nightly` runs everything. Beside",
        "them stand `make mutate` ([mutants](mutants.md)), `make test-matrix` ([versions](versions.md)), `make dist`,",
        "`make models`",
        "([third-party models](models.md)) and `make bridges`.", "", "## By suite", "",
        f"| suite | tests | {' | '.join(KINDS)} |", "|---|---|" + "---|" * len(KINDS),
    ]  # fmt: skip
    for name, row in by_suite.items():
        cells = [f"{row[one]:,}" if row[one] else "" for one in KINDS]
        lines.append(f"| `tests/{name}` | {sum(row.values()):,} | {' | '.join(cells)} |")
    lines += ["", "## By file", "", "| file | tests | about |", "|---|---|---|"]
    lines += [
        f"| `{path.relative_to(ROOT)}` | {by_file[str(path.relative_to(ROOT))]:,} | {about(path)} |" for path in files()
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(collected()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
