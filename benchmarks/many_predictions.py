"""Predictions of thousands of classes beside hand-written code that draws from the structure: one input, one thread.

Heads of 50,000 classes have output factors of low rank plus diagonal, and of the diagonal alone (``wide_rank=0``); the
hand-written code beside both is that of the diagonal. N is a million, so that the low rank counts.

Both run in one process, in turn. Seconds are processor seconds; memory is by how much the peak of resident memory
grows during one call over what was resident before it (Linux).
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRAWS, EXAMPLES = 100, 128
JOBS = ((1000, 512, None), (50_000, 96, 0), (50_000, 96, None), (50_000, 768, 0), (50_000, 768, None))
METHODS = ("linearized", "probit")
LIMITS = {  # of one input by method="linearized"
    "1000 classes: seconds": 0.020,
    "1000 classes: bytes": 20e6,
    "50000 classes: times hand-written": 1.3,
    "50000 classes: bytes": 200e6,
    "50000 classes, 96 wide, low rank: seconds": 0.100,
    "50000 classes, 768 wide, low rank: seconds": 0.100,
    "50000 classes, 768 wide, low rank: bytes": 200e6,
}


def growth(call: Callable[[], object]) -> float:
    """Bytes by which the resident memory grows at most while ``call`` runs."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed does not hide what this one takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    call()
    return resident("VmHWM") - before


def called(classes: int, width: int, rank: int | None) -> str:
    """A job's name."""
    side = {0: ", diagonal", None: ", low rank"}[rank] if classes > 8192 else ""
    return f"{classes} classes, {width} wide{side}"


def measure(classes: int, width: int, rank: int | None, rounds: int) -> dict[str, Any]:
    """One network in this process: every method, and the hand-written code after it in every round."""
    import time

    import torch
    from torch import nn

    import laplace_kf as lk
    from laplace_kf.structures.kron import Kronecker

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, classes))
    x, y = torch.randn(EXAMPLES, 32), torch.randint(0, classes, (EXAMPLES,))
    posterior, plain = (
        lk.LaplacePosterior(model, "categorical", structure, "exact", "last_layer").fit((x, y))
        for structure in (Kronecker() if rank is None else Kronecker(wide_rank=rank), Kronecker(wide_rank=0))
    )
    posterior.n_data = plain.n_data = 1e6
    matrix: Any = plain.precision.entries[0][1]  # its bases and the grid of its eigenvalues
    first = x[:1]
    outputs, inputs = matrix.outputs.dual, matrix.inputs.dual

    def weights(a: torch.Tensor) -> torch.Tensor:
        rotated = a if inputs is None else a @ inputs[0]
        return (rotated.square() @ matrix.grid[0].reciprocal().T)[0]

    def hand(method: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model[1](model[0](first))
            f = model[2](hidden)
            w = weights(torch.cat([hidden, torch.ones(1, 1)], 1))
            if method == "probit":
                variance = w if outputs is None else outputs[0].square() @ w
                return torch.softmax(f / (1 + math.pi / 8 * variance).sqrt(), -1)
            noise = torch.randn(DRAWS // 2, len(w)) * w.sqrt()
            spread = noise if outputs is None else noise @ outputs[0].T
            log_p = torch.log_softmax(torch.cat([f + spread, f - spread]), -1)
            p = log_p.exp()
            probs = p.mean(0)  # and what a prediction has besides: entropy and mutual information
            entropy = -(probs * probs.log()).sum()
            return torch.cat([probs, entropy[None], (entropy + (p * log_p).sum(-1).mean())[None]])

    def ours(method: str) -> object:
        return posterior.predict(first, method=method, samples=DRAWS)

    found: dict[str, Any] = {}
    for method in METHODS:
        seconds: dict[str, list[float]] = {"ours": [], "hand": []}
        calls = {"ours": lambda m=method: ours(m), "hand": lambda m=method: hand(m)}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                call()
                seconds[name].append(time.process_time() - start)
        middle = {name: sorted(each)[len(each) // 2] for name, each in seconds.items()}
        found[method] = {
            "seconds": middle["ours"],
            "hand_written_seconds": middle["hand"],
            "times_hand_written": middle["ours"] / middle["hand"],
            "bytes": growth(calls["ours"]),
            "hand_written_bytes": growth(calls["hand"]),
        }
    return found


def run(rounds: int = 5) -> dict[str, Any]:
    """Every network in a fresh process, the median of ``4 * rounds`` calls each, and whether the limits hold."""
    costs: dict[str, Any] = {}
    for classes, width, rank in JOBS:
        job = f"b.measure({classes}, {width}, {rank}, {4 * rounds})"
        code = f"import json, benchmarks.many_predictions as b; print(json.dumps({job}))"
        out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        for method, cost in json.loads(out.stdout.splitlines()[-1]).items():
            costs[f"{called(classes, width, rank)}, {method}"] = cost
    few, many, low, _, wide = (costs[f"{called(*job)}, linearized"] for job in JOBS)
    found = {
        "1000 classes: seconds": few["seconds"],
        "1000 classes: bytes": few["bytes"],
        "50000 classes: times hand-written": many["times_hand_written"],
        "50000 classes: bytes": many["bytes"],
        "50000 classes, 96 wide, low rank: seconds": low["seconds"],
        "50000 classes, 768 wide, low rank: seconds": wide["seconds"],
        "50000 classes, 768 wide, low rank: bytes": wide["bytes"],
    }
    return {
        "workload": f"one input, {DRAWS} draws, Kronecker posterior of the last layer, one thread, float32",
        "costs": costs,
        "limits": LIMITS,
        "met": {name: found[name] <= limit for name, limit in LIMITS.items()},
    }


def text(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [result["workload"], f"{'job':48} {'ms':>8} {'by hand':>8} {'ratio':>6} {'MB':>7} {'by hand':>8}"]
    for name, cost in result["costs"].items():
        lines.append(
            f"{name:48} {1000 * cost['seconds']:8.1f} {1000 * cost['hand_written_seconds']:8.1f} "
            f"{cost['times_hand_written']:6.2f} {cost['bytes'] / 1e6:7.1f} {cost['hand_written_bytes'] / 1e6:8.1f}"
        )
    lines += [f"{name}: {'met' if met else 'NOT met'}" for name, met in result["met"].items()]
    return "\n".join(lines)
