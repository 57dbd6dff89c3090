"""The attribution experiment: its measures against plain definitions, its networks, and a very small run."""

from __future__ import annotations

import json

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from experiments.__main__ import main
from experiments.attribution import networks, report, run
from experiments.attribution.scores import area, correlations, datamodelling_score, found


def test_datamodelling_score_is_spearmans_correlation():
    generator = torch.Generator().manual_seed(0)
    scores, losses = torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)
    subsets = torch.rand(6, 8, generator=generator) > 0.5
    subsets[1] = subsets[0]  # ties
    got = datamodelling_score(scores, subsets, losses)
    for query in range(3):
        predicted = [sum(scores[query, i] for i in range(8) if subset[i]) for subset in subsets]
        expected = spearmanr(torch.stack(predicted).numpy(), -losses[:, query].numpy()).statistic
        assert float(got[query]) == pytest.approx(expected, abs=1e-6)


def test_what_does_not_vary_is_not_predicted():
    measured = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert correlations(measured.flip(1) + measured, measured).tolist() == pytest.approx([1.0, 0.0])


def test_measures_of_wrong_labels():
    wrong = torch.tensor([False, True, False, True, False])
    scores = torch.tensor([0.1, 0.9, 0.9, 0.3, 0.2])
    assert area(scores, wrong) == pytest.approx((2.5 + 2) / 6)  # of (wrong, right) pairs; a tie is half
    assert found(scores.argsort(descending=True, stable=True), wrong, 0.4) == 0.5


def test_stacked_networks_learn_their_own_halves():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 784, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    subsets = torch.stack([networks.halves(128, n, 0) for n in (0, 1)])
    assert subsets.sum(1).tolist() == [64, 64]
    assert not torch.equal(subsets[0], subsets[1])
    before = torch.random.get_rng_state()
    models = networks.trained((x, y), subsets, 25, [0, 1])
    assert torch.equal(torch.random.get_rng_state(), before)
    for model, rows in zip(models, subsets, strict=True):
        assert not model.training
        with torch.no_grad():
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        assert losses[rows].mean() < 0.8 * losses[~rows].mean()


@pytest.fixture
def digits(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    made = {
        split: (torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator))
        for split, count in (("train", 40), ("test", 6))
    }
    monkeypatch.setattr(run, "images", lambda *_: (made["train"], made["test"]))


WORDS = ["train=40", "queries=6", "subsets=4", "epochs=2", "counts=[1,2]", "score_epochs=[1,2]", "few=1",
         "wrong_epochs=[1]", "many_epochs=[[1,2]]", "development=3", "tried_networks=2", "tried_epochs=[1,2]",
         "tried_damping=[0.5]", "progress=false", "methods=['Kronecker, margin']"]  # fmt: skip


def test_a_small_run_keeps_its_parts(digits, tmp_path, monkeypatch):
    assert main(["run", "attribution", *WORDS, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    scores = result["scores"]
    assert set(scores["Kronecker, margin, 1 epochs"]["score"]) == {"1", "2"}
    assert set(scores["Kronecker, margin, 2 epochs"]["score"]) == {"1"}
    several = scores["Kronecker, margin, 1 + 2 epochs"]
    assert set(several["score"]) == {"1", "2"}
    assert several["training_seconds"] > scores["Kronecker, margin, 1 epochs"]["training_seconds"]
    tried = result["tried"]["score"]
    assert list(tried) == ["1", "2", "1 + 2"]
    assert -1 <= result["tried"]["retrained"] <= 1
    bench = run.Bench(run.Config(**result["config"]), tmp_path / "parts")
    subsets, losses = bench.truth(run.DEVELOPMENT, 3)
    total = sum(run._scored(bench, "Kronecker, margin", 0.5, model)[0]
                for epochs in (1, 2) for model in bench.networks(range(2), epochs))  # fmt: skip
    assert tried["1 + 2"]["0.5"] == pytest.approx(float(datamodelling_score(total, subsets, losses).mean()), abs=1e-6)
    assert set(result["wrong"]["1"]) == {"self_influence", "loss", "left_out"}
    assert (tmp_path / "influential.png").is_file()
    monkeypatch.setattr(run, "trained", None)  # nothing is trained again
    assert main(["run", "attribution", *WORDS, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == scores


def test_verdicts_say_what_is_missed():
    each = {"score": {"1": 0.31, "10": 0.4}, "error": {}, "seconds": 1.0, "training_seconds": 2.0}
    found = {"scores": {"a": each}, "wrong": {"5": {"loss": {"found": 0.9, "area": 0.96}}}}
    met = {verdict["what"]: verdict["met"] for verdict in report.judged(found)}
    assert met["linear datamodelling score, 1"]
    assert not met["linear datamodelling score, 10"]
    assert "linear datamodelling score, 50" not in met
    assert met["wrong labels in the first 10 %"]
    assert not met["AUC of wrong labels"]
