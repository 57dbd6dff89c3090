"""Every registered rule keeps the contract: all pairs of rules in each run, all triples with ``--triples``."""

from __future__ import annotations

from pathlib import Path

import pytest

from laplace_kf.tape.tracer import Tracer
from tests.contracts.contract import FACTORS, owes, plainest, problem, taken
from tests.contracts.design import covering

NAMES = {factor: list(found) for factor, found in FACTORS.items()}
PLAIN = plainest(NAMES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = covering(NAMES, 3 if metafunc.config.getoption("--triples") else 2)
        metafunc.parametrize("row", rows, ids=["-".join(row.values()) for row in rows])


def test_contract(row: dict[str, str], tmp_path: Path) -> None:
    owes(problem(**row), tmp_path)


@pytest.mark.parametrize("factor", NAMES)
def test_nothing_is_only_ever_refused(factor: str) -> None:
    """A refusal is a choice for a pair; a rule that is refused with the plainest partners would never be tested.

    What it owes in such pairs is checked above.
    """
    for name in NAMES[factor]:
        assert taken(problem(**{**PLAIN, factor: name})) is not None, name


@pytest.mark.parametrize("name", NAMES["layer"])
def test_layer_rules_run_on_their_own_examples(name: str) -> None:
    """And pass the check against autograd there: a wrong rule falls back, and all numbers stay right."""
    made = problem(**{**PLAIN, "layer": name})
    tracer = Tracer(made.model, None)
    calls = tracer.observe((made.x, made.y)).calls
    mine = {part for call in calls if call.rule.name == name.split(".")[0] for part in call.names}
    assert mine, f"no call of {name} was recorded"
    assert not {part for block in tracer.example_wise for part in tracer.blocks[block].parameters} & mine


def test_designs_cover_every_choice() -> None:
    factors = {"a": ["1", "2", "3"], "b": ["x", "y"], "c": ["p", "q", "r", "s"], "d": ["m", "n"]}
    for strength in (2, 3):
        rows = covering(factors, strength)
        assert len(rows) < 3 * 2 * 4 * 2
        for first in factors:
            for second in factors:
                for a in factors[first]:
                    for b in factors[second]:
                        assert first == second or any(row[first] == a and row[second] == b for row in rows)
    triples = {(row["a"], row["b"], row["c"]) for row in covering(factors, 3)}
    assert len(triples) == 3 * 2 * 4
