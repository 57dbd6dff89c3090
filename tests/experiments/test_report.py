"""Result files: self-contained, escaped, JSON without NaN; pictures without pyplot."""

import base64
import importlib
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

from laplace_kf.reports import plots
from laplace_kf.reports.html import Picture, Report, Table
from tests.fresh import said


class Page(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "action", "data", "srcset")]


def entropies(seed=0, count=50):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * math.log(4)


@pytest.fixture
def report():
    figure = plots.inverse_entropy_cdf({"MAP": entropies(0), "Kronecker, tuned": entropies(1)}, classes=4)
    return Report(
        title="<b>Bold & brave</b>",
        summary="a < b",
        seed=3,
        config={"name": "</pre><script>alert(1)</script>", "lr": 0.1},
        metrics={"MAP": {"nll": float("nan"), "accuracy": 0.5}},
        tables=[Table("T & co", ["method", "accuracy"], [["<MAP>", "0.5"]], "a note")],
        pictures=[Picture("entropy", figure, 'a "caption"')],
        details={"seeds": [3]},
    )


def test_files(report, tmp_path):
    report.save(tmp_path / "new" / "folder")
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["entropy.png", "report.html", "result.json"]


def test_result_has_the_contract_keys_and_is_plain_json(report, tmp_path):
    report.save(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert {"config", "seed", "metrics", "versions", "machine"} <= set(result)
    assert result["metrics"]["MAP"] == {"nll": None, "accuracy": 0.5}
    assert result["seeds"] == [3]
    assert {"python", "torch", "numpy", "laplace_kf"} <= set(result["versions"])
    assert {"cpu", "cores", "threads", "memory_gib"} <= set(result["machine"])


def test_page_is_self_contained(report):
    page = report.html()
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert len(parsed.links) == 1
    assert base64.b64decode(parsed.links[0].split(",", 1)[1]).startswith(b"\x89PNG")
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|url\(|@import", outside)


def test_page_escapes_text(report):
    page = report.html()
    assert "&lt;b&gt;Bold &amp; brave&lt;/b&gt;" in page
    assert "&lt;MAP&gt;" in page
    assert "<script" not in page


def test_table_as_text_is_aligned():
    lines = Table("title", ["method", "x"], [["a", "10.5"], ["long name", "2"]], "note").text().splitlines()
    assert lines == ["title", "method        x", "---------  ----", "a          10.5", "long name     2", "note"]


def test_inverse_entropy_cdf_is_one_minus_the_distribution_function():
    values = torch.tensor([0.2, 0.8, 0.4, 1.0])
    axis = plots.inverse_entropy_cdf({"MAP": values}, classes=4).axes[0]
    x, y = (list(map(float, data)) for data in axis.lines[0].get_data())
    assert x == pytest.approx([0, 0.2, 0.4, 0.8, 1.0, math.log(4)])
    assert y == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


def test_colours_belong_to_methods_and_untuned_is_dashed():
    figure = plots.inverse_entropy_cdf(
        {"Kronecker, tuned": entropies(), "other": entropies(), "Kronecker, untuned": entropies(), "third": entropies()}
    )
    kron, other, untuned, third = figure.axes[0].lines[:4]
    assert kron.get_color() == untuned.get_color()
    assert len({kron.get_color(), other.get_color(), third.get_color()}) == 3
    assert kron.get_linestyle() == "-"
    assert untuned.get_linestyle() == "--"


def test_reliability_bins():
    probs = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45]])
    axis = plots.reliability_diagram({"MAP": (probs, torch.tensor([0, 1, 0]))}, bins=10).axes[0]
    bars = {round(bar.get_x(), 3): bar.get_height() for bar in axis.patches}
    assert bars == {0.5: pytest.approx(1.0), 0.9: pytest.approx(0.5)}
    assert "45.0 %" in axis.texts[0].get_text()  # 2/3 of |0.5 - 0.95| and 1/3 of |1 - 0.55|


def test_drawing_does_not_import_pyplot():
    assert said("pyplot") == ["False"]


@pytest.mark.parametrize(("module", "package"), [("metrics", "torchmetrics"), ("plots", "matplotlib")])
def test_a_missing_extra_is_named(module, package, monkeypatch):
    for name in [package, *sys.modules]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"laplace_kf.reports.{module}", raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"laplace_kf.reports.{module}")
    assert "laplace_kf[experiments]" in str(caught.value)
    assert package in str(caught.value)


def test_wide_tables_may_be_wider_than_the_text(report):
    page = report.html()
    assert "max-width: calc(100vw" in page and "width: max-content" in page  # up to the window's width, then it scrolls
    heads = next(line for line in page.splitlines() if line.lstrip().startswith("th {"))
    assert "white-space: normal" in heads
