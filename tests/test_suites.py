"""docs/suites.md names every suite and file of tests as they are; its numbers are as old as its last making."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from docs.suites import KINDS, PAGE, ROOT, about, files, kinds, page, suite
from tests import conftest


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_suite_and_file_is_on_the_page_in_its_own_words() -> None:
    found = dict(re.findall(r"^\| `(tests/\S+\.py)` \| [\d,]+ \| (.*) \|$", text(), re.MULTILINE))
    assert found == {str(path.relative_to(ROOT)): about(path) for path in files()}, "run python docs/suites.py"
    assert all(found.values()), "a file of tests says in its first line what it is about"
    assert all(f"| `tests/{suite(path)}` |" in text() for path in files()), "run python docs/suites.py"


def test_every_kind_has_tests_and_the_page_adds_up() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| ([\d,]+) \|", text(), re.MULTILINE))
    counts = {name: int(rows[name].replace(",", "")) for name in KINDS}
    assert min(counts.values()) > 0
    assert sum(counts.values()) == int(re.search(r"collects: ([\d,]+) tests", text())[1].replace(",", ""))  # type: ignore[index]


def test_the_page_counts_what_was_collected() -> None:
    """Each test function once: what the page says then is what its source says."""
    once = Counter((str(path.relative_to(ROOT)), name) for path in files() for name in kinds(path))
    made = page(once)
    total = sum(once.values())
    assert f"collects: {total:,} tests of {total:,}" in made
    mine = str(Path(__file__).relative_to(ROOT))
    assert f"| `{mine}` | {len(kinds(ROOT / mine))} |" in made


@pytest.mark.parametrize("everything", [False, True])
def test_a_share_of_long_lists_runs_and_all_where_all_are_asked_for(everything: bool) -> None:
    class Item:
        def __init__(self, name: str, *marks: pytest.Mark) -> None:
            self.name, self.nodeid = name, f"file.py::{name}"
            self.get_closest_marker = {mark.name: mark for mark in marks}.get

    half = pytest.mark.share(2).mark
    items: list[Any] = [*(Item(f"long[{k}]", half) for k in range(100)), Item("alone[0]", half)]
    items += [Item("other[0]"), Item("other[1]")]
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: everything and name == "--triples", hook=hook)
    before = list(items)
    conftest.pytest_collection_modifyitems(config, items)
    assert sorted(map(id, items + left_out)) == sorted(map(id, before))
    assert len(left_out) == 0 if everything else 35 < len(left_out) < 65
    assert {one.name for one in items} >= {"alone[0]", "other[0]", "other[1]"}
