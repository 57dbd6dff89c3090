"""The documentation site, without building it: its side bar, its reference and what conf.py does to the pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

import laplace_kf as lk
from benchmarks import migrating
from docs import conf
from experiments import site_tables
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


def test_the_reference_leaves_out_what_other_libraries_made() -> None:
    for other in (Exception.with_traceback, torch.nn.Module.to):
        assert conf.skip(None, "method", "name", other, False, None)
    for ours in (lk.LaplacePosterior.fit, lk.LaplacePosterior.mean, lk.continual.EWC):
        assert conf.skip(None, "method", "name", ours, False, None) is None


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
        if place != module and ".bridges." in place:
            continue  # imports another library
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
        if isinstance(getattr(lk, name), ModuleType) and name != "bridges":  # each of them is asked below
            yield f"laplace_kf.{name}"
    yield from (f"laplace_kf.bridges.{name}" for name in lk.bridges.__all__)


@pytest.mark.parametrize("name", sorted(set(public())))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = imported(name)
    values = {each: getattr(module, each) for each in getattr(module, "__all__", ()) if each != "__version__"}
    wanted = {each: value for each, value in values.items() if isinstance(value, FunctionType | type)}
    missing = [each for each, value in wanted.items() if not reached(name, each, value)]
    assert not missing, f"docs/reference has no {', '.join(missing)} of {name}"


@pytest.mark.parametrize("place", sorted(DOCUMENTED))
def test_the_reference_names_what_there_is(place: str) -> None:
    module = imported(place)
    assert all(hasattr(module, name.lstrip("-")) for name in DOCUMENTED[place] - {"*"})


# Tables of measured numbers: what is lost is said.


def test_the_slower_one_is_marked() -> None:
    assert site_tables._factor(1.0, 3.0) == "3.0 times faster"
    assert site_tables._factor(3.0, 1.0) == "**3.00 times slower**"


def test_aims_that_were_missed_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"a": {"met": {"x": True}, "limits": {"x": 2}}, "b": {"met": {"y": False}}, "c": {"met": False}}
    for name in results:
        (tmp_path / f"{name}.json").write_text("{}")
    monkeypatch.setattr(site_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(site_tables, "_benchmark", results.__getitem__)
    text, *_, first, second, third = site_tables.aims().splitlines()
    assert text == "1 of 3 aims are reached; the others come first."
    assert first == "| `b` | y |  | **missed** |"
    assert second == "| `c` | the whole benchmark |  | **missed** |"
    assert third == "| `a` | x | 2 | reached |"


def test_a_better_peer_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"laplace_kf": {"mean": -0.1}, "laplace-torch, marglik": {"mean": 0.0}}
    found["laplace-torch, gridsearch"] = {"mean": -0.2}
    result = {"comparisons": {"set": found}, "machine": {"cpu": "c", "cores": 2}, "versions": {"torch": "t"}}
    monkeypatch.setattr(site_tables, "_result", lambda path: result)
    assert site_tables.quality().splitlines()[-1] == "| set | -0.1000 | +0.0000 | -0.2000 **lower** |"


def test_numbers_beside_laplace_torch_are_still_ours() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "migrating.json").read_text(encoding="utf-8"))["cases"]
    assert [(c["kind"], c["parameters"], c["structure"], c["bias"]) for c in recorded] == migrating.CASES
    for case, row in zip(migrating.CASES, recorded, strict=True):
        evidence, covariance = migrating.ours(*case)
        assert evidence == pytest.approx(row["evidence"], rel=1e-8)
        assert float(covariance[0, 0, 0]) == pytest.approx(row["variance"], rel=1e-8)
        # A bias is a column of its weight here and a block of its own there: only this tells them apart.
        alike = abs(row["their_evidence"] / evidence - 1) < migrating.ALIKE
        assert alike == row["alike"] == (case[2:] != ("kron", True))


def test_the_comparison_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrating, "CASES", migrating.CASES[:1])
    result = migrating.run(peer=migrating.ours)
    assert all(case["alike"] for case in result["cases"])

    def off(*case: object) -> tuple[float, torch.Tensor]:
        evidence, covariance = migrating.ours(*case)  # type: ignore[arg-type]
        return evidence, covariance * (1 + 1e-6)

    assert not any(case["alike"] for case in migrating.run(peer=off)["cases"])
