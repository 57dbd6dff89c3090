"""Posteriors at the end of trainers' runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NotFitted, UnknownName

N = 48


def data(seed: int, count: int = N) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=rng)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def by_hand(model: nn.Module, tune: bool = True) -> lk.LaplacePosterior:
    made = lk.LaplacePosterior(model, "categorical", structure="diag").fit(DataLoader(data(0), 16))
    if tune:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.tune(DataLoader(data(1), 16), generator=torch.Generator().manual_seed(0))
    return made


def same(found: lk.LaplacePosterior, wanted: lk.LaplacePosterior) -> None:
    torch.testing.assert_close(found.precision.diag(), wanted.precision.diag(), rtol=1e-4, atol=1e-6)
    assert (found.n_data, found.method) == pytest.approx((wanted.n_data, wanted.method))


# -- Lightning --------------------------------------------------------------------------------------------------------


def trained(package: str, callback: Any, module: nn.Module, *loaders: Any, **settings: Any) -> Any:
    L = pytest.importorskip(package)

    class Module(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    whole = Module()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[callback], **{**quiet, **settings}).fit(
            whole, *loaders
        )
    return whole


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_lightning_fits_tunes_and_saves(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    path = tmp_path / "posterior.safetensors"
    callback = lk.bridges.lightning.LaplaceCallback(
        "categorical", structure="diag", save=path, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(NotFitted, match="call the trainer first"):
        _ = callback.posterior
    module = trained(package, callback, network(), DataLoader(data(0), 16), DataLoader(data(1), 16))
    posterior = callback.posterior
    assert posterior.model is module
    assert posterior.counted_data == N and posterior.mean["net.0.weight"].equal(module.net[0].weight)
    same(posterior, by_hand(module))
    assert posterior.predict(data(1)[:5][0]).probs.shape == (5, 3)
    same(lk.LaplacePosterior.load(path, module), posterior)


def test_lightning_logs_what_was_chosen(tmp_path: Path) -> None:
    L = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callback = lk.bridges.lightning.LaplaceCallback("categorical", structure="diag")
    trained(L.__name__, callback, network(), DataLoader(data(0), 16), DataLoader(data(1), 16), logger=logger)
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {"laplace/n_data", "laplace/prior_precision", "laplace/objective"} <= set(header.split(","))


def test_lightning_tunes_only_where_it_can() -> None:
    pytest.importorskip("lightning")
    kind = lk.bridges.lightning.LaplaceCallback
    train = DataLoader(data(0), 16)
    for tune in (None, False):
        untuned = kind("categorical", structure="diag", tune=tune)
        module = trained("lightning", untuned, network(), train)
        same(untuned.posterior, by_hand(module, tune=False))
    left_out = kind("categorical", structure="diag", tune=False)
    trained("lightning", left_out, network(), train, DataLoader(data(1), 16))
    assert left_out.posterior.n_data == N and left_out.posterior.prior_precision == 1.0
    evidence = kind("categorical", structure="diag", tune={"objective": "evidence"})
    trained("lightning", evidence, network(), train)
    assert evidence.posterior.prior_precision != 1.0
    with pytest.raises(IncompatiblePair, match=r"validation=loader"):
        trained("lightning", kind("categorical", tune=True), network(), train)
    own = kind(
        "categorical", structure="diag", train=data(0)[:7], validation=data(1)[:7], tune={"n_data": [10.0, 20.0]}
    )
    trained("lightning", own, network(), train)
    assert own.posterior.counted_data == 7 and own.posterior.n_data in (10.0, 20.0)


def test_wrong_arguments_are_refused_before_training() -> None:
    pytest.importorskip("lightning")
    model = network()
    before = model[0].weight.detach().clone()
    with pytest.raises(UnknownName, match="kron"):
        trained("lightning", lk.bridges.lightning.LaplaceCallback("categorical", structure="krom"), model,
                DataLoader(data(0), 16))  # fmt: skip
    assert model[0].weight.equal(before)


def test_several_processes_are_refused() -> None:
    callback = lk.bridges.lightning.LaplaceCallback("categorical")
    with pytest.raises(IncompatiblePair, match="2 processes"):
        callback.finish(network(), DataLoader(data(0), 16), None, 2)
    with pytest.raises(IncompatiblePair, match="train=loader"):
        callback.finish(network(), None, None, 1)


# -- transformers -----------------------------------------------------------------------------------------------------


def rows(seed: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 11, (12, 5), generator=rng)
    return [{"input_ids": row, "attention_mask": torch.ones(5, dtype=torch.long), "labels": row[0] % 3} for row in ids]


@pytest.mark.parametrize("strategy", ["epoch", "no"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_fits_and_tunes(strategy: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        callback = lk.bridges.transformers.LaplaceCallback(
            "categorical", parameters=["classifier.*"], structure="diag", generator=torch.Generator().manual_seed(0)
        )
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, eval_strategy=strategy, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows(0), eval_dataset=rows(1), callbacks=[callback]
        )
        trainer.train()
    posterior = callback.posterior
    assert posterior.model is model and posterior.counted_data == 12
    assert set(posterior.mean) == {"classifier.weight", "classifier.bias"}
    assert posterior.mean["classifier.bias"].equal(model.classifier.bias)
    logged = [line for line in trainer.state.log_history if "laplace/n_data" in line]
    assert len(logged) == 1 and ("laplace/objective" in logged[0]) == (strategy == "epoch")
    batch = transformers.default_data_collator(rows(1))
    wanted = lk.LaplacePosterior(model, "categorical", parameters=["classifier.*"], structure="diag").fit(
        [transformers.default_data_collator(rows(0))]
    )
    torch.testing.assert_close(posterior.curvature.diag(), wanted.curvature.diag())
    assert posterior.predict(batch).probs.shape == (12, 3)
