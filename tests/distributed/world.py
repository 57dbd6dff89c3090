"""A few processes of one gloo group, started once, that run functions sent to them."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports torch and the package once; every process is a fork of it.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["sympy", "torch._dynamo", "tests.distributed.jobs"]
)  # the first two come late otherwise


@dataclass(frozen=True)
class Failed:
    """What a process raised."""

    kind: str
    message: str
    trace: str


def _work(rank: int, size: int, place: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = job
        try:
            found = function(*arguments)
        except BaseException as error:
            found = Failed(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(found)
    dist.destroy_process_group()


class World:
    """``size`` processes; :meth:`run` runs one function in all of them."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        place = str(Path(self.folder.name) / "meeting")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(rank, size, place, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def results(self, ranks: Sequence[int], seconds: float = 120.0) -> dict[int, Any]:
        """What the processes gave; those that died are missing."""
        left = {self.pipes[rank]: rank for rank in ranks}
        found: dict[int, Any] = {}
        while left:
            ready = wait(list(left), seconds)
            assert ready, f"processes {sorted(left.values())} did not answer within {seconds} s"
            for pipe in ready:
                rank = left.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    continue
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results in the order of the ranks; what one raised fails the test."""
        self.send(function, *arguments)
        found = self.results(range(self.size))
        assert len(found) == self.size, f"only processes {sorted(found)} are alive"
        for rank, each in sorted(found.items()):
            assert not isinstance(each, Failed), f"process {rank}: {each.trace}"
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(None)
                except (BrokenPipeError, OSError):
                    continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def die() -> None:
    """Ends this process at once, as a machine that fails does."""
    os._exit(1)
