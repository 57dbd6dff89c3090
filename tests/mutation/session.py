"""One pytest session for all mutants: tests are collected once, and every mutant is a fork of that process.

First every test runs once, in a fork whose functions call a marker before each mutated statement: how long it takes,
and which mutants it reaches. Then each mutant meets the tests that reach it, quickest first, and after them the others
of the same files (which may look at what the first one computed). Time is processor time, so that a busy machine
changes no verdict.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from _pytest.runner import runtestprotocol

from tests.mutation import patched
from tests.mutation.mutants import Mutant

GRACE = 20.0  # seconds of processor time beyond what a test takes without a mutant, and its time again GRACES times
GRACES = 8.0


def limited(seconds: float) -> None:
    """Ends this process with status 3 if it uses more processor time than so many seconds from now."""
    used = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used, resource.RLIM_INFINITY))


def passed(item: pytest.Item, after: pytest.Item | None) -> bool:
    return not any(report.failed for report in runtestprotocol(item, nextitem=after, log=False))


def forked(work: Callable[[Callable[[Any], None]], None], wall: float) -> list[Any]:
    """What the work said in a fork of this process, in order; its last word is ``"hung"`` if it had to be ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, reading, writing)
    os.close(writing)
    os.set_blocking(reading, False)
    end, said, left = time.monotonic() + wall, b"", True
    while left and time.monotonic() < end:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
        left = not done
        while True:
            try:
                more = os.read(reading, 1 << 16)
            except BlockingIOError:
                break
            if not more:
                break
            said += more
    os.close(reading)
    words = [json.loads(line) for line in said.decode().splitlines() if line.endswith(("}", '"'))]
    if left:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return [*words, "hung"]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return words
    return [*words, "hung" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3 else "died"]


def _child(work: Callable[[Callable[[Any], None]], None], reading: int, writing: int) -> NoReturn:
    os.setsid()
    os.close(reading)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    signal.signal(signal.SIGXCPU, lambda *_: os._exit(3))
    try:
        work(lambda word: os.write(writing, (json.dumps(word) + "\n").encode()) and None)
    except BaseException as error:
        os.write(writing, (json.dumps(f"{type(error).__name__}: {error}"[:500]) + "\n").encode())
        os._exit(4)
    os._exit(0)


class Mutants:
    """A plugin of pytest that runs mutants in place of its tests.

    Args:
        sample: mutants, all in functions.
        done: keys of those that have a verdict.
        reached: file of what every test takes and reaches, added to.
        found: called with a mutant, its verdict, the test that noticed and the seconds it took.
        budget: seconds of tests for one mutant: those that reach it, and those beside them.
        thin: of the tests of a file with parameters, one in so many is tried; all where it is 1.
        end: when to stop, as :func:`time.monotonic` counts.
    """

    def __init__(
        self,
        sample: Sequence[Mutant],
        done: Container[str],
        reached: Path,
        found: Callable[[Mutant, str, str, float], None],
        budget: tuple[float, float],
        thin: int,
        end: float,
    ) -> None:
        self.sample, self.done, self.reached, self.found = sample, done, reached, found
        self.budget, self.thin, self.end = budget, thin, end

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        self.alive = patched.functions()
        assert self.alive, "no function of the package is to be found"
        seconds, reaching = self.coverage()
        for mutant in self.sample:
            if mutant.key in self.done:
                continue
            if time.monotonic() > self.end:
                break
            self.run(mutant, seconds, reaching.get(mutant.key, []))
        return True

    # ------------------------------------------------------------------------------------------- which tests reach what

    def coverage(self) -> tuple[dict[str, float], dict[str, list[str]]]:
        """Seconds of every test, and the tests that reach each mutant."""
        lines = self.reached.read_text(encoding="utf-8").splitlines() if self.reached.exists() else []
        known = {row["test"]: row for row in map(json.loads, lines)}
        often: dict[str, int] = {}
        left = []
        for item in self.items:  # each test function is there, with one in so many of its parameters
            name = item.nodeid.partition("[")[0]
            often[name] = often.get(name, -1) + 1
            if often[name] % self.thin == 0 and item.nodeid not in known:
                left.append(item)
        if left:
            print(f"{len(left)} of {len(self.items)} tests, to see what they reach", flush=True)
            for row in forked(lambda say: self.mark(left, say), wall=1e5):
                assert isinstance(row, dict), f"the tests did not come to their end: {row}"
        rows = map(json.loads, self.reached.read_text(encoding="utf-8").splitlines())
        reaching: dict[str, list[str]] = {}
        seconds = {}
        here = {item.nodeid for item in self.items}
        for row in rows:
            if row["test"] not in here:
                continue
            seconds[row["test"]] = row["seconds"]
            for reached in row["reaches"]:
                reaching.setdefault(reached, []).append(row["test"])
        return seconds, reaching

    def mark(self, items: Sequence[pytest.Item], say: Callable[[Any], None]) -> None:
        hits: set[int] = set()
        setattr(builtins, patched.HIT, hits.add)
        numbered: dict[str, dict[int, Mutant]] = {}
        for number, mutant in enumerate(self.sample):
            numbered.setdefault(mutant.file, {})[number] = mutant
        for file, mutants in numbered.items():
            patched.put(file, patched.marked(file, mutants), self.alive.get(file, {}))
        with self.reached.open("a", encoding="utf-8") as out:
            for item, after in zip(items, [*items[1:], None], strict=True):
                hits.clear()
                begun = time.process_time()
                right = passed(item, after)
                took = time.process_time() - begun
                row = {
                    "test": item.nodeid,
                    "seconds": round(took, 3),
                    "reaches": [self.sample[k].key for k in sorted(hits)],
                }
                if right:  # a test that fails without a mutant tells nothing
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    out.flush()

    # ------------------------------------------------------------------------------------------------------- one mutant

    def chosen(self, seconds: Mapping[str, float], reaching: Sequence[str]) -> list[pytest.Item]:
        """The tests for a mutant, those that reach it first, quickest first, within the budget."""
        inside = set(reaching)
        files = {test.partition("::")[0] for test in inside}
        beside = [name for name in seconds if name.partition("::")[0] in files and name not in inside]
        names: list[str] = []
        for some, budget in zip((reaching, beside), self.budget, strict=True):
            used = 0.0
            for name in sorted(some, key=lambda name: seconds[name]):
                if used < budget:
                    names.append(name)
                    used += seconds[name]
        by_name = {item.nodeid: item for item in self.items}
        return [by_name[name] for name in names if name in by_name]

    def run(self, mutant: Mutant, seconds: Mapping[str, float], reaching: Sequence[str]) -> None:
        items = self.chosen(seconds, reaching)
        if not items:
            self.found(mutant, "not reached", "", 0.0)
            return

        def work(say: Callable[[Any], None]) -> None:
            if not patched.put(mutant.file, patched.source_of(mutant), self.alive[mutant.file], mutant.line):
                say("unfit")
                return
            for item, after in zip(items, [*items[1:], None], strict=True):
                say({"test": item.nodeid})
                limited(GRACE + GRACES * seconds[item.nodeid])
                if not passed(item, after):
                    say("killed")
                    return
            say("survived")

        begun = time.monotonic()
        words = forked(work, wall=1800.0)
        by = next((word["test"] for word in reversed(words) if isinstance(word, dict)), "")
        last = words[-1] if words else "died"
        verdict = (
            last if last in ("killed", "survived", "unfit", "hung") else "killed"
        )  # a process that dies is noticed
        self.found(mutant, verdict, by if verdict in ("killed", "hung") else "", time.monotonic() - begun)
