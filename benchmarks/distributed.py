"""Two processes of one thread against one: wall-clock seconds of a fit, and what travels between the processes.

The processes are of one gloo group on this machine. They and the one process are measured in turn, after a warm-up; the
load of the machine is written beside the result, since wall-clock times of two processes mean nothing where other work
takes the cores. The size is that of MNIST's training images; every process holds its shard when the clock starts.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import laplace_kf as lk
from benchmarks.workload import relu_network

SIZES, BATCH, EXAMPLES, SIZE = (784, 512, 256, 10), 250, 60_000, 2
CASES = {"kron, exact": ("kron", "exact"), "kron, sampled": ("kron", "sampled"), "diag": ("diag", "exact")}


def _fit(structure: str, estimator: str, rank: int, size: int, group: Any) -> float:
    model, _, _, batches = relu_network(SIZES, EXAMPLES, BATCH)
    shard = list(batches)[rank::size]  # every process reads its own, before the clock starts
    posterior = lk.LaplacePosterior(model, "categorical", structure, estimator)
    if group is not None:
        dist.barrier(group)
    start = time.perf_counter()
    posterior.fit(shard, process_group=group)
    posterior.log_evidence()  # with its eigenbases, which the processes have dealt out
    return time.perf_counter() - start


def _work(rank: int, place: str, rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=SIZE)
    for _ in range((rounds + 1) * len(CASES)):
        case = pipe.recv()
        pipe.send(_fit(*CASES[case], rank, SIZE, dist.group.WORLD))
    dist.destroy_process_group()


def run(rounds: int = 5) -> dict[str, Any]:
    """Seconds of a fit with one process and with two, by structure and estimator, and how much faster two are."""
    torch.set_num_threads(1)
    before = os.getloadavg()
    seconds: dict[str, dict[str, list[float]]] = {name: {"1": [], "2": []} for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        pipes, processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(Path(folder) / "meeting"), rounds, theirs))
            process.start()
            pipes.append(mine)
            processes.append(process)
        for number in range(rounds + 1):
            for name, found in seconds.items():
                for pipe in pipes:
                    pipe.send(name)
                together = max(pipe.recv() for pipe in pipes)
                alone = _fit(*CASES[name], 0, 1, None)
                if number:
                    found["2"].append(together)
                    found["1"].append(alone)
        for process in processes:
            process.join()
    cases = {
        name: {
            "seconds": {size: statistics.median(values) for size, values in found.items()},
            "best": {size: min(values) for size, values in found.items()},
            "speedup": statistics.median(found["1"]) / statistics.median(found["2"]),
            "speedup_of_best": min(found["1"]) / min(found["2"]),
        }
        for name, found in seconds.items()
    }
    return {
        "workload": f"{'-'.join(map(str, SIZES))}, {EXAMPLES} examples, batch {BATCH}, float32, gloo on one machine",
        "unit": f"wall-clock seconds of fit and log_evidence, median of {rounds} rounds, one thread a process",
        "cores": os.cpu_count(),
        "load": {"before": before, "after": os.getloadavg()},
        "cases": cases,
        "targets": {"speedup": 1.7},
    }


def text(result: dict[str, Any]) -> str:
    """A table of one line a case."""
    lines = [result["workload"], result["unit"], f"load before {result['load']['before']}, cores {result['cores']}"]
    lines.append(f"{'case':16} {'1 process':>10} {'2 processes':>12} {'faster':>8} {'of the best':>12}")
    for name, each in result["cases"].items():
        one, two = each["seconds"]["1"], each["seconds"]["2"]
        lines.append(f"{name:16} {one:10.3f} {two:12.3f} {each['speedup']:8.2f} {each['speedup_of_best']:12.2f}")
    return "\n".join(lines)
