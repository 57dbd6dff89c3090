"""Attribution in a language model: its windows, what is picked and what is reported, and a very small run."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.__main__ import main
from experiments.attribution import text
from experiments.attribution.scores import datamodelling_score
from experiments.common.checks import BadSetting

WORDS = ["context=6", "width=8", "heads=2", "layers=1", "windows=24", "apart=4", "subsets=7", "pick=3", "epochs=2",
         "batch=4", "counts=[1,2]", "score_epochs=[1,2]", "dampings=[1.0,10.0]", "spelt=3",
         "progress=false"]  # fmt: skip


@pytest.fixture
def play(monkeypatch):
    words = "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows "
    monkeypatch.setattr(text.data, "text", lambda: words * 3)


def test_every_fourth_window_is_a_query(play, tmp_path):
    bench = text.Bench(text.Config(context=6, windows=10, apart=4), tmp_path)
    assert bench.train[0].shape == (8, 6) and bench.queries[0].shape == (2, 6)
    for (x, y), first in ((bench.train, 0), (bench.queries, 3)):
        start = "".join(bench.alphabet[k] for k in x[0].tolist())
        assert start == text.data.text()[6 * first : 6 * first + 6]
        assert torch.equal(x[0, 1:], y[0, :-1])


def test_a_small_run_picks_with_some_networks_and_reports_on_others(play, tmp_path, monkeypatch):
    assert main(["run", "attribution_text", *WORDS, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["tried"]) == 2 * 2
    best = result["best"]
    assert best["whole"] == max(each["whole"] for each in result["tried"])
    monkeypatch.setattr(text.training, "train", None)  # nothing is trained again
    assert main(["run", "attribution_text", *WORDS, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["reported"] == result["reported"]

    bench = text.Bench(text.Config(**result["config"]), tmp_path / "parts")
    (model,) = bench.networks([0], best["epochs"])
    ((_, scores),) = bench.scores(model, 0, [best["damping"]], "queries")
    inside, losses = bench.truth()
    assert scores.shape == (3, 6, 18) and losses.shape == (7, 6, 6) and inside.sum(1).tolist() == [9] * 7
    ((_, sums),) = bench.scores(model, 0, [best["damping"]])
    torch.testing.assert_close(scores.sum(1), sums[:3], rtol=1e-2, atol=1e-2 * float(sums.abs().max()))
    whole = datamodelling_score(sums, inside[3:], losses[3:].sum(2))
    assert result["reported"]["score"]["1"]["whole"] == pytest.approx(float(whole.mean()), abs=1e-9)
    first = datamodelling_score(scores[2, 4:5], inside[3:], losses[3:, 2, 4:5])
    every = datamodelling_score(scores.flatten(0, 1), inside[3:], losses[3:, :3].flatten(1))
    assert float(every[2 * 6 + 4]) == pytest.approx(float(first), abs=1e-9, nan_ok=True)
    assert result["reported"]["characters"] == pytest.approx(float(every.nan_to_num(0).mean()), abs=1e-9)
    assert result["verdicts"][0]["met"] == (result["verdicts"][0]["reached"] >= text.AIM)


def test_networks_learn_their_own_halves(play, tmp_path):
    config = text.Config(context=6, width=16, heads=2, layers=1, windows=24, apart=4, epochs=60, lr=1e-2, batch=4,
                         progress=False)  # fmt: skip
    bench = text.Bench(config, tmp_path)
    (model,) = bench.networks([text.TRUTH], config.epochs)
    assert not model.training
    inside = bench.inside(text.TRUTH)
    bench.queries = bench.train
    losses = bench.losses(model).mean(1)
    assert float(losses[inside].mean()) < 0.5 * float(losses[~inside].mean())


def test_settings_are_checked():
    with pytest.raises(BadSetting, match="subsets - 2"):
        text.Config(subsets=10, pick=9)
    with pytest.raises(BadSetting, match="windows=240"):
        text.Config(apart=1)
