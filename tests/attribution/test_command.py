"""``python -m laplace_kf attribute``: the same scores as from Python, and refusals that say what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.__main__ import main
from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports.influence_plots import influential

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


def test_what_is_read_is_not_written_over(files, capsys):
    for name in ("posterior.safetensors", "train.npz", "queries.npz"):
        before = Path(name).read_bytes()
        with torch.random.fork_rng():
            assert main([*arguments(), "--out", f"../{Path.cwd().name}/{name}"]) == 1
        assert "would be written over" in capsys.readouterr().err
        assert Path(name).read_bytes() == before


def test_labels_that_are_a_list_are_said_to_be(files, capsys):
    torch.save({"x": torch.zeros(2, 3), "y": [0, 1]}, "listed.pt")
    with torch.random.fork_rng():
        assert main(arguments("listed.pt")) == 1
    assert "y is a list" in capsys.readouterr().err


def test_a_picture_needs_images(files, capsys):
    with torch.random.fork_rng():
        assert main([*arguments(), "--picture", "shown.png"]) == 1
    assert "needs images" in capsys.readouterr().err
    assert not Path("scores.safetensors").exists()


def test_the_picture_shows_the_most_helpful_and_harmful():
    train, queries = torch.rand(4, 1, 3, 3), torch.rand(2, 1, 3, 3)
    scores = torch.tensor([[0.1, 3.0, -2.0, 0.0], [1.0, 0.5, 0.2, -1.0]])
    figure = influential(scores, train, queries, 1, train_names=list("abcd"), query_names=["first", "second"])
    assert [axis.get_title() for axis in figure.axes] == ["first", "b", "c", "second", "a", "d"]
    assert torch.equal(torch.as_tensor(figure.axes[1].images[0].get_array().copy()), train[1, 0])
    with pytest.raises(ShapeMismatch, match="scores"):
        influential(scores.T, train, queries)
    with pytest.raises(ShapeMismatch, match="image"):
        influential(scores, train.flatten(1), queries.flatten(1))
