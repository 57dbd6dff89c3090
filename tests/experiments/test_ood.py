"""E20: its verdicts, and a very small run on the real files."""

import json
import os
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.common.claims import Claim
from experiments.ood import run as ood
from experiments.ood.attacks import AttackConfig

POSTERIORS = ("diagonal", "Kronecker", "Kronecker, balanced")


def test_verdicts_are_on_the_mean_paired_difference():
    claim = Claim("a at most b", "nll", "a", "b", most=0.0)
    runs = [{"a": {"nll": 1.0}, "b": {"nll": 1.5}}, {"a": {"nll": 2.0}, "b": {"nll": 1.9}}]
    verdict = claim.judge(runs)
    assert verdict["verdict"] == "confirmed"
    assert verdict["difference"]["mean"] == pytest.approx(-0.2)
    assert verdict["value"]["values"] == [1.0, 2.0]
    assert claim.judge(runs[1:])["verdict"] == "refuted"


def test_the_accuracy_claim_is_two_sided():
    claim = ood.CLAIMS[0]
    for accuracy, verdict in ((0.981, "confirmed"), (0.979, "confirmed"), (0.977, "refuted"), (0.983, "refuted")):
        runs = [{claim.method: {"accuracy": accuracy}, claim.other: {"accuracy": 0.98}}]
        assert claim.judge(runs)["verdict"] == verdict


@pytest.mark.data
@pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA does not name a folder of data files")
def test_a_small_run_on_the_real_files(tmp_path, monkeypatch):
    words = (
        "repeats=2 hidden=48 epochs=5 batch=50 lr=0.1 train_size=1500 val_size=200 test_size=150 "
        "ood_size=100 passes=1 samples=5 tune_size=60 tune_samples=2 n_data_factors=[1,1000] "
        "prior_precisions=[0.01,100] mean_field=true dampings=[balanced] progress=false "
        f"networks={tmp_path / 'networks'}"
    )
    out = tmp_path / "out"
    assert main(["run", "E20", *words.split(), "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    closed = ["", ", linearized", ", probit"]
    laplace = [[f"{name}, untuned", *(f"{name}, tuned{how}" for how in closed)] for name in POSTERIORS]
    assert list(result["metrics"]) == ["MAP", "MC dropout", *(name for row in laplace for name in row), "mean field"]
    assert result["seeds"] == [0, 1]
    assert all(len(found["accuracy"]["values"]) == 2 for found in result["metrics"].values())
    assert result["metrics"]["MAP"]["accuracy"]["mean"] > 0.8
    assert len(result["verdicts"]) == len(ood.CLAIMS)
    assert len(result["tuning"]["0"]["Kronecker"]["table"]) == 4
    assert result["stand_ins"] == []
    assert {"training", "Kronecker: curvature", "mean field: training", "mean field: prediction"} <= set(
        result["seconds"]["0"]
    )
    assert result["metrics"]["mean field"]["accuracy"]["mean"] > 0.3  # five short epochs; chance is a tenth
    assert any("mean field" in verdict["claim"] for verdict in result["verdicts"])
    written = sorted(path.name for path in out.iterdir())
    assert written == ["entropy.png", "parts", "reliability.png", "report.html", "result.json"]
    assert len(list((tmp_path / "networks").iterdir())) == 4  # with dropout and mean field, for two seeds
    assert sorted(path.name for path in (out / "parts").iterdir()) == ["seed-0.pt", "seed-1.pt"]
    made = []
    monkeypatch.setattr(ood, "_repetition", lambda config, seed: made.append(seed))
    assert main(["run", "E20", *words.split(), "--out", str(out)]) == 0
    again = json.loads((out / "result.json").read_text())
    assert not made and again["metrics"] == result["metrics"] and again["seconds"] == result["seconds"]
    with pytest.raises(TypeError):  # what stands in for a repetition has nothing to keep
        main(["run", "E20", *words.split(), "samples=6", "--out", str(out)])
    assert made == [0]


def test_the_attacks_find_the_networks_of_e20():
    trained = {"hidden": 32, "epochs": 2, "lr": 0.01, "batch": 50, "schedule": "constant", "train_size": 500}
    mine = ood.Config(**trained, networks="somewhere", passes=9, samples=7, test_size=50)
    theirs = AttackConfig(**trained, networks="somewhere", count=10, curvature_size=100).network()
    assert ood._place(mine, 3, "network with dropout") == ood._place(theirs, 3, "network with dropout")
    for name in ood.TRAINING:
        value = getattr(mine, name)
        other = "cosine" if name == "schedule" else value / 2 if isinstance(value, float) else value + 1
        assert ood._place(replace(mine, **{name: other}), 3, "net") != ood._place(mine, 3, "net"), name
    assert ood._place(mine, 4, "net") != ood._place(mine, 3, "net")
