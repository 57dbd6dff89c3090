"""E25 and E27: a very small run on the real files, and settings that are refused."""

import json
import os

import pytest

from experiments.__main__ import main
from experiments.continual import run, settings
from laplace_kf import continual

SIZES = "hidden=20 epochs=2 batch=50 lr=0.05 train_size=400 val_size=200 test_size=200 progress=false"
FILES = pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA names no folder of data files")


@pytest.mark.data
@FILES
@pytest.mark.parametrize(("name", "tasks"), [("E25", 3), ("E27", 2)])
def test_a_small_run_on_the_real_files(name, tasks, tmp_path):
    """All standard methods over two tasks, some over three; test_streams.py runs all over three, on small pictures."""
    words = [*SIZES.split(), "multipliers=[1]", "strengths=[0.1]", f"tasks={tasks}", "prior_precision=0.1"]
    some = {"Kronecker online, projected", "diagonal online", "Synaptic Intelligence", "fine-tuning", "joint training"}
    chosen = [method for method in settings.STANDARD if tasks == 2 or method in some]
    words += [
        "repeats=1",
        "methods=[" + ",".join(f'"{method}"' for method in chosen) + "]",
        "decay=0",
        "multipliers_diag=[]",
    ]
    assert main(["run", name, *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["metrics"]) == chosen
    assert result["tables"][0]["note"].startswith("One strength was run.")  # none was chosen
    for found in result["metrics"].values():
        assert 0.05 < found["average"][0] <= 1
    # an upper bound that has all data, against nothing kept
    assert result["metrics"]["joint training"]["average"] > result["metrics"]["fine-tuning"]["average"]
    if tasks == 2:  # the variants coincide for two tasks
        averages = [result["metrics"][name]["average"][0] for name in ("diagonal online", "diagonal EWC")]
        assert averages[0] == pytest.approx(averages[1], abs=0.02)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == len(chosen)
    before = {part: part.stat().st_mtime_ns for part in parts}
    assert main(["run", name, *words, "--out", str(tmp_path)]) == 0  # finished parts are used again
    assert {part: part.stat().st_mtime_ns for part in parts} == before


@pytest.mark.data
@FILES
def test_a_task_is_over_when_its_validation_loss_stays(tmp_path, monkeypatch):
    losses, rates = [], []
    monkeypatch.setattr(continual.EarlyStopping, "over", lambda self, loss: losses.append(loss) or len(losses) % 2 == 0)
    made = run.RATES["tenths"]

    def kept(optimizer, epochs):
        rates.append(made(optimizer, epochs))
        return rates[-1]

    monkeypatch.setitem(run.RATES._entries, "tenths", kept)
    words = [*SIZES.split(), "repeats=1", "methods=[fine-tuning]", "decay=0", "rates=tenths", "patience=3", "epochs=50"]
    assert main(["run", "E27", *words, "--out", str(tmp_path)]) == 0
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)  # two epochs of each of the two tasks
    assert [one.last_epoch for one in rates] == [2, 2] and rates[0].step_size == 5 and rates[0].gamma == 0.1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("methods=[nothing]", "'Kronecker online'"),
        ("multipliers=[]", "multipliers"),
        ("tasks=0", "tasks"),
        ("train_size=60000", "60000"),
        ("lr=0", "lr"),
        ("patience=-1", "patience"),
        ("rates=linear", "tenths"),
    ],
)
def test_settings_are_refused(word, says, tmp_path, capsys):
    assert main(["run", "E25", word, "--out", str(tmp_path)]) != 0
    assert says in capsys.readouterr().err
