"""CPU seconds of the dearest files and tests, for ``--cpu N``: the clock on the wall counts what others do."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

__all__ = ["Meter"]


def _spent() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


class Meter:
    """Measures every test in the process that runs it, and adds up in the one that reports.

    Args:
        most: how many files and how many tests are shown.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tests: Counter[str] = Counter()
        self.start = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.start = _spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append(("cpu", _spent() - self.start))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += sum(seconds for name, seconds in report.user_properties if name == "cpu")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: Counter[str] = Counter()
        for name, seconds in self.tests.items():
            files[name.split("::")[0]] += seconds
        for what, found in (("files", files), ("tests", self.tests)):
            terminalreporter.section(f"CPU seconds: dearest {what} of {found.total():.0f} s")
            for name, seconds in found.most_common(self.most):
                terminalreporter.write_line(f"{seconds:8.2f} {name}")
