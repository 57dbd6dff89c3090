"""Networks on random halves of the training data, kept as they come; the recipe is that of dattri's MNIST benchmark.

784-128-64-10 with dropout 0.1, 5,000 standardised images, minibatches of 64, SGD with step size 0.01 and momentum 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.common import data, training
from laplace_kf.reports import private_rng

__all__ = ["blank", "halves", "images", "kept", "trained"]

Pair = tuple[Tensor, Tensor]
Network = TypeVar("Network", bound=nn.Module)
MEAN, SPREAD = 0.1307, 0.3081  # of MNIST's pixels
WIDTHS = (784, 128, 64, 10)
DROPOUT, BATCH = 0.1, 64
TOGETHER = 10  # networks of one stack


def images(train: int, queries: int) -> tuple[Pair, Pair]:
    """The first images of both splits, standardised and flat ``(N, 784)``, with labels ``(N,)``."""
    found = []
    for split, count in (("train", train), ("test", queries)):
        x, y = data.images("mnist", split)
        found.append(((x[:count].flatten(1) - MEAN) / SPREAD, y[:count]))
    return found[0], found[1]


def halves(count: int, number: int, seed: int) -> Tensor:
    """Which examples are in the random half ``number``: ``(N,)``, true for half of them."""
    inside = torch.zeros(count, dtype=torch.bool)
    inside[torch.randperm(count, generator=training.generator(1_000_003 * seed + number))[: count // 2]] = True
    return inside


def trained(examples: Pair, subsets: Tensor, epochs: int, seeds: Sequence[int]) -> list[nn.Sequential]:
    """Networks by the recipe, on subsets of one size, all steps of them taken together; in eval mode.

    Args:
        examples: inputs ``(N, 784)`` and labels ``(N,)``.
        subsets: ``(M, N)``, true for the examples that a network sees.
        epochs: passes over its subset.
        seeds: M seeds of initial weights, order and dropout (those of the first for the last two).
    """
    models = [training.mlp(WIDTHS, dropout=DROPOUT, seed=seed) for seed in seeds]
    weights = [torch.stack([value.detach() for value in each]).requires_grad_()
               for each in zip(*(model.parameters() for model in models), strict=True)]  # fmt: skip
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
    rng, own = training.generator(seeds[0]), torch.stack([rows.nonzero()[:, 0] for rows in subsets])
    with private_rng(seeds[0]):
        for _ in range(epochs):
            order = own.gather(1, torch.rand(own.shape, generator=rng).argsort(1))
            for rows in order.split(BATCH, 1):
                found = _outputs(weights, examples[0][rows])
                # the mean of every network's minibatch, summed over networks
                loss = nn.functional.cross_entropy(found.flatten(0, 1), examples[1][rows].flatten(), reduction="sum")
                gradients = torch.autograd.grad(loss / rows.shape[1], weights)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
    for number, model in enumerate(models):
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight[number])
        model.eval()
    return models


def _outputs(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Logits ``(M, B, 10)`` of stacked networks in training at ``x (M, B, 784)``."""
    for number, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        if number:
            x = nn.functional.dropout(x.relu(), DROPOUT)
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    return x


def blank() -> nn.Sequential:
    """An untrained network."""
    return training.mlp(WIDTHS, dropout=DROPOUT)


def kept(
    folder: Path,
    kind: str,
    numbers: Sequence[int],
    train: Callable[[Sequence[int]], list[Network]],
    make: Callable[[], Network],
    together: int = TOGETHER,
) -> Iterator[Network]:
    """Networks by number, each from its file in ``folder``, or trained a few at a time and kept there.

    Args:
        folder: of files ``<kind>_<number>.safetensors``.
        kind: beginning of their names; says everything that the weights depend on.
        numbers: which networks.
        train: makes those of some numbers.
        make: an untrained one.
        together: how many are trained at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(numbers), together):
        some = numbers[start : start + together]
        paths = [folder / f"{kind}_{number}.safetensors" for number in some]
        missing = [number for number, path in zip(some, paths, strict=True) if not path.is_file()]
        for number, model in zip(missing, train(missing) if missing else [], strict=True):
            unfinished = folder / f"{kind}_{number}.part"
            save_file(model.state_dict(), unfinished)
            unfinished.rename(folder / f"{kind}_{number}.safetensors")
        for path in paths:
            model = make()
            model.load_state_dict(load_file(path))
            yield model.eval()
