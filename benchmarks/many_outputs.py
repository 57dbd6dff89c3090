"""Thousands of classes: last-layer posteriors of a 512-wide layer, 256 examples, one thread.

Seconds are processor seconds of one run; memory is by how much the peak of a fresh process grows over what it was with
model and data loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.workload import peak_bytes

WIDTH, EXAMPLES = 512, 256
JOBS = (
    (1000, "kron", "exact"),
    (1000, "diag", "exact"),
    (1000, "kron", "sampled"),
    (50_000, "kron", "exact"),
    (50_000, "kron", "sampled"),
    (50_000, "kron, wide_rank=0", "exact"),
    (50_000, "kron, wide_rank=0", "sampled"),
    (50_000, "diag", "exact"),
)
LIMITS = {"fit_seconds": {1000: 1.0}, "predict_seconds": {1000: 0.020}, "predict_bytes": {1000: 100e6},
          "bytes": {1000: 2e9, 50_000: 2e9}}  # fmt: skip


def measure(classes: int, structure: str, estimator: str) -> dict[str, float]:
    """One job in this process: fit, and one input predicted with the defaults (100 samples)."""
    import time

    import torch
    from torch import nn

    import laplace_kf as lk

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
    x, y = torch.randn(EXAMPLES, 32), torch.randint(0, classes, (EXAMPLES,))

    with torch.no_grad():
        model(x)
    before = peak_bytes()
    start = time.process_time()
    name, _, option = structure.partition(", ")
    options: Any = {option.partition("=")[0]: int(option.partition("=")[2])} if option else {}
    posterior = lk.LaplacePosterior(
        model, "categorical", structure=name, estimator=estimator, parameters="last_layer", **options
    ).fit((x, y))
    fit = time.process_time() - start
    posterior.precision.logdet()  # the decomposition, made once
    decomposed, ready = time.process_time() - start - fit, peak_bytes()
    first = x[:1]
    posterior.predict(first)
    after = peak_bytes()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        posterior.predict(first)
        seconds.append(time.process_time() - start)
    return {
        "fit_seconds": fit,
        "decomposition_seconds": decomposed,
        "predict_seconds": sorted(seconds)[2],
        "predict_bytes": after - ready,
        "bytes": peak_bytes() - before,
    }


def run(rounds: int = 3) -> dict[str, Any]:
    """The median of every figure over ``rounds`` fresh processes, and whether the limits hold."""
    costs: dict[str, Any] = {}
    met: dict[str, bool] = {}
    for classes, structure, estimator in JOBS:
        found = []
        for _ in range(rounds if classes < 10_000 else 1):
            call = f"b.measure({classes}, {structure!r}, {estimator!r})"
            code = f"import json, benchmarks.many_outputs as b; print(json.dumps({call}))"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(json.loads(out.stdout.splitlines()[-1]))
        middle = {key: sorted(each[key] for each in found)[len(found) // 2] for key in found[0]}
        name = f"{classes} classes, {structure}, {estimator}"
        costs[name] = middle
        met.update(
            {f"{name}: {key}": middle[key] <= limit[classes] for key, limit in LIMITS.items() if classes in limit}
        )
    return {
        "workload": f"last layer of {WIDTH} inputs, {EXAMPLES} examples, one thread, float32",
        "costs": costs,
        "met": met,
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        result["workload"],
        f"{'job':44} {'fit s':>7} {'eigen s':>8} {'predict ms':>11} {'MB':>7} {'MB, predict':>12}",
    ]
    for name, cost in result["costs"].items():
        lines.append(
            f"{name:44} {cost['fit_seconds']:7.2f} {cost['decomposition_seconds']:8.2f} "
            f"{1000 * cost['predict_seconds']:11.1f} {cost['bytes'] / 1e6:7.0f} {cost['predict_bytes'] / 1e6:12.0f}"
        )
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
