"""README's tables are what the result files and registries say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments import overview, readme, runner
from experiments.verdicts import VIEWS, counts, entries


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_are_up_to_date(page: str) -> None:
    text = (readme.ROOT / page).read_text()
    assert readme.render(text, page) == text, "run: python -m experiments readme"


def test_every_table_has_a_page() -> None:
    assert {name for names in readme.PAGES.values() for name in names} == set(readme.TABLES)


def test_the_command_of_a_result_names_what_differs_from_the_configuration() -> None:
    usual = asdict(runner.resolve("labels")[1])
    assert runner.command("labels", usual) == "python -m experiments run labels"
    calibration = asdict(runner.resolve("calibration")[1])
    assert runner.command("calibration", {**calibration, "anew": ["MAP"]}) == "python -m experiments run calibration"
    own = {**usual, "most": 130, "methods": ["BatchBALD", "random"], "progress": not usual["progress"], "gone": 1}
    command = runner.command("labels", own)
    assert command == "python -m experiments run labels methods=[BatchBALD,random] most=130"
    _, again = runner.resolve("labels", command.split()[5:])
    assert (again.most, again.methods) == (130, ["BatchBALD", "random"])
    stream = asdict(runner.resolve("continual_permuted_50")[1])
    command = runner.command(
        "continual_permuted_50", {**stream, "methods": ["diagonal online", "Kronecker online, summed"]}
    )
    _, again = runner.resolve("continual_permuted_50", shlex.split(command)[5:])  # as a shell has it
    assert asdict(again) == {**stream, "methods": ["diagonal online", "Kronecker online, summed"]}


def test_a_missing_place_is_reported() -> None:
    with pytest.raises(ValueError, match="ood_mnist"):
        readme.render("no tables here")


def test_the_page_of_all_claims_is_up_to_date_and_finds_its_files() -> None:
    """One entry for each of the 35 experiments, every verdict of every result file, and no dead address."""
    written = readme.ROOT / "docs" / "results" / "index.html"
    text = written.read_text(encoding="utf-8")
    assert readme.report() == written
    assert written.read_text(encoding="utf-8") == text, "run: python -m experiments report"
    assert [f'id="E{number}"' in text for number in range(1, 36)] == [True] * 35
    for address in re.findall(r'(?:src|href)="([^"#]+)"', text):
        assert (written.parent / address).is_file(), address
    assert "../pictures/ood_mnist.png" in text and "../pictures/autoencoders_curves.png" in text


def test_claims_of_every_kind_are_read_from_result_files(tmp_path: Path) -> None:
    """Two methods seed by seed, a number in a range, and a number out of two runs on one problem."""
    shared = {"seed": 0, "wall_time_s": 60.0, "machine": {"cpu": "x", "cores": 1}, "versions": {"torch": "2"}}
    spread = {"mean": 0.5, "std": 0.25}
    pair = {"claim": "a & b", "value": spread, "reference": spread, "difference": {"mean": -1.0, "std": 0.5}}
    single = {"claim": "in range", "value": spread, "published": "0.7", "verdict": "not comparable", "why": "few"}
    run = {"problem": "curves", "claim": "sooner", "method": "K-FAC", "other": "NAG", "value": 0.1, "unit": "of it"}
    run, other = {**run, "verdict": "confirmed"}, {**run, "other": "Adam", "value": None, "verdict": "refuted"}
    files = {
        "ood_mnist": [{**pair, "verdict": "confirmed"}],
        "E3": [{**single, "seeds": "1 of 3"}],
        "autoencoders": [run, other],
    }
    for name, verdicts in files.items():
        result = {**shared, "title": name, "size": "small", "verdicts": verdicts}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = {entry.id: entry for entry in entries(tmp_path)}
    assert len(found) == 35 and found["E5"].result is None and not found["E5"].verdicts
    assert found["E20"].verdicts[0].here == "0.5 against 0.5 (difference -1 ± 0.5)"
    assert (found["E3"].verdicts[0].published, found["E3"].verdicts[0].why) == ("0.7", "few")
    assert [v.verdict for v in found["E14"].verdicts] == ["confirmed", "refuted"]
    assert found["E14"].verdicts[1].here == "never reached"
    assert [v.claim for v in found["E12"].verdicts] == ["CURVES: sooner"]  # E12 does not run Adam
    assert counts([v for entry in found.values() for v in entry.verdicts if entry.id not in VIEWS]) == (
        "2 confirmed, 1 refuted, 1 not comparable"
    )
    text = overview.page(tmp_path, {"ood_mnist": ["../pictures/a.png"]})
    assert "a &amp; b" in text and text.count("../pictures/a.png") == 1 and "not run" in text
