"""The demo as a user runs it."""

import json
import time

import pytest
import torch

from laplace_kf.__main__ import main


@pytest.mark.slow
def test_demo_writes_a_complete_and_reasonable_result(tmp_path, capsys):
    state, start = torch.get_rng_state(), time.perf_counter()
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert time.perf_counter() - start < 90
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "entropy.png",
        "reliability.png",
        "report.html",
        "result.json",
    ]
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"config", "seed", "metrics", "versions", "machine"} <= set(result)
    found = result["metrics"]
    posteriors = [
        f"{name}, {state}" for name in ("diagonal", "Kronecker", "full last layer") for state in ("untuned", "tuned")
    ]
    assert list(found) == ["MAP", "MC dropout", *posteriors]
    assert all(row["accuracy"] > 0.95 for name, row in found.items() if not name.endswith("untuned"))
    assert all(row["entropy_out"] > row["entropy_in"] for row in found.values())
    assert found["Kronecker, tuned"]["entropy_out"] > found["MAP"]["entropy_out"]
    assert found["Kronecker, tuned"]["auroc"] > 0.9
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
