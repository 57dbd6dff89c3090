"""A posterior over several processes: training data in shards, each process reads its own, all hold the same result.

The shards are ``.pt`` files in a folder, read one after the other by an ``IterableDataset``, as loaders of archives do
(webdataset, Hugging Face datasets): nobody knows how many examples there are before they were read, processes have
unequal numbers of minibatches, and one may have none. Run it with::

    torchrun --nproc-per-node 2 -m examples.distributed [--shards DIR] [--out FILE]

or in one process, ``python -m examples.distributed``, with the same result up to rounding.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import laplace_kf as lk

__all__ = ["Shards", "main", "network", "run", "write_shards"]


class Shards(IterableDataset[tuple[Tensor, Tensor]]):
    """Examples ``(x, y)`` of files, every process (and every worker of its loader) reading some of them.

    Args:
        files: all files, in the same order in every process.
        rank, size: number of this process, and how many there are.
    """

    def __init__(self, files: Sequence[Path], rank: int, size: int) -> None:
        self.files, self.rank, self.size = list(files), rank, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        for path in self.files[self.rank + self.size * worker :: self.size * workers]:
            x, y = torch.load(path, weights_only=True)
            yield from zip(x, y, strict=True)


def write_shards(folder: Path, sizes: Sequence[int] = (40, 7, 33, 25, 1)) -> list[Path]:
    """Files of so many examples each: three classes in the plane."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    paths = []
    for number, size in enumerate(sizes):
        y = torch.randint(3, (size,), generator=generator)
        x = centres[y] + torch.randn(size, 2, generator=generator)
        paths.append(folder / f"shard-{number:03}.pt")
        torch.save((x, y), paths[-1])
    return paths


def network() -> nn.Module:
    """The same small network in every process; a real one would be loaded from its checkpoint here."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))


def run(files: Sequence[Path], group: Any = None) -> lk.LaplacePosterior:
    """A fitted posterior over all files, the same in every process of the group."""
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    loader = DataLoader(Shards(files, rank, size), batch_size=8)
    return lk.LaplacePosterior(network(), "categorical").fit(loader, process_group=group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fits, prints what this process read and what all of them hold; the first process saves."""
    parser = argparse.ArgumentParser(prog="examples.distributed", description=__doc__)
    parser.add_argument("--shards", type=Path, help="folder of shard-*.pt files (default: some are made)")
    parser.add_argument("--out", type=Path, help="file for the posterior")
    options = parser.parse_args(arguments)
    group = None
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        group = dist.group.WORLD
    try:
        with TemporaryDirectory() as folder:
            files = sorted(options.shards.glob("*.pt")) if options.shards else write_shards(Path(folder))
            posterior = run(files, group)
        first = group is None or dist.get_rank() == 0
        if first and options.out:
            posterior.save(options.out)
        who = "one process" if group is None else f"process {dist.get_rank()} of {dist.get_world_size()}"
        print(f"{who}: N = {posterior.n_data:g}, log evidence {float(posterior.log_evidence()):.6f}", flush=True)
    finally:
        if group is not None:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
