"""What a fit costs, in training epochs: 784-1024-1024-10, 10 classes, batch 250, one thread, float32.

Every job runs over the same data in one process, in turn. laplace-torch is measured beside it if it is installed (its
fit includes its eigendecompositions; ours are lazy, so "kron exact + eigendecomposition" is the row to compare).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import laplace_kf as lk
from benchmarks.timing import epoch, in_turn, ratios
from benchmarks.workload import wide_mlp

EXAMPLES, BATCH = 10_000, 250
TARGETS = {"kron exact": 7.0, "kron sampled": 1.6, "diag exact": 3.5}


def run(rounds: int = 5) -> dict[str, Any]:
    """Costs of the fits as ratios to one training epoch."""
    torch.set_num_threads(1)
    model, x, y, batches = wide_mlp(EXAMPLES, BATCH)

    def fit(structure: str, estimator: str, **options: Any) -> Callable[[], Any]:
        return lambda: lk.LaplacePosterior(model, "categorical", structure, estimator, **options).fit(batches)

    def fit_and_decompose() -> None:
        fit("kron", "exact")().precision.logdet()

    jobs: dict[str, Callable[[], Any]] = {
        "training epoch": lambda: epoch(model, batches),
        "kron exact": fit("kron", "exact"),
        "kron exact + eigendecomposition": fit_and_decompose,
        "kron sampled": fit("kron", "sampled"),
        "kron importance": fit("kron", "importance"),
        "kron projection": fit("kron", "projection"),
        "kron recursive": fit("kron", "recursive"),
        "diag exact": fit("diag", "exact"),
        "diag sampled": fit("diag", "sampled"),
    }
    result: dict[str, Any] = {
        "workload": f"784-1024-1024-10, {EXAMPLES} examples, batch {BATCH}, one thread, float32",
        "unit": "processor seconds of one training epoch (forward, loss, backward) over the same batches",
        "costs": ratios(in_turn(jobs, rounds), "training epoch"),
        "targets": TARGETS,
    }
    result["met"] = {name: result["costs"][name]["ratio"] <= limit for name, limit in TARGETS.items()}
    result["laplace-torch"] = _peer(model, x, y)
    return result


def _peer(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """laplace-torch's Kronecker fit on a fifth of the data, as a ratio to an epoch on the same fifth."""
    try:
        from laplace import Laplace
    except ImportError as error:
        return {"not measured": f"laplace-torch cannot be imported: {error}"}
    part = EXAMPLES // 5
    data = torch.utils.data.TensorDataset(x[:part], y[:part])
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    batches = list(loader)

    def fit() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron").fit(loader)

    seconds = in_turn({"training epoch": lambda: epoch(model, batches), "laplace-torch kron": fit}, 2)
    return ratios(seconds, "training epoch")["laplace-torch kron"] | {"examples": part}


def text(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [result["workload"], f"{'job':34} {'epochs':>7} {'min':>7} {'max':>7} {'seconds':>8}"]
    for name, cost in result["costs"].items():
        limit = result["targets"].get(name)
        note = "" if limit is None else f"  (at most {limit}: {'met' if result['met'][name] else 'NOT met'})"
        lines.append(
            f"{name:34} {cost['ratio']:7.2f} {cost['ratio_min']:7.2f} {cost['ratio_max']:7.2f} "
            f"{cost['seconds']:8.2f}{note}"
        )
    peer = result["laplace-torch"]
    lines.append(f"{'laplace-torch kron':34} " + (f"{peer['ratio']:7.2f}" if "ratio" in peer else str(peer)))
    return "\n".join(lines)
