"""Whatever takes inputs takes a loader of them, or says what to give instead; a batch alone is like all at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

import laplace_kf as lk
from laplace_kf.acquisition import bald, batch_bald, epig

COUNT = 11


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(11) % 3


@pytest.fixture(scope="module", params=["posterior", "mixture"])
def subject(request: pytest.FixtureRequest, data: tuple[Tensor, Tensor]) -> Any:
    made = [lk.LaplacePosterior(net(k), "categorical").fit(data) for k in range(2)]
    return made[0].calibrate(data) if request.param == "posterior" else lk.Mixture(made).calibrate(data)


def loaders(data: tuple[Tensor, Tensor]) -> list[Any]:
    x, y = data
    pairs = TensorDataset(x, y)
    return [DataLoader(pairs, 4), DataLoader(pairs, 1), iter([x[:5], x[5:]]), DataLoader([*x], 7)]  # type: ignore[arg-type]


KINDS = ["entropy", "variance", "max_prob", "leverage", "direction", "auto"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_loader_are_those_of_its_inputs(subject: Any, data: tuple[Tensor, Tensor], kind: str) -> None:
    expected = subject.ood_score(data[0], kind)
    for loader in loaders(data):
        torch.testing.assert_close(subject.ood_score(loader, kind), expected, rtol=1e-10, atol=1e-12)


def test_loaders_that_shuffle_are_warned_of(subject: Any, data: tuple[Tensor, Tensor]) -> None:
    pairs = TensorDataset(*data)
    batches = BatchSampler(RandomSampler(pairs), 4, drop_last=False)
    for loader in (DataLoader(pairs, 4, shuffle=True), DataLoader(pairs, batch_sampler=batches)):
        with pytest.warns(UserWarning, match=r"random order \(RandomSampler\).*row i is not") as found:
            subject.predict(loader, method="map")
        assert found[0].filename == __file__
        with pytest.warns(UserWarning, match="random order"):
            subject.ood_score(loader, "entropy")
    in_order = DistributedSampler(pairs, num_replicas=1, rank=0, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject.predict(DataLoader(pairs, 4, sampler=in_order), method="map")
        subject.predict(DataLoader(pairs, batch_sampler=[[*range(COUNT)]]), method="map")


def test_scores_that_are_drawn_take_the_generator(subject: Any, data: tuple[Tensor, Tensor]) -> None:
    def scores(loader: Any) -> Tensor:
        found: Tensor = subject.ood_score(
            loader, "mutual_information", samples=20, generator=torch.Generator().manual_seed(2)
        )
        return found

    first, again = scores(loaders(data)[0]), scores(loaders(data)[0])
    assert first.shape == (COUNT,)
    assert torch.equal(first, again)


@pytest.mark.parametrize("diagonal_only", [False, True])
def test_covariances_of_a_loader_are_those_of_its_inputs(
    subject: Any, data: tuple[Tensor, Tensor], diagonal_only: bool
) -> None:
    expected = subject.functional_covariance(data[0], diagonal_only)
    for loader in loaders(data):
        found = subject.functional_covariance(loader, diagonal_only)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


JOINT: dict[str, Callable[[Any, Any], Any]] = {
    "bald": bald,
    "batch_bald": lambda p, loader: batch_bald(p, loader, 2),
    "epig": lambda p, loader: epig(p, loader, loader),
    "predictor": lambda p, loader: p.predictor(samples=3)(loader),
}


@pytest.mark.parametrize("call", JOINT.values(), ids=JOINT)
def test_what_needs_all_inputs_together_says_so(
    subject: Any, data: tuple[Tensor, Tensor], call: Callable[[Any, Any], Any]
) -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match=r"a DataLoader was given.*torch\.cat\("):
        call(subject, loaders(data)[0])


def test_a_joint_covariance_of_a_loader_is_refused(data: tuple[Tensor, Tensor]) -> None:
    posterior = lk.LaplacePosterior(net(), "categorical").fit(data)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"a DataLoader was given.*torch\.cat\("):
        posterior.functional_covariance(loaders(data)[0], joint=True)


def test_a_loader_with_weights_is_predicted_as_it_was_fitted(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    loader = DataLoader(TensorDataset(x, y, torch.linspace(0.5, 2, COUNT)), 4)
    posterior = lk.LaplacePosterior(net(), "categorical", weights=True).fit(loader)
    assert torch.equal(posterior.predict(loader).probs, posterior.predict(x).probs)
    scores = posterior.ood_score(loader, "variance")
    torch.testing.assert_close(scores, posterior.ood_score(x, "variance"), rtol=1e-10, atol=1e-12)
    plain = lk.LaplacePosterior(net(), "categorical").fit((x, y))
    with pytest.raises(lk.errors.ShapeMismatch, match="batches are lists of 3; say which"):
        plain.ood_score(loader, "variance")
    with pytest.raises(lk.errors.ShapeMismatch, match="the loader is empty"):
        plain.ood_score(DataLoader(TensorDataset(x[:0], y[:0]), 4), "variance")
