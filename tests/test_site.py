"""The documentation site, without building it: its side bar, its reference and what conf.py does to the pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import laplace_kf as lk
from docs import conf
from tests.test_documentation import imported
from tests.test_pages import anchor

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
LISTED = [page for pages in conf.NAVIGATION.values() for page in pages]
DIRECTIVE = re.compile(r"^\.\. auto(module|class|function):: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)
# What others build upon besides what `lk` itself names: rules of one's own, and the parts of a prediction.
FURTHER = ("estimators", "gaussian", "layers", "ood", "operators", "predictive", "registry", "structures")


def test_the_side_bar_lists_every_page_once() -> None:
    assert sorted(LISTED) == sorted(WRITTEN), "docs/conf.py: NAVIGATION"


def test_the_side_bar_ends_the_first_page() -> None:
    source = ["# Title\n"]
    conf.read(None, conf.root_doc, source)
    assert source[0].count("```{toctree}") == len(conf.NAVIGATION)
    listed = re.findall(r"^[\w/]+$", source[0], re.MULTILINE)
    assert listed == [page for page in LISTED if page != conf.root_doc]


def test_links_out_of_the_folder_become_pages_or_text() -> None:
    source = [
        "[how](../CONTRIBUTING.md) [`ran`](../examples/continual.py) [here](methods.md#1-notation-and-conventions)"
    ]
    conf.read(None, "architecture", source)
    assert source[0] == "[how](contributing.md) `ran` [here](methods.md#1-notation-and-conventions)"
    source = ["[what](../../CHANGELOG.md) [up](../methods.md)"]
    conf.read(None, "tutorials/regression", source)
    assert source[0] == "[what](../changelog.md) [up](../methods.md)"


def test_citations_of_sections_become_links() -> None:
    lines = ["as in (methods 9.1) and methods \x39\x39.9"]
    conf.cite(None, "class", "name", None, None, lines)
    (heading,) = re.findall(r"^### (9\.1 .*)$", (DOCS / "methods.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert lines == [f"as in (`methods 9.1 <../methods.html#{anchor(heading)}>`__) and methods \x39\x39.9"]


def test_letters_of_formulas() -> None:
    found = conf.LETTERS.sub(conf.character, r"\mathbb R, \mathbb{E}, \mathcal L, \mathcal{MN}, \mathrm{tr}")
    assert found == r"{ℝ}, {𝔼}, {ℒ}, {ℳ𝒩}, \mathrm{tr}"


def documented() -> dict[str, set[str]]:
    """By module: the names that a page of the reference has, ``*`` for all of ``__all__``, and ``-name`` left out."""
    found: dict[str, set[str]] = {}
    for page in (DOCS / "reference").glob("*.md"):
        for kind, target, options in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if kind == "module":
                assert ":imported-members:" in options, f"{page.name}: {target} passes on names of its files"
                left = re.search(r":exclude-members: (.*)", options)
                out = {f"-{name.strip()}" for name in left[1].split(",")} if left else set()
                found.setdefault(target, set()).update({"*"} | out)
            else:
                module, _, name = target.rpartition(".")
                found.setdefault(module, set()).add(name)
    return found


DOCUMENTED = documented()


def reached(module: str, name: str, value: object) -> bool:
    """Whether a name of a module is in the reference, there or at another place of the same object."""
    for place, names in DOCUMENTED.items():
        if name in names or ("*" in names and f"-{name}" not in names):
            held = imported(place)
            listed = name in getattr(held, "__all__", ()) if "*" in names and name not in names else True
            if listed and getattr(held, name, None) is value:
                return True
    return False


def public() -> Iterator[str]:
    yield "laplace_kf"
    yield from (f"laplace_kf.{name}" for name in FURTHER)
    for name in lk.__all__:
        if isinstance(getattr(lk, name), ModuleType):
            yield f"laplace_kf.{name}"
    yield from (f"laplace_kf.bridges.{name}" for name in lk.bridges.__all__)


@pytest.mark.parametrize("name", sorted(set(public())))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = imported(name)
    values = {each: getattr(module, each) for each in getattr(module, "__all__", ()) if each != "__version__"}
    wanted = {each: value for each, value in values.items() if isinstance(value, FunctionType | type)}
    missing = [each for each, value in wanted.items() if not reached(name, each, value)]
    assert not missing, f"docs/reference has no {', '.join(missing)} of {name}"


def test_the_reference_names_what_there_is() -> None:
    for place, names in DOCUMENTED.items():
        module = imported(place)
        assert all(hasattr(module, name.lstrip("-")) for name in names - {"*"}), place
