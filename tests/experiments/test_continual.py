"""E25 and E27: a very small run on the real files, and settings that are refused."""

import json
import os

import pytest

from experiments.__main__ import main
from experiments.continual import settings

SIZES = "hidden=20 epochs=2 batch=50 lr=0.05 train_size=400 val_size=200 test_size=200 progress=false"
FILES = pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA names no folder of data files")


@pytest.mark.data
@FILES
@pytest.mark.parametrize(("name", "tasks"), [("E25", 3), ("E27", 2)])
def test_a_small_run_on_the_real_files(name, tasks, tmp_path):
    words = [*SIZES.split(), "multipliers=[1]", "strengths=[0.1]", f"tasks={tasks}", "prior_precision=0.1"]
    chosen = list(settings.STANDARD)
    words += [
        "repeats=1",
        "methods=[" + ",".join(f'"{method}"' for method in chosen) + "]",
        "decay=0",
        "multipliers_diag=[]",
    ]
    assert main(["run", name, *words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["metrics"]) == chosen
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


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("methods=[nothing]", "'Kronecker online'"),
        ("multipliers=[]", "multipliers"),
        ("tasks=0", "tasks"),
        ("train_size=60000", "60000"),
        ("lr=0", "lr"),
    ],
)
def test_settings_are_refused(word, says, tmp_path, capsys):
    assert main(["run", "E25", word, "--out", str(tmp_path)]) != 0
    assert says in capsys.readouterr().err
