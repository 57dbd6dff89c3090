"""How objects show themselves: one line that says what they are, tables in notebooks, and records for ``logging``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.notebooks import html_table
from laplace_kf.structures import STRUCTURES

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def posterior() -> Any:
    return lk.LaplacePosterior(network(), "categorical", structure="kron").fit((X, Y))


@pytest.fixture
def records() -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.name}: {record.getMessage()}")  # type: ignore[method-assign]
    root = logging.getLogger("laplace_kf")
    before = root.level, logging.root.manager.disable
    for name, logger in logging.root.manager.loggerDict.items():  # other libraries' set-up may have silenced them
        if name.startswith("laplace_kf") and isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.disable(logging.NOTSET)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield found
    root.removeHandler(handler)
    root.setLevel(before[0])
    logging.disable(before[1])


def test_every_object_says_what_it_is_in_one_line(posterior: Any) -> None:
    optimizer = lk.optim.kfac(network(), "categorical")
    optimizer.step((X, Y))
    learner = lk.continual.OnlineLaplace(network(), "categorical", multiplier=2.0)
    curvature = lk.curvature.estimate(network(), "categorical", [(X, Y)], structure="kron").mean()
    shown = [posterior, optimizer, learner, posterior.predictor(3), posterior.structure, posterior.estimator, curvature]
    shown += [entry() for entry in (*STRUCTURES.values(), *ESTIMATORS.values())]
    for one in shown:
        assert type(one).__name__ in repr(one) and " at 0x" not in repr(one) and "\n" not in repr(one)
    assert "Sequential" in repr(optimizer) and "step 1" in repr(optimizer)
    assert "multiplier=2.0" in repr(learner) and "tasks=0" in repr(learner)
    assert "samples=3" in repr(posterior.predictor(3))
    assert "26 x 26" in repr(curvature) and "vector_blocks='diag'" in repr(posterior.structure)


class Cells(HTMLParser):
    """The texts of the rows of a table, and every tag that was left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_tables_of_notebooks_have_what_the_text_has(posterior: Any) -> None:
    summary = posterior.summary()
    cells = Cells(summary._repr_html_())
    assert not cells.open and len(cells.rows) == len(summary) + 2
    body = [line for line in str(summary).splitlines()[1:] if not line.startswith("---")]
    assert ["".join(row).replace(" ", "") for row in cells.rows] == [line.replace(" ", "") for line in body]

    result = lk.LaplacePosterior(network(), "categorical", structure="diag").fit((X, Y)).tune((X, Y), budget=1.0)
    cells = Cells(result._repr_html_())
    assert not cells.open and [row[1] for row in cells.rows[1:]] == [each["method"] for each in result.candidates]
    assert [row[1] for row in cells.rows if row[0] == ">"] == [result.method]
    grid = posterior.tune((X, Y), prior_precision=[0.1, 1.0, 10.0], n_data=[20.0])
    rows = Cells(grid._repr_html_()).rows[1:]
    assert len(rows) == 3 and [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_tables_are_escaped() -> None:
    text = html_table("<b>", ["a&b"], [["<script>"], ["total"]], ["x < y"], last=True)
    assert "<script>" not in text and "<b>" not in text and "x < y" not in text
    assert Cells(text).rows == [["a&b"], ["<script>"], ["total"]]


def test_fits_searches_files_and_resumed_fits_are_logged(records: list[str], tmp_path: Path) -> None:
    batches = [(X[:10], Y[:10]), (X[10:], Y[10:])]
    posterior = lk.LaplacePosterior(network(), "categorical", structure="diag")
    posterior.fit(batches, checkpoint=tmp_path / "fit.safetensors", every=1)
    posterior.tune((X, Y), prior_precision=[0.1, 1.0], n_data=[20.0])
    posterior.save(tmp_path / "posterior.safetensors")
    lk.LaplacePosterior.load(tmp_path / "posterior.safetensors", network())
    said = "\n".join(records)
    assert re.search(r"laplace_kf\.engine: diag, exact: 2 minibatches, \d+\.\d s", said)
    assert "laplace_kf.posterior.tuning: TuningResult(2 points" in said
    assert re.search(r"laplace_kf\.files: wrote the laplace_kf posterior .*posterior\.safetensors", said)
    assert re.search(r"laplace_kf\.files: read the laplace_kf posterior .*posterior\.safetensors", said)


def test_nothing_is_printed_or_logged_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    lk.LaplacePosterior(network(), "categorical", structure="diag").fit((X, Y)).predict(X)
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("laplace_kf").handlers)
