"""What the benchmarks share: the 784-1024-1024-10 network with random data, the autoencoder, the peak of memory."""

from __future__ import annotations

import resource
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["autoencoder", "peak_bytes", "wide_mlp"]


def wide_mlp(examples: int, batch: int) -> tuple[nn.Module, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The untrained network, random inputs ``(N, 784)`` and labels ``(N,)``, and both in batches."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    x = torch.rand(examples, 784, generator=rng)
    y = torch.randint(0, 10, (examples,), generator=rng)
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
