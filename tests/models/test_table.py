"""The rows of docs/models.md whose package is installed: every one fits and is exact."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.models import measure as measuring
from benchmarks.models.measure import measure
from benchmarks.models.problem import Problem, Row, rows
from benchmarks.models.torchvision import torchvision_or_standin

HERE, OUT = rows()
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
INSIDE_FLOAT32 = 1e-6  # models that compute RMSNorm or rotary positions in float32 whatever their type


@pytest.mark.share(2)
@pytest.mark.parametrize("row", HERE, ids=lambda row: f"{row.package}-{row.name}")
def test_fits_and_is_exact(row: Row) -> None:
    result = measure(row, costs=False)
    assert not result.refused
    assert result.error is not None and result.error < INSIDE_FLOAT32
    assert result.parameters > 0


def test_the_error_that_is_reported_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in HERE if row.package == "torch")
    reference = measuring.reference
    monkeypatch.setattr(measuring, "reference", lambda *args: 1.01 * reference(*args))
    assert measure(row, costs=False).error == pytest.approx(0.01 / 1.01)


def test_a_model_that_does_not_fit_is_reported_with_its_error() -> None:
    def make() -> Problem:
        return Problem(torch.nn.Linear(2, 3), (torch.randn(4, 2), torch.randn(5, 3)), "gaussian")

    result = measure(Row("torch", "targets of another length", make), costs=False)
    assert result.error is None and "ShapeMismatch" in result.refused


def test_the_rows_that_were_left_out_are_counted() -> None:
    assert len(HERE) + len(OUT) >= 40
    if OUT:
        missing = ", ".join(sorted({row.package for row in OUT}))
        pytest.skip(f"{len(OUT)} of {len(HERE) + len(OUT)} rows left out, as {missing} are not installed")


def test_the_page_has_every_row_and_none_failed() -> None:
    lines = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| package")
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {(c[0], c[1]) for c in cells} == {(row.package, row.name) for row in HERE + OUT}
    assert len(cells) >= 40
    for package, name, _, fits, error, *_ in cells:
        assert fits == "yes", f"{package}, {name}: {fits}"
        assert re.fullmatch(r"\de-\d\d", error) and float(error) < INSIDE_FLOAT32


def test_nothing_of_the_stand_in_for_torchvision_stays() -> None:
    before = list(sys.meta_path)
    with torchvision_or_standin() as real:
        import torchvision

        assert real or torchvision.__version__ == "0.0.0+standin"
    assert sys.meta_path == before
    assert real or "torchvision" not in sys.modules
