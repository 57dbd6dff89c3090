"""Processor seconds of a job and of a training epoch, taken in turn in one process."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from laplace_kf.reports import machine, versions

__all__ = ["RESULTS", "epoch", "in_turn", "kept", "save"]

RESULTS = Path(__file__).parent / "results"


def epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Forward and loss backward over the batches, no optimiser step: the unit of cost."""
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()


def in_turn(jobs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds (all threads) of every job, ``rounds`` times in turn after one warm-up.

    Taking turns makes a drift of the machine's speed hit all jobs alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], unit: str) -> dict[str, dict[str, float]]:
    """Each job's cost in units of one job, round by round: median, minimum, maximum, and its median seconds."""
    out = {}
    for name, values in seconds.items():
        per_round = [value / one for value, one in zip(values, seconds[unit], strict=True)]
        out[name] = {
            "ratio": statistics.median(per_round),
            "ratio_min": min(per_round),
            "ratio_max": max(per_round),
            "seconds": statistics.median(values),
        }
    return out


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, made once: a line of ``path`` with this key has it from then on (JSON values)."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    found = [value for name, value in lines if name == key]
    if found:
        return found[-1]
    value = json.loads(json.dumps(make()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps([key, value]) + "\n")
    return value


def save(name: str, result: Mapping[str, Any], out: Path) -> Path:
    """Writes ``result`` with versions and machine as ``out/name.json`` and returns the path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({**result, "versions": versions(), "machine": machine()}, indent=2) + "\n")
    return path
