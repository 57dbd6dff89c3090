"""The labels experiment: a very small run, taken up again, and what its table says."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.__main__ import main
from experiments.common.checks import BadSetting
from experiments.labels import run

WORDS = ["first=1", "batch=2", "most=14", "pool=6", "test=8", "width=1", "steps=2", "samples=5", "progress=false"]


CONFIG = {"first": 1, "batch": 2, "most": 10, "pool": 6, "test": 8, "width": 1, "steps": 2, "samples": 5,
          "progress": False}  # fmt: skip


@pytest.fixture
def digits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    made = {
        split: (torch.rand(count, 1, 28, 28, generator=generator), torch.arange(count) % 10)
        for split, count in (("train", 40), ("test", 10))
    }
    monkeypatch.setattr(run.data, "images", lambda _, split: made[split])


def test_a_small_run_is_taken_up_again(digits, tmp_path, monkeypatch):
    assert main(["run", "labels", *WORDS, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["runs"]) == {"BatchBALD", "random", "BALD"}
    for (only,) in result["runs"].values():
        assert list(only["accuracy"]) == ["10", "12", "14"]
        assert len(set(only["known"])) == 14 and max(only["known"]) < 40
        assert sorted(k % 10 for k in only["known"][:10]) == list(range(10))  # one of each class
    kept = tmp_path / "parts" / "BALD_0.json"
    whole = json.loads(kept.read_text())
    part = {**whole, "known": whole["known"][:12], "accuracy": {"10": whole["accuracy"]["10"]}}
    kept.write_text(json.dumps(part))  # as an interruption leaves it
    assert main(["run", "labels", *WORDS, "--out", str(tmp_path)]) == 0
    again = json.loads(kept.read_text())
    assert again["known"] == whole["known"] and again["accuracy"] == whole["accuracy"]
    monkeypatch.setattr(run, "trained", None)  # nothing is trained again
    assert main(["run", "labels", *WORDS, "--out", str(tmp_path)]) == 0


def test_images_are_standardised_by_the_training_images(digits, tmp_path, monkeypatch):
    seen: dict[str, torch.Tensor] = {}
    trained, outputs = run.trained, run.training.outputs

    def watched(config, x, *rest):
        seen.setdefault("x", x)
        return trained(config, x, *rest)

    def looked_at(model, x, **rest):
        seen.setdefault("test", x)
        return outputs(model, x, **rest)

    monkeypatch.setattr(run, "trained", watched)
    monkeypatch.setattr(run.training, "outputs", looked_at)
    found = run._one(run.Config(**CONFIG), "random", 0, tmp_path / "random_0.json")
    (x, _), (test, _) = run.data.images("mnist", "train"), run.data.images("mnist", "test")
    torch.testing.assert_close(seen["x"], (x[found["known"][:10]] - x.mean()) / x.std())
    torch.testing.assert_close(seen["test"], (test[:8] - x.mean()) / x.std())


def test_a_run_can_be_made_longer(digits, tmp_path):
    more, once = tmp_path / "more", tmp_path / "once"
    for folder, words in ((more, ["most=12"]), (more, []), (once, [])):
        assert main(["run", "labels", *WORDS, "methods=[BALD]", *words, "--out", str(folder)]) == 0
    found = [json.loads((folder / "parts" / "BALD_0.json").read_text()) for folder in (more, once)]
    assert found[0]["known"] == found[1]["known"] and len(found[0]["known"]) == 14
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_rows_say_where_levels_are_reached():
    runs = {"a": [{"accuracy": {"20": 0.5, "70": 0.91, "190": 0.96}, "seconds": 3.0}],
            "b": [{"accuracy": {"20": 0.5, "70": 0.8, "190": 0.9}, "seconds": 2.0}]}  # fmt: skip
    head, rows = run.labels_rows({"runs": runs})
    assert head[1:3] == ["labels to 90%, by seed", "labels to 95%, by seed"]
    assert rows == [["a", "70", "190", "50.0", "91.0", "96.0", "3"],
                    ["b", "190", "not reached", "50.0", "80.0", "90.0", "2"]]  # fmt: skip
    shorter = {**runs, "b": [{"accuracy": {"20": 0.5, "50": 0.8}, "seconds": 1.0}]}
    head, rows = run.labels_rows({"runs": shorter})
    assert head[3:] == ["% at 20", "% at 50", "% at 70", "% at 190", "processor s"]
    assert [row[3:] for row in rows] == [["50.0", "", "91.0", "96.0", "3"], ["50.0", "80.0", "", "", "1"]]


def test_settings_are_checked():
    with pytest.raises(BadSetting, match="at most pool=5"):
        run.Config(pool=5)
    with pytest.raises(BadSetting, match="BatchBALD"):
        run.Config(methods=["BALDY"])
