"""The callback in loops by Lightning's names, and in its trainer where it is installed."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_kf import continual, trainers
from laplace_kf.errors import IncompatiblePair
from tests.fresh import said

N = 24


def data(k: int) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(k)
    x, y = torch.randn(N, 4, generator=rng), torch.randint(0, 3, (N,), generator=rng)
    return list(zip(x.split(6), y.split(6), strict=True))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_nothing_of_lightning_is_imported_with_the_package() -> None:
    assert said("lightning") == ["False"]


class Base:
    """What stands for a trainer's base class."""


def test_bases_are_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = continual.FineTuning(network(), "categorical")
    monkeypatch.setattr(trainers, "_bases", list)
    assert type(continual.Callback(learner, data(0), N)) is continual.Callback
    monkeypatch.setattr(trainers, "_bases", lambda: [Base])
    made = continual.Callback(learner, data(0), N, implicit=True)
    assert isinstance(made, Base) and isinstance(made, continual.Callback) and made.implicit

    class Mixed(continual.Callback, Base):
        pass

    assert type(Mixed(learner, data(0), N)) is Mixed
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert isinstance(again, Base) and isinstance(again, continual.Callback)
        assert again.n_task == N and again.implicit


def test_an_installation_that_is_broken_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "TRAINERS", ("no_such_trainer", "laplace_kf"))
    assert trainers._bases() == []  # the second is there and has no Callback


def plain_loop(kind: Any, clip: float | None, pieces: int) -> tuple[Tensor, continual.Learner]:
    """Two tasks, the penalty in the loss, minibatches accumulated as a mean."""
    model = network()
    learner = kind(model)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for k in range(2):
        for start in range(0, 4, pieces):
            batches = data(k)[start : start + pieces]
            opt.zero_grad()
            losses = [F.cross_entropy(model(x), y) for x, y in batches]
            (learner.record(sum(losses) / pieces) + learner.penalty() / N).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            learner.after_step()
        learner.after_task(data(k))
    return nn.utils.parameters_to_vector(model.parameters()).detach(), learner


KINDS: dict[str, Any] = {
    "si": lambda m: continual.SynapticIntelligence(m, "categorical", c=40.0, prior_precision=0.5),
    "online": lambda m: continual.OnlineLaplace(m, "categorical", multiplier=3.0),
}


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clip", "pieces"), [(None, 1), (0.05, 1), (0.05, 2)])
def test_the_trainer_trains_as_the_plain_loop(kind: str, clip: float | None, pieces: int, package: str) -> None:
    L = pytest.importorskip(package)
    logging.getLogger(package).setLevel(logging.ERROR)
    expected, reference = plain_loop(KINDS[kind], clip, pieces)

    class Lit(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Lit()
    learner = KINDS[kind](module.net)
    for k in range(2):
        made = continual.Callback(learner, data(k), N)
        assert isinstance(made, L.Callback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            L.Trainer(
                max_epochs=1, callbacks=made, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, accelerator="cpu", gradient_clip_val=clip, accumulate_grad_batches=pieces,
            ).fit(module, torch.utils.data.DataLoader(data(k), batch_size=None))  # fmt: skip
    found = nn.utils.parameters_to_vector(module.net.parameters()).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert learner.tasks == 2
    with torch.no_grad():
        for net in (module.net, reference.model):
            for p in net.parameters():
                p += 0.1
    torch.testing.assert_close(learner.penalty(), reference.penalty(), rtol=1e-3, atol=1e-6)


def test_several_optimisers_are_refused() -> None:
    class Trainer:
        optimizers = (1, 2)

    Trainer.__module__ = "lightning.pytorch.trainer.trainer"
    made = continual.Callback(continual.FineTuning(network(), "categorical"), data(0), N)
    with pytest.raises(IncompatiblePair, match="2 optimisers"):
        made.on_train_start(Trainer(), None)
