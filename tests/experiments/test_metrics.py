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


def test_risk_coverage_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.rand(40, generator=generator)
    loss = (torch.rand(40, generator=generator) < 0.3).double()
    coverage, risk = metrics.risk_coverage(uncertainty, loss)
    order = sorted(range(40), key=lambda n: float(uncertainty[n]))
    for k in range(1, 41):
        kept = order[:k]
        assert float(coverage[k - 1]) == pytest.approx(k / 40)
        assert float(risk[k - 1]) == pytest.approx(sum(float(loss[n]) for n in kept) / k)
    found = metrics.selective_prediction(uncertainty, loss)
    wrong = int(loss.sum())
    best = [max(0, k - (40 - wrong)) / k for k in range(1, 41)]  # all right ones first
    assert found["aurc"] == pytest.approx(float(risk.mean()))
    assert found["e_aurc"] == pytest.approx(float(risk.mean()) - sum(best) / 40)


def test_ties_count_as_their_average_over_orders():
    """Two of three inputs tie; over both their orders the risk after one of them is 1/2."""
    uncertainty, loss = torch.tensor([0.5, 0.1, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = torch.tensor([0.0, 0.25, 1 / 3], dtype=torch.float64)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        torch.testing.assert_close(metrics.risk_coverage(uncertainty[order], loss[order])[1], expected)
    assert metrics.selective_prediction(torch.zeros(4), torch.tensor([1.0, 0, 0, 0]))["aurc"] == pytest.approx(0.25)


def test_an_oracle_has_no_excess():
    loss = torch.tensor([0.0, 2.0, 0.5, 0.1])
    assert metrics.selective_prediction(loss, loss)["e_aurc"] == pytest.approx(0.0, abs=1e-15)
    assert metrics.selective_prediction(-loss, loss)["e_aurc"] > 0


def test_selective_prediction_needs_pairs():
    with pytest.raises(ShapeMismatch, match="uncertainty"):
        metrics.risk_coverage(torch.zeros(2), torch.zeros(3))


def test_regression_by_hand():
    mean, variance = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [4.0], [0.25]])
    targets = torch.tensor([[1.9], [1.0], [4.0]])
    found = metrics.regression(mean, variance, targets, torch.tensor([-1.0, -2.0, -6.0]))
    assert found["nll"] == pytest.approx(3.0)
    assert found["rmse"] == pytest.approx(math.sqrt((1.9**2 + 0 + 4.0) / 3))
    assert found["inside_95"] == pytest.approx(2 / 3)  # 1.9 < 1.96, 0, but 2 > 0.98
    assert found["sharpness"] == pytest.approx((1 + 2 + 0.5) / 3)
    with pytest.raises(ShapeMismatch, match="one shape"):
        metrics.regression(mean, variance, targets[:, 0], torch.zeros(3))


@pytest.mark.parametrize("seed", [0, 1])
def test_against_scikit_learn(seed):
    """Accuracy, NLL, AUROC and average precision of random predictions, many of them tied."""
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(200, 4, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.randint(4, (200,), generator=generator)
    found = metrics.classification(probs, labels)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, probs.argmax(1)))
    assert found["nll"] == pytest.approx(sklearn.log_loss(labels, probs))
    inside, outside = (torch.randint(top, (90,), generator=generator) / 10 for top in (12, 15))
    truth, score = [0] * 90 + [1] * 90, torch.cat([inside, outside])
    both = metrics.out_of_distribution(inside, outside)
    assert both["auroc"] == pytest.approx(sklearn.roc_auc_score(truth, score))
    assert both["aupr"] == pytest.approx(sklearn.average_precision_score(truth, score))
    threshold = max(t for t in score.unique().tolist() if (outside >= t).double().mean() >= 0.95)
    assert both["fpr95"] == pytest.approx(float((inside >= threshold).double().mean()))
