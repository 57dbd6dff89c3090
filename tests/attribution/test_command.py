"""``python -m laplace_kf attribute``: the same scores as from Python, and refusals that say what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.__main__ import main

SOURCE = """
import torch
def made():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "attributed_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
    posterior = lk.LaplacePosterior(model, "categorical").fit(x, y)
    posterior.save("posterior.safetensors")
    np.savez("train.npz", x=x.numpy(), y=y.numpy())
    np.savez("queries.npz", x=x[:2].numpy(), y=y[:2].numpy())
    np.savez("bare.npz", x=x[:2].numpy())
    return posterior, (x, y)


def arguments(queries: str = "queries.npz") -> list[str]:
    return ["attribute", "posterior.safetensors", "--model", "attributed_networks:made", "--train", "train.npz",
            "--queries", queries, "--top", "2", "--out", "scores.safetensors"]  # fmt: skip


def test_the_command_writes_the_scores_and_shows_the_extremes(files, capsys):
    posterior, (x, y) = files
    with torch.random.fork_rng():
        assert main(arguments()) == 0
    expected = lk.attribution.influence(posterior, (x, y), (x[:2], y[:2]))
    torch.testing.assert_close(lk.attribution.Attribution.load("scores.safetensors").scores, expected)
    shown = capsys.readouterr().out
    for query in range(2):
        assert f"{int(expected[query].argmax())}: " in shown
        assert f"{int(expected[query].argmin())}: " in shown


def test_queries_without_labels_are_refused(files, capsys):
    with torch.random.fork_rng():
        assert main(arguments("bare.npz")) == 1
    assert "no labels" in capsys.readouterr().err
