"""Settings shared by every test."""

from __future__ import annotations

import gc
import itertools
import zlib
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from tests.contracts.design import covering
from tests.meter import Meter
from tests.workers import tell_less


def _prepare_torch() -> None:
    import torch

    # The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
    torch.set_num_threads(1)
    if torch.accelerator.is_available():
        return

    def seed_the_processor(seed: int) -> torch.Generator:
        return torch.default_generator.manual_seed(int(seed))

    # torch keeps the seed, and the text of the whole stack, for each kind of device that may still be found: a
    # thousand times the cost of seeding, several times in most tests.
    torch.manual_seed = torch.random.manual_seed = seed_the_processor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triples", action="store_true",
        help="all triples of registered rules in the contract tests, every case of those marked pairs, meets, share",
    )  # fmt: skip
    parser.addoption("--cpu", type=int, default=0, metavar="N", help="CPU seconds of the N dearest files and tests")


def pytest_configure(config: pytest.Config) -> None:
    # A process that only hands tests out (pytest-xdist's) begins without the seconds that torch takes to be imported.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _prepare_torch()
    if config.getoption("--cpu"):
        config.pluginmanager.register(Meter(config.getoption("--cpu")), "cpu")
    if hasattr(config, "workerinput"):
        tell_less(config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    """Every other process reads the files from the last to the first, so that it finds half of them compiled."""
    report: pytest.CollectReport = yield
    if _number(collector.config) % 2 and isinstance(collector, pytest.Directory):
        report.result.reverse()
    return report


def _number(config: pytest.Config) -> int:
    """Of a process that is handed tests; 0 of one alone."""
    return int(getattr(config, "workerinput", {}).get("workerid", "gw0")[2:])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first, so that none is begun when all others have ended.

    ``@pytest.mark.share(n)``: one in n of the cases of a test, unless ``--triples`` asks for all or one is asked for.
    """
    if hasattr(config, "workerinput"):  # in all processes alike, whichever files were read first
        items.sort(key=lambda item: item.path.parts)
    if not config.getoption("--triples"):
        cases = Counter(_function(item) for item in items)
        left_out = [item for item in items if cases[_function(item)] > 1 and not _in_its_share(item)]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            gone = set(left_out)
            items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _in_its_share(item: pytest.Item) -> bool:
    """By a sum of its name: the same cases in every process, and in every run until one is renamed."""
    mark = item.get_closest_marker("share")
    return mark is None or zlib.crc32(item.name.encode()) % mark.args[0] == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of combinations, of which few are run unless ``--triples`` asks for all.

    ``@pytest.mark.pairs(one=[...], two=[...], ...)``: with every pair of values in one of them.
    ``@pytest.mark.meets(one=[...], two=[...], ...)``: the values of the longest list with two of each other one.
    """
    everything = metafunc.config.getoption("--triples")
    for mark in metafunc.definition.iter_markers("pairs"):
        factors = {name: list(values) for name, values in mark.kwargs.items()}
        strength = len(factors) if everything else 2
        rows = covering({name: [str(k) for k in range(len(values))] for name, values in factors.items()}, strength)
        _run(metafunc, list(factors), [tuple(factors[name][int(k)] for name, k in row.items()) for row in rows])
    for mark in metafunc.definition.iter_markers("meets"):
        columns = [list(values) for values in mark.kwargs.values()]
        chosen = list(itertools.product(*columns)) if everything else _meetings(columns)
        _run(metafunc, list(mark.kwargs), chosen)


def _run(metafunc: pytest.Metafunc, names: list[str], rows: list[tuple[Any, ...]]) -> None:
    metafunc.parametrize(names, rows, ids=["-".join(map(_word, row)) for row in rows])


def _word(value: Any) -> str:
    """What stands for a value in the name of a test."""
    if isinstance(value, (tuple, list)):
        return "-".join(map(_word, value))
    return str(getattr(value, "__name__", value))


def _meetings(columns: list[list[Any]]) -> list[tuple[Any, ...]]:
    """Every value of the longest column twice, with others of every other column (where that has two)."""
    longest = max(columns, key=len)
    rows = {
        tuple(k % len(each) if each is longest else (k + turn) % len(each) for each in columns): None
        for turn in (0, 1)
        for k in range(len(longest))
    }
    return [tuple(each[k] for each, k in zip(columns, row, strict=True)) for row in rows]


# While modules are imported and tests collected nothing is garbage that is worth looking for ...
gc.disable()


def pytest_collection_finish() -> None:
    """... and what is there afterwards stays; later garbage is looked for less often than by default."""
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()
