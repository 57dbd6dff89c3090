"""The pairs: what a network is trained on, and what it has never seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.common import data, training
from laplace_kf.errors import UnknownName

__all__ = ["DEVELOPMENT", "SOURCES", "Problem", "problem"]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Images and labels ``(N,)`` to train, tune and test on, and strangers by name.

    Images are ``(N, 784)``, those in colour ``(N, 3, 32, 32)``.
    """

    train: Pair
    val: Pair
    test: Pair
    strangers: dict[str, Tensor]
    classes: int


@dataclass(frozen=True)
class Source:
    """What a network is trained on.

    Args:
        name: of the image set.
        classes: those it sees, the first so many.
        strangers: names of image sets, or ``"rest"`` for the test images of the other classes.
        colour: whether its images stay as they are, for a network of convolutions.
    """

    name: str
    classes: int
    strangers: tuple[str, ...]
    colour: bool = False

    def images(self, name: str, split: str) -> Pair:
        """Images of any set and their labels, as this source's networks read them."""
        return data.images(name, split) if self.colour else _grey(name, split)


SOURCES = {
    "mnist": Source("mnist", 10, ("notmnist", "fashion-mnist", "cifar10")),
    "fashion-mnist": Source("fashion-mnist", 10, ("mnist",)),
    "digits 0-4": Source("mnist", 5, ("rest",)),
    "letters A-E": Source("notmnist", 5, ("rest", "mnist", "fashion-mnist")),
    "fashion 0-4": Source("fashion-mnist", 5, ("rest", "mnist", "notmnist")),
    "cifar10": Source("cifar10", 10, ("cifar100",), colour=True),
}
DEVELOPMENT = ("letters A-E", "fashion 0-4")
"""Sources on which constants of the scores may be settled; they are not judged."""


def problem(source: str, *, seed: int, val_most: int, train_most: int, test_most: int) -> Problem:
    """Random parts of the files, by ``seed``; letters, which have one file, are shared out 70 : 10 : 20.

    Raises:
        UnknownName: for a source that does not exist.
        MissingData: if a file is not there.
    """
    if source not in SOURCES:
        raise UnknownName("source", source, SOURCES)
    about, rng = SOURCES[source], training.generator(seed)
    first = "train" if "train" in data.splits(about.name) else "test"
    known = _chosen(*about.images(about.name, first), 0, about.classes, rng)
    if first == "train":
        test = _chosen(*about.images(about.name, "test"), 0, about.classes, rng)
        held = min(val_most, len(known[0]) // 5)
    else:
        cut, held = len(known[0]) * 8 // 10, min(val_most, len(known[0]) // 10)
        known, test = _rows(known, 0, cut), _rows(known, cut, len(known[0]))
    strangers = {}
    for name in about.strangers:
        other = about.name if name == "rest" else name
        least = about.classes if name == "rest" else 0
        strangers[name] = _chosen(*about.images(other, "test"), least, 100, rng)[0][:test_most]
    val, train = _rows(known, 0, held), _rows(known, held, held + train_most)
    return Problem(train, val, _rows(test, 0, test_most), strangers, about.classes)


def _rows(pair: Pair, start: int, stop: int) -> Pair:
    return pair[0][start:stop], pair[1][start:stop]


def _chosen(images: Tensor, labels: Tensor, least: int, below: int, rng: torch.Generator) -> Pair:
    """Those of the classes ``least`` to ``below - 1``, in a random order."""
    order = torch.randperm(len(images), generator=rng)
    order = order[(labels[order] >= least) & (labels[order] < below)]
    return images[order], labels[order]


def _grey(name: str, split: str) -> Pair:
    """Images as ``(N, 784)``: colours averaged with the usual weights, 32x32 resampled to 28x28."""
    images, labels = data.images(name, split)
    if images.shape[1] == 3:
        images = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    if images.shape[-1] != 28:
        images = nn.functional.interpolate(images, (28, 28), mode="bilinear", antialias=True)
    return images.flatten(1), labels
