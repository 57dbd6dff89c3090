"""What a release is made of agrees with itself, and the mutants of ``make mutate`` are still where they were."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import laplace_kf as lk
from tests.mutation.__main__ import NEAREST
from tests.mutation.mutants import Mutant, by_name, mutants
from tests.packaging.matrix import QUICK, ROWS

ROOT = Path(__file__).resolve().parents[2]
APART = ("all", "bridges_torchvision")


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {lk.__version__}\n" in citation
    assert re.fullmatch(r"\d+\.\d+\.\d+", lk.__version__)


def test_the_matrix_begins_with_the_oldest_that_is_supported() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    oldest, torch, transformers = ROWS[0]
    assert f"{transformers.removesuffix('.*').replace('==', '>=')}\n" in config["options.extras_require"]["test"]
    assert config["options"]["python_requires"] == f">={oldest}"
    wanted = next(line for line in config["options"]["install_requires"].split() if line.startswith("torch"))
    assert torch == wanted.replace(">=", "==") + ".*"
    assert all((ROOT / path).exists() for path in QUICK)


def test_extras_resolve_to_names_that_are_there() -> None:
    """``all`` is made of the other extras but what needs a torchvision, whose wheel fits one build of torch only."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    every = {line for name in extras if name not in APART for line in extras[name].split("\n") if line.strip()}
    assert {line for line in extras["all"].split("\n") if line.strip()} == every


def test_named_mutants_are_still_there() -> None:
    found = by_name()  # each stands once in its file
    assert len(found) >= 13
    for mutant, tests in found.items():
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.apply(source) != source
        assert all((ROOT / path).exists() for path in tests)


@pytest.mark.parametrize("folder", NEAREST)
def test_mutants_can_be_made(folder: str) -> None:
    """Every mutant is a change of its file that still parses, and no two are the same."""
    assert all((ROOT / path).exists() for path in NEAREST[folder])
    for path in sorted((ROOT / "laplace_kf" / folder).glob("*.py"))[:3]:
        source, seen = path.read_text(encoding="utf-8"), set[Mutant]()
        for mutant in mutants(path):
            assert mutant not in seen
            seen.add(mutant)
            changed = mutant.apply(source)
            assert changed != source
            compile(changed, mutant.key, "exec")
