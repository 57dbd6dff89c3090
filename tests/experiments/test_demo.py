"""The demo as a user runs it."""

import json

import pytest
import torch

from laplace_kf.__main__ import main


@pytest.mark.slow
def test_demo_writes_a_complete_and_reasonable_result(tmp_path, capsys):
    state = torch.get_rng_state()
    assert main(["demo", "--out", str(tmp_path)]) == 0
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
    useful = {name: row for name, row in found.items() if not name.endswith("untuned")}
    assert all(row["accuracy"] > 0.8 for row in useful.values())
    assert all(row["entropy_out"] > row["entropy_in"] for row in useful.values())
    for name in ("diagonal, tuned", "Kronecker, tuned", "full last layer, tuned"):
        assert found[name]["nll"] < found["MAP"]["nll"]
        assert found[name]["entropy_out"] > found["MAP"]["entropy_out"]
        assert found[name]["auroc"] > 0.7
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)
