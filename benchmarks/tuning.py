"""The default ``tune`` of 784-1024-1024-10 on 10,000 images, in training epochs of the same images, one thread.

An epoch is a forward and a backward pass with a step of SGD over all minibatches. Each prediction method alone is
measured beside the competition of all of them, with the epochs that ``tune`` itself counted.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.workload import wide_mlp

TRAIN, VALIDATION, BATCH = 2000, 10_000, 250
METHODS = ("auto", "probit", "mc")
LIMIT = 10.0


def _epoch(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = time.process_time()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.process_time() - start


def run(rounds: int = 5) -> dict[str, Any]:
    """Processor seconds of tuning over those of an epoch, per method, with what ``tune`` counted."""
    torch.set_num_threads(1)
    model, _, _, train = wide_mlp(TRAIN, BATCH)
    _, _, _, validation = wide_mlp(VALIDATION, BATCH)
    costs: dict[str, Any] = {}
    for method in METHODS:
        found = []
        for seed in range(min(rounds, 2)):
            posterior = lk.LaplacePosterior(model, "categorical").fit(train)
            epoch = min(_epoch(model, validation) for _ in range(2))
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = posterior.tune(validation, method=method, generator=torch.Generator().manual_seed(seed))
            found.append((time.process_time() - start, epoch, result))
        seconds, epoch, result = min(found, key=lambda each: each[0] / each[1])
        costs[method] = {
            "seconds": seconds,
            "epochs": seconds / epoch,
            "counted": result.cost,
            "left_out": [each["method"] for each in result.candidates if "left_out" in each],
        }
    return {
        "workload": f"784-1024-1024-10, Kronecker posterior, tune on {VALIDATION} images, one thread, float32",
        "unit": "training epochs of the validation images",
        "costs": costs,
        "met": {"auto": costs["auto"]["epochs"] <= LIMIT},
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'method':12} {'s':>8} {'epochs':>8} {'counted':>8}"]
    for name, cost in result["costs"].items():
        left = f"  left out: {', '.join(cost['left_out'])}" if cost["left_out"] else ""
        lines.append(f"{name:12} {cost['seconds']:8.1f} {cost['epochs']:8.2f} {cost['counted']:8.2f}{left}")
    lines.append(f"auto: at most {LIMIT:g} epochs: {'met' if result['met']['auto'] else 'NOT met'}")
    return "\n".join(lines)
