"""The default ``tune`` of 784-1024-1024-10 on 10,000 images, in training epochs of the same images, one thread.

An epoch is a forward and a backward pass with a step of SGD over all minibatches. Each prediction method alone is
measured beside the competition of all of them, with the epochs that ``tune`` itself counted. Beside it, where timm is
installed, a small vision transformer: its whole posterior likewise, and that of its last layer in forward passes of the
network over the validation images, counted by a hook and by processor time.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.models.torchvision import torchvision_or_standin
from benchmarks.workload import wide_mlp

TRAIN, VALIDATION, BATCH = 2000, 10_000, 250
METHODS = ("auto", "probit", "mc")
LIMIT = 10.0
IMAGES = 100
"""Validation images of the vision transformer."""
TRANSFORMER_LIMIT, LAST_LAYER_LIMIT = 40.0, 2.0


def _epoch(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = time.process_time()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.process_time() - start


def _transformer() -> dict[str, Any]:
    """ViT-tiny with four blocks on 32x32 images: ``tune`` of its whole posterior, and of the last layer's."""
    try:
        with torchvision_or_standin():
            import timm
    except ImportError:
        return {}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=10).eval()
    x, y = torch.randn(IMAGES, 3, 32, 32), torch.randint(0, 10, (IMAGES,))
    train, validation = [(x[:20], y[:20])], [(x[i : i + 50], y[i : i + 50]) for i in range(0, IMAGES, 50)]
    epoch = min(_epoch(model, validation) for _ in range(2))
    with torch.no_grad():
        start = time.process_time()
        for images, _ in validation:
            model(images)
        forward = time.process_time() - start
    found: dict[str, Any] = {}
    for parameters in ("all", "last_layer"):
        posterior = lk.LaplacePosterior(model, "categorical", parameters=parameters).fit(train)
        seen = [0]

        def count(_: nn.Module, args: tuple[Tensor, ...], seen: list[int] = seen) -> None:
            seen[0] += len(args[0])

        hook = model.blocks[0].register_forward_pre_hook(count)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = posterior.tune(validation, generator=torch.Generator().manual_seed(0))
        seconds = time.process_time() - start
        hook.remove()
        found[parameters] = {
            "seconds": seconds, "epochs": seconds / epoch, "counted": result.cost, "passes": seconds / forward,
            "passes_counted": seen[0] / IMAGES,
        }  # fmt: skip
    return found


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
    transformer = _transformer()
    met = {"auto": costs["auto"]["epochs"] <= LIMIT}
    if transformer:
        met["ViT-tiny, 4 blocks: epochs"] = transformer["all"]["epochs"] <= TRANSFORMER_LIMIT
        met["last layer of ViT-tiny: forward passes"] = transformer["last_layer"]["passes_counted"] <= LAST_LAYER_LIMIT
        met["last layer of ViT-tiny: time of forward passes"] = transformer["last_layer"]["passes"] <= LAST_LAYER_LIMIT
    return {
        "workload": f"784-1024-1024-10, Kronecker posterior, tune on {VALIDATION} images, one thread, float32",
        "unit": "training epochs of the validation images",
        "costs": costs,
        "transformer": transformer,
        "limits": {
            "auto": LIMIT,
            "ViT-tiny, 4 blocks: epochs": TRANSFORMER_LIMIT,
            "last layer of ViT-tiny: forward passes": LAST_LAYER_LIMIT,
            "last layer of ViT-tiny: time of forward passes": LAST_LAYER_LIMIT,
        },
        "met": met,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'method':12} {'s':>8} {'epochs':>8} {'counted':>8}"]
    for name, cost in result["costs"].items():
        left = f"  left out: {', '.join(cost['left_out'])}" if cost["left_out"] else ""
        lines.append(f"{name:12} {cost['seconds']:8.1f} {cost['epochs']:8.2f} {cost['counted']:8.2f}{left}")
    for name, cost in result["transformer"].items():
        lines.append(
            f"ViT-tiny, {name}: {cost['epochs']:.2f} epochs ({cost['counted']:.2f} by its own count), "
            f"{cost['passes']:.2f} forward passes by time, {cost['passes_counted']:.2f} by count"
        )
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
