"""A posterior as a post-processing method of torch-uncertainty."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NotFitted, UnknownName

pytest.importorskip("torch_uncertainty", exc_type=ImportError)

from torch_uncertainty.routines import ClassificationRoutine

from laplace_kf.bridges.torch_uncertainty import LaplacePostProcessing


def data(seed: int, count: int = 40) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=rng)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def network(outputs: int = 3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def loader(seed: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(seed)), 20)


def test_a_softmax_gives_the_posteriors_probabilities() -> None:
    model = network()
    grid = {"method": "probit", "n_data": [40.0], "prior_precision": [0.1, 1.0, 10.0]}
    made = LaplacePostProcessing(
        "categorical", train=loader(0), structure="diag", tune=grid, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(IncompatiblePair, match="set_model"):
        made.fit(loader(1))
    made.set_model(model)
    with pytest.raises(NotFitted):
        made(data(2)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(loader(1))
        wanted = lk.LaplacePosterior(model, "categorical", structure="diag").fit(data(0))
        wanted.tune(data(1), generator=torch.Generator().manual_seed(0), **grid)
    assert made.trained and made.posterior.counted_data == 40
    torch.testing.assert_close(made.posterior.curvature.diag(), wanted.curvature.diag())
    assert made.posterior.method == wanted.method == "probit"
    assert made.posterior.prior_precision == wanted.prior_precision
    x = data(2)[0]
    torch.testing.assert_close(made(x).softmax(-1), made.posterior.predict(x).probs)


def test_numbers_have_their_mean() -> None:
    x, y = data(0)[0], data(0)[0][:, :1]
    made = LaplacePostProcessing("gaussian", train=(x, y), model=network(1), tune=False)
    made.fit((x, y))
    torch.testing.assert_close(made(x), made.posterior.predict(x).mean)


@pytest.mark.filterwarnings("ignore")
def test_a_routine_fits_and_uses_it() -> None:
    model = network()
    made = LaplacePostProcessing("categorical", train=loader(0), structure="diag", tune=False)
    routine = ClassificationRoutine(model=model, num_classes=3, loss=None, post_processing=made, log_plots=False)
    seen: dict[str, Any] = {}

    class Trainer:
        class datamodule:
            postprocess_dataloader = staticmethod(lambda: loader(1))

    routine._trainer = Trainer()
    type(routine).trainer = property(lambda self: self._trainer)  # what Lightning's trainer sets, without a run of it
    routine.on_test_start()
    made.posterior.method = "probit"
    x, y = data(2)
    routine.post_cls_metrics.update = lambda probs, targets: seen.update(probs=probs)
    routine.test_step((x, y), 0)
    torch.testing.assert_close(seen["probs"], made.posterior.predict(x).probs)
    assert made.posterior.counted_data == 40


def test_refusals() -> None:
    with pytest.raises(IncompatiblePair, match=r"train=train_loader"):
        LaplacePostProcessing("categorical")
    with pytest.raises(IncompatiblePair, match="softmax"):
        LaplacePostProcessing("bernoulli", train=loader(0), model=network(1))
    with pytest.raises(UnknownName, match="kron"):
        LaplacePostProcessing("categorical", train=loader(0), model=network(), structure="krn")
