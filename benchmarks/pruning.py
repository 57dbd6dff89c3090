"""Pruning by conditioning beside magnitude pruning, on twenty networks of four kinds trained on MNIST.

Networks of 784-128-64-10 are trained on 5,000 images (20 epochs of SGD with momentum) and tested on 10,000;
convolutional, residual and attention networks on 2,000 and 2,000. The posterior is a Kronecker one at N = the number
of images and λ = 1, not tuned; nothing is trained after pruning. Magnitude pruning sets the smallest weights of all
matrices and kernels to zero. Finished networks are kept in ``results/pruning.jsonl``: a run that was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from experiments.common import data

SEEDS = range(5)
DONE = Path("results/pruning.jsonl")


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Args:
        make: the untrained network.
        shape: of one input.
        images, tested: how many to train and to test on.
        epochs, rate: of the training.
        sparsities: shares to prune.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    images: int
    tested: int
    epochs: int
    rate: float
    sparsities: tuple[float, ...]


class Residual(nn.Module):
    """Two residual blocks of 12 channels after a strided convolution, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.ModuleList([self._block() for _ in range(2)])
        self.down = nn.AvgPool2d(2)
        self.last = nn.Linear(12 * 7 * 7, 10)

    @staticmethod
    def _block() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.first(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        out: Tensor = self.last(x.flatten(1))
        return out


class Rows(nn.Module):
    """One layer of attention over the 28 rows of an image, 32 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(28, 32)
        self.position = nn.Parameter(torch.randn(28, 32) * 0.1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.layer(self.embed(x) + self.position).mean(1))
        return out


def mlp() -> nn.Module:
    """784-128-64-10."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def lenet() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


KINDS = {
    "mlp": Kind(mlp, (784,), 5000, 10_000, 20, 0.01, (0.95, 0.98)),
    "lenet": Kind(lenet, (1, 28, 28), 2000, 2000, 12, 0.02, (0.8, 0.9, 0.95)),
    "residual": Kind(Residual, (1, 28, 28), 2000, 2000, 6, 0.02, (0.8, 0.9, 0.95)),
    "attention": Kind(Rows, (28, 28), 2000, 2000, 30, 0.05, (0.5, 0.7, 0.8)),
}


def run(rounds: int = 5) -> dict[str, Any]:
    """Accuracies of every network (``rounds`` is not used: nothing here is a measurement of time)."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"networks": {}}
    done = [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.is_file() else []
    DONE.parent.mkdir(exist_ok=True)
    for row in networks({(row["kind"], row["seed"]): row for row in done}):
        if row not in done:
            with DONE.open("a") as file:
                file.write(json.dumps(row) + "\n")
        result["networks"].setdefault(row["kind"], []).append(row)
    rows = [row for each in result["networks"].values() for row in each]
    pairs = [pair for row in rows for pair in row["pruned"].values()]
    mlps = result["networks"]["mlp"]
    result["met"] = {
        "mlp, 95 %: at most one point lost": all(r["dense"] - r["pruned"]["0.95"]["posterior"] <= 1.0 for r in mlps),
        "mlp, 98 %: at least 80 %": all(r["pruned"]["0.98"]["posterior"] >= 80 for r in mlps),
        "never below magnitude": all(pair["posterior"] >= pair["magnitude"] for pair in pairs),
    }
    result["pairs"] = len(pairs)
    result["workload"] = (
        "MNIST, Kronecker posterior at N = the training images, prior precision 1; accuracies in per cent"
    )
    return result


def networks(done: dict[tuple[str, int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a network; those that are done are handed out as they are."""
    x, y = data.images("mnist", "train")
    mean, deviation = 0.1307, 0.3081
    tx, ty = data.images("mnist", "test")
    x, tx = (x - mean) / deviation, (tx - mean) / deviation
    for seed in SEEDS:
        for name, kind in KINDS.items():
            if (name, seed) in done:
                yield done[name, seed]
                continue
            rng = torch.Generator().manual_seed(seed)
            some = torch.randperm(len(x), generator=rng)[: kind.images]
            train = x[some].reshape(-1, *kind.shape), y[some]
            test = tx[: kind.tested].reshape(-1, *kind.shape), ty[: kind.tested]
            model = trained(kind, seed, *train)
            posterior = lk.LaplacePosterior(model, "categorical").fit(batches(*train))
            row: dict[str, Any] = {"kind": name, "seed": seed, "dense": accuracy(model, *test), "pruned": {}}
            for sparsity in kind.sparsities:
                start = time.process_time()
                made = lk.pruning.prune(posterior, sparsity)
                seconds = time.process_time() - start
                row["pruned"][str(sparsity)] = {
                    "posterior": accuracy(made, *test),
                    "magnitude": accuracy(by_magnitude(posterior, sparsity), *test),
                    "processor_seconds": round(seconds, 1),
                }
            yield row


def trained(kind: Kind, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    """A network after training, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.make()
    optimizer = torch.optim.SGD(model.parameters(), kind.rate, momentum=0.9)
    steps = kind.epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(kind.epochs):
        for some in torch.randperm(len(x), generator=rng).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Minibatches of 250."""
    return list(zip(x.split(250), y.split(250), strict=True))


def by_magnitude(posterior: lk.LaplacePosterior, sparsity: float) -> nn.Module:
    """The smallest weights set to zero, and nothing else."""
    held = lk.pruning.masks(posterior, sparsity, score="magnitude", rounds=1)
    made = copy.deepcopy(posterior.model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in held:
                parameter.masked_fill_(held[name], 0)
    return made


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return round(100 * float((found == y).double().mean()), 2)


def text(result: dict[str, Any]) -> str:
    """A table of means over the seeds."""
    lines = []
    for name, rows in result["networks"].items():
        dense = sum(row["dense"] for row in rows) / len(rows)
        lines.append(f"{name} ({len(rows)} networks, dense {dense:.1f} %)")
        for sparsity in rows[0]["pruned"]:
            ours, theirs = (
                sum(row["pruned"][sparsity][key] for row in rows) / len(rows) for key in ("posterior", "magnitude")
            )
            lines.append(f"  {float(sparsity):.0%} pruned: posterior {ours:.1f} %, magnitude {theirs:.1f} %")
    lines += [f"{'met' if met else 'NOT met'}: {what}" for what, met in result["met"].items()]
    return "\n".join(lines)
