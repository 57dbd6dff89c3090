"""Metrics against values worked out by hand."""

import math

import pytest
import torch

from laplace_kf.errors import ShapeMismatch
from laplace_kf.reports import metrics


def test_classification_by_hand():
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    labels = torch.tensor([0, 1, 1, 0])
    found = metrics.classification(probs, labels, bins=10)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.7) + math.log(0.9)) / 4, rel=1e-6)
    assert found["brier"] == pytest.approx((2 * 0.04 + 2 * 0.36 + 2 * 0.09 + 2 * 0.01) / 4, rel=1e-6)
    # four bins of one example each: |1 - 0.8|, |0 - 0.6|, |1 - 0.7|, |1 - 0.9|, a quarter of the weight each
    assert found["ece"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4, rel=1e-5)


def test_nll_stays_finite_when_a_probability_underflows():
    found = metrics.classification(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert found["nll"] == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


def test_entropy_between_zero_and_log_of_the_number_of_classes():
    probs = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(metrics.entropy(probs), torch.tensor([0.0, math.log(3), math.log(2)]))


def test_out_of_distribution_by_hand():
    inside, outside = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9])
    found = metrics.out_of_distribution(inside, outside)
    assert found["auroc"] == pytest.approx(5 / 6)  # 5 of the 6 pairs are in order
    assert found["fpr95"] == pytest.approx(1 / 3)  # catching both needs the threshold 0.5, which flags 0.6 too
    assert found["aupr"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_out_of_distribution_of_equal_scores_is_chance():
    found = metrics.out_of_distribution(torch.zeros(4), torch.zeros(3))
    assert found["auroc"] == pytest.approx(0.5)
    assert found["fpr95"] == pytest.approx(1.0)


def test_out_of_distribution_tells_large_scores_apart():
    """A sigmoid in single precision would make them all one."""
    found = metrics.out_of_distribution(torch.tensor([100.0, 101.0]), torch.tensor([102.0, 103.0]))
    assert found["auroc"] == pytest.approx(1.0)


def test_mean_and_sample_deviation():
    found = metrics.mean_std([{"a": 1.0}, {"a": 3.0}])
    assert found == {"a": {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "values": [1.0, 3.0]}}
    assert metrics.mean_std([{"a": 1.0}])["a"]["std"] == 0.0


@pytest.mark.parametrize(
    ("probs", "labels"), [((3, 2), (2,)), ((3,), (3,)), ((0, 2), (0,))], ids=["lengths", "rank", "empty"]
)
def test_wrong_shapes_are_refused(probs, labels):
    with pytest.raises(ShapeMismatch, match="Expected"):
        metrics.classification(torch.zeros(probs), torch.zeros(labels, dtype=torch.long))


def test_empty_scores_are_refused():
    with pytest.raises(ShapeMismatch, match="outside"):
        metrics.out_of_distribution(torch.zeros(2), torch.zeros(0))
