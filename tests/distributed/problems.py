"""Networks and data that every process makes for itself, alike; and ways to deal the data out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

N = 22  # not a multiple of 4


class Net(nn.Module):
    """Two layers on rows, one with a norm between them."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5) if norm else nn.Identity()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


class Experts(nn.Module):
    """The sign of the first input chooses the expert of the whole minibatch, if all agree: others never run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        above = x[:, :1] > 0
        if bool(above.all()):
            hidden = self.one(x)
        elif not bool(above.any()):
            hidden = self.two(x)
        else:
            hidden = torch.where(above, self.one(x), self.two(x))
        return self.last(torch.tanh(hidden))


class Tokens(nn.Module):
    """A table, a convolution over positions, several positions that share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(self.table(x).transpose(1, 2)))
        return self.last(hidden.transpose(1, 2))


def network(kind: str = "net", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = {"net": Net, "norm": lambda: Net(True), "experts": Experts, "tokens": Tokens}[kind]()
    return made.to(dtype)


def data(kind: str = "net", count: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "tokens":
        x = torch.randint(0, 6, (count, 4), generator=generator)
        y = torch.randint(0, 3, (count, 4), generator=generator)
        y[:, -1] = -100
        y[1] = -100
        return x, y
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    if kind == "experts":
        x = x[x[:, 0].argsort(descending=True)]
    return x, torch.randint(0, 3, (count,), generator=generator)


class Stream(IterableDataset[Any]):
    """Reads its shards one after the other, as a loader of archives does; each process takes every other shard."""

    def __init__(self, x: Tensor, y: Tensor, rank: int, size: int) -> None:
        self.x, self.y, self.rank, self.size = x, y, rank, size

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.x), 4):
            if (start // 4) % self.size == self.rank:
                yield from zip(self.x[start : start + 4], self.y[start : start + 4], strict=True)


def sampled(x: Tensor, y: Tensor, rank: int, size: int) -> Any:
    """torch's sampler, which pads."""
    dataset = TensorDataset(x, y)
    return DataLoader(dataset, 4, sampler=DistributedSampler(dataset, size, rank, shuffle=True, seed=5))


def subset(x: Tensor, y: Tensor, rank: int, size: int) -> Any:
    dataset = TensorDataset(x, y)
    return DataLoader(Subset(dataset, range(rank, len(dataset), size)), 4)


def pieces(x: Tensor, y: Tensor, rank: int, size: int) -> Any:
    """Tensors of uneven length; the last process has none."""
    edges = [round(len(x) * (k / max(1, size - 1)) ** 2) for k in range(size)] + [len(x)]
    part = slice(edges[rank], edges[rank + 1])
    return x[part], y[part]


def batches(x: Tensor, y: Tensor, rank: int, size: int) -> Any:
    """Whole minibatches, dealt out in turn: unequal numbers of them."""
    return [(x[k : k + 4], y[k : k + 4]) for k in range(0, len(x), 4)][rank::size]


def streamed(x: Tensor, y: Tensor, rank: int, size: int) -> Any:
    return DataLoader(Stream(x, y, rank, size), 3)


SHARES: dict[str, Callable[[Tensor, Tensor, int, int], Any]] = {
    "sampled": sampled, "subset": subset, "pieces": pieces, "batches": batches, "streamed": streamed,
}  # fmt: skip
