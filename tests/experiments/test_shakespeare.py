"""The Shakespeare tutorial: its parts, and a very small run on the real text."""

import json
import math
import os

import pytest
import torch

from experiments.__main__ import main
from experiments.common import data
from experiments.common.claims import Claim
from experiments.shakespeare import foreign
from experiments.shakespeare import report as shakespeare_report
from experiments.shakespeare import run as shakespeare
from experiments.shakespeare.report import Reading
from experiments.shakespeare.transformer import Transformer, encode, windows
from laplace_kf.posterior import LaplacePosterior

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The 65 characters of tiny Shakespeare."""


def transformer(classes=5, context=6, layers=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer(classes, context, 8, 2, layers).eval()


def test_a_transformer_does_not_look_ahead():
    model = transformer(layers=2)
    x = torch.tensor([[0, 1, 2, 3, 4, 0]])
    changed = x.clone()
    changed[0, 4] = 1
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :3]), before[:, :3])


def test_windows_do_not_overlap_and_targets_are_one_later():
    codes = torch.arange(11)
    inputs, targets = windows(codes, 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert windows(codes, 3, 2)[0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert windows(codes[:10], 3)[0].shape == (3, 3)  # the last target is the last character
    assert windows(codes[:9], 3)[0].shape == (2, 3)
    with pytest.raises(ValueError, match="3 characters"):
        windows(codes[:3], 3)


def test_foreign_passages_are_folded_into_the_alphabet():
    assert foreign.fold("Höhe, daß Ülk: à l'été «çà» 1609", ALPHABET) == "Hoehe, dass Uelk: a l'ete ca "
    for passage in foreign.TEXTS.values():
        folded = foreign.fold(passage, ALPHABET)
        assert len(folded) > 1200
        assert len(encode(folded, ALPHABET)) == len(folded)
        assert sum(map(str.isalpha, folded)) >= sum(map(str.isalpha, passage))


def test_mutual_information_by_character_adds_up_to_that_of_the_window():
    model = transformer()
    x = torch.randint(5, (7, 5), generator=torch.Generator().manual_seed(0))
    posterior = LaplacePosterior(model, "categorical", parameters="last_layer", prior_precision=3.0)
    posterior.fit((x[:, :-1], x[:, 1:]))
    probs, entropy, information = shakespeare.by_character(posterior, x, samples=4, seed=1, size=3)
    whole = posterior.predict(x, method="mc", samples=4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(probs, whole.probs)
    torch.testing.assert_close(entropy, whole.position_entropy)
    torch.testing.assert_close(information.sum(1), whole.mutual_information, atol=1e-5, rtol=1e-3)
    assert information.min() >= 0
    assert information.max() > 1e-3
    _, _, nothing = shakespeare.by_character(posterior, x, method="map")
    assert nothing.max() < shakespeare_report.ROUNDING


def test_metrics_of_a_reading_by_hand():
    """Two characters: one predicted with 1/2, one with 1/4; the first position only serves as context."""
    probs = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]], [[1.0, 0, 0], [0.25, 0.25, 0.5]]])
    entropy = torch.tensor([[9.0, 1.0], [9.0, 2.0]])
    zero = torch.zeros(2, 2, dtype=torch.long)
    known = Reading(zero, zero, probs, entropy, torch.tensor([[5.0, 0.1], [5.0, 0.2]]))
    other = Reading(zero, zero, probs, entropy + 1.5, torch.tensor([[5.0, 0.3], [5.0, 0.15]]))
    found = shakespeare_report.measure({"Shakespeare": known, "foreign": other}, burn_in=1)
    assert found["bits"] == pytest.approx(1.5)
    assert found["bits_foreign"] == pytest.approx(1.5)
    assert found["nll"] == pytest.approx(1.5 * math.log(2))
    assert found["information_Shakespeare"] == pytest.approx(0.15)
    assert found["entropy_foreign"] == pytest.approx(3.0)
    assert found["auroc_character_entropy_foreign"] == 1.0
    assert found["auroc_character_information_foreign"] == 0.75
    plain = Reading(zero, zero, probs, entropy, torch.zeros(2, 2))
    assert "information_foreign" not in shakespeare_report.measure({"Shakespeare": plain, "foreign": plain}, burn_in=1)


def test_a_claim_may_compare_two_metrics():
    claim = Claim("a's x is above b's y", "x", "a", "b", least=0.0, other_metric="y")
    verdict = claim.judge([{"a": {"x": 2.0}, "b": {"x": 5.0, "y": 1.0}}])
    assert verdict["verdict"] == "confirmed"
    assert verdict["reference"]["mean"] == 1.0


SMALL = (
    "width=16 heads=2 layers=1 context=16 burn_in=4 epochs=1 fit_windows=20 tune_windows=4 tune_samples=2 "
    "test_windows=10 samples=3 n_data_factors=[1,1000] prior_precisions=[1,100] progress=false"
)


def check_small_run(folder, characters):
    words = [*SMALL.split(), f"characters={characters}"]
    assert main(["run", "shakespeare", *words, "--out", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    methods = ["MAP", *shakespeare.SELECTIONS]
    assert list(result["metrics"]) == methods
    assert len(result["verdicts"]) == len(shakespeare_report.CLAIMS)
    assert 0 < result["metrics"]["MAP"]["bits"]["mean"] < 8
    assert {"training", "all weights: fit", "last layer: tune"} <= set(result["seconds"]["0"])
    sizes = [result["tuning"]["0"][name]["parameters"] for name in shakespeare.SELECTIONS]
    assert sizes == sorted(sizes)
    assert sizes[-1] == result["parameters"]
    written = sorted(path.name for path in folder.iterdir())
    assert written == ["characters.png", "histograms.png", "report.html", "result.json"]


def test_a_small_run_on_made_up_text(tmp_path, monkeypatch):
    line = "To be, or not to be: that is the question;\nWhether 'tis nobler? & - $3! "
    monkeypatch.setattr(data, "text", lambda: line * 30 + ALPHABET)
    check_small_run(tmp_path, 0)


@pytest.mark.nightly
@pytest.mark.data
@pytest.mark.skipif("LAPLACE_KF_DATA" not in os.environ, reason="LAPLACE_KF_DATA does not name a folder of data files")
def test_a_small_run_on_the_real_text(tmp_path):
    check_small_run(tmp_path, 5000)
    assert "".join(sorted(set(data.text()))) == ALPHABET


def test_an_unknown_selection_lists_the_known_ones(capsys, tmp_path):
    assert main(["run", "shakespeare", "selections=[first]", "--out", str(tmp_path)]) == 1
    assert "last layer" in capsys.readouterr().err
