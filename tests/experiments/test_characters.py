"""The characters experiment: a very small run, taken up again, and what its table says."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.__main__ import main
from experiments.characters import run
from experiments.common.checks import BadSetting

WORDS = ["context=6", "width=8", "heads=2", "layers=1", "batch=2", "steps=4", "every=2", "validation=5",
         "progress=false", "aim=0.1"]  # fmt: skip


@pytest.fixture
def text(monkeypatch):
    monkeypatch.setattr(run.data, "text", lambda: "to be or not to be, that is the question: " * 20)


class CutShort:
    """A method that is interrupted in its fourth iteration."""

    def __init__(self, way):
        self.way, self.left, self.state = way, 3, way.state

    def step(self, x, y):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.way.step(x, y)


def test_a_run_is_taken_up_where_it_was(text, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    methods = "methods=[AdamW,K-FAC]"
    assert main(["run", "characters", *WORDS, methods, "--out", str(whole)]) == 0
    result = json.loads((whole / "result.json").read_text())
    assert list(result["runs"]) == ["AdamW", "K-FAC"]
    assert [entry[0] for entry in result["runs"]["AdamW"]["trace"]] == [2, 4]
    for method in ("AdamW", "K-FAC"):  # the same, cut short after three iterations, of which two were kept
        config = run.Config(**{**result["config"], "steps": 4})
        with monkeypatch.context() as patch:
            make = run.METHODS[method]
            patch.setitem(run.METHODS, method, lambda *given, make=make: CutShort(make(*given)))
            with pytest.raises(KeyboardInterrupt):
                run._one(config, method, cut / "parts", 1e9)
        found = run._one(config, method, cut / "parts", 1e9)
        wanted = run._one(config, method, tmp_path / "again" / method, 1e9)
        assert [e[2] for e in found["trace"]] == [e[2] for e in wanted["trace"]] and len(found["trace"]) == 2
        done = run._one(config, method, cut / "parts", 1e9)
        assert done["trace"] == found["trace"]


def test_adamw_has_the_recipes_rates():
    made = run._First(torch.nn.Linear(2, 2), run.Config())
    rates = {}
    for step in (0, 99, 100, 1050, 2000):
        made.step_number = step
        rates[step] = made.rate()
    assert rates[0] == pytest.approx(1e-3 / 101) and rates[99] < rates[100] == pytest.approx(1e-3)
    assert rates[1050] == pytest.approx(0.55e-3) and rates[2000] == pytest.approx(1e-4)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.0]


def test_rows_say_when_the_aim_was_reached():
    runs = {"AdamW": {"trace": [[50, 5.0, 2.5], [100, 10.0, 1.8]], "seconds": 10.0, "steps": 100},
            "K-FAC": {"trace": [[50, 20.0, 2.2]], "seconds": 20.0, "steps": 50},
            "EK-FAC": {"trace": [[20, 4.0, 2.9]], "seconds": 4.0, "steps": 20}}  # fmt: skip
    assert run.rows({"runs": runs}, 1.88)[1] == [
        ["AdamW", "100", "10", "100", "10", "1.800", "", "", "100"],
        ["K-FAC", "not reached", "", "50", "20", "2.200", "2.500", "1.800", "400"],
        ["EK-FAC", "not reached", "", "20", "4", "2.900", "", "", "200"],  # before the first look at AdamW's loss
    ]
    with pytest.raises(BadSetting, match="AdamW"):
        run.Config(methods=["K-FAC"])
