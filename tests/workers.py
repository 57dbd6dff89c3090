"""What a process that runs tests tells the one that reports: of a test that passed, that it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

__all__ = ["tell_less"]


def tell_less(config: pytest.Config) -> None:
    """Leaves out of pytest-xdist's messages those that nobody reads, half of what a short test costs.

    That a test began or ended, that it was set up or torn down without a word: six messages become two. All are sent
    where an option asks for them (``--durations``, ``--junit-xml``, ``-v``).
    """
    asks = config.getoption("durations", None), config.getoption("xmlpath", None), config.getoption("verbose") > 0
    if any(each not in (None, False) for each in asks):
        return
    for plugin in config.pluginmanager.get_plugins():
        if type(plugin).__name__ == "WorkerInteractor":
            plugin.sendevent = _heard(plugin.sendevent)


def _heard(send: Any) -> Any:
    def sendevent(name: str, **content: Any) -> None:
        if name not in ("logstart", "logfinish") and not (name == "testreport" and _nothing_new(content["data"])):
            send(name, **content)

    return sendevent


def _nothing_new(report: Mapping[str, Any]) -> bool:
    """Whether a test was set up or torn down as it should be, and nothing was measured or printed then."""
    return (
        report["when"] != "call"
        and report["outcome"] == "passed"
        and not report["user_properties"]
        and not report["sections"]
    )
