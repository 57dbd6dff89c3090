"""What a file keeps of a posterior, and models that it is loaded into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.structures.kron import Kronecker
from tests.classifiers import data, net


def test_overlapping_prior_patterns_survive_saving(tmp_path: Path) -> None:
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, "categorical", prior_precision={"2.*": 5.0, "*": 0.5}).fit((x, y))
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())


def test_options_of_objects_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    posterior = lk.LaplacePosterior(model, "categorical", Kronecker(vector_blocks="full")).fit(data())
    posterior.save(tmp_path / "p")
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())


def test_load_into_another_type_or_architecture(tmp_path: Path) -> None:
    x, y = data()
    lk.LaplacePosterior(net(3, 4, 3), "categorical").fit((x, y)).save(tmp_path / "p")
    single = lk.LaplacePosterior.load(tmp_path / "p", net(3, 4, 3).float())
    assert single.predict(x.float(), method="mc", samples=3).probs.dtype == torch.float32
    with pytest.raises(lk.errors.ShapeMismatch, match="architecture"):
        lk.LaplacePosterior.load(tmp_path / "p", net(3, 4, 3, 5, 3))


def test_a_likelihood_that_cannot_be_written_down(tmp_path: Path) -> None:
    likelihood = lk.likelihoods.FromDistribution(lambda z: torch.distributions.Categorical(logits=z))
    model, (x, y) = net(3, 4, 3), data()
    posterior = lk.LaplacePosterior(model, likelihood).fit((x, y))
    posterior.save(tmp_path / "p")
    with pytest.raises(lk.errors.IncompatiblePair, match="likelihood"):
        lk.LaplacePosterior.load(tmp_path / "p", model)
    loaded = lk.LaplacePosterior.load(tmp_path / "p", model, likelihood=likelihood)
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())
