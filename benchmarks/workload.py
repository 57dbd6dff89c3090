"""What the benchmarks share: ReLU networks with random data, the autoencoder, and the peak of memory."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["autoencoder", "peak_bytes", "relu_network", "wide_mlp"]

Workload = tuple[nn.Module, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def wide_mlp(examples: int, batch: int) -> Workload:
    """784-1024-1024-10, as of :func:`relu_network`."""
    return relu_network((784, 1024, 1024, 10), examples, batch)


def relu_network(sizes: Sequence[int], examples: int, batch: int) -> Workload:
    """The untrained network, random inputs ``(N, sizes[0])`` and labels ``(N,)``, and both in batches."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = pairwise(sizes)
        layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
    x = torch.rand(examples, sizes[0], generator=rng)
    y = torch.randint(0, sizes[-1], (examples,), generator=rng)
    return model, x, y, [(x[i : i + batch], y[i : i + batch]) for i in range(0, examples, batch)]


def autoencoder() -> nn.Module:
    """The untrained 784-1000-500-250-30 autoencoder with its mirrored decoder: logistic units, linear code, logits."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), *([] if fan_out in (30, 784) else [nn.Sigmoid()])]
    return nn.Sequential(*layers)


def peak_bytes() -> int:
    """Peak resident bytes of this program; ``ru_maxrss`` would start from those of the process that called it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
