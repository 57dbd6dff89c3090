"""Settings shared by every test."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

# The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
torch.set_num_threads(1)


@functools.cache
def missing(feature: str) -> bool:
    """Whether a feature of the public contract is not there yet: its name is unknown, or the method is absent.

    ``structure:NAME``, ``predict:METHOD``, ``tune:METHOD`` or the name of a method of ``LaplacePosterior``. Only a
    refusal of the *name* counts; any other error is left to the test.
    """
    import laplace_kf as lk

    kind, _, name = feature.partition(":")
    if not name:
        return not hasattr(lk.LaplacePosterior, kind)
    x = torch.zeros(2, 1)
    try:
        structure = name if kind == "structure" else "kron"
        posterior = lk.LaplacePosterior(nn.Linear(1, 1), "gaussian", structure=structure).fit([(x, x)])
        if kind == "predict":
            posterior.predict(x, method=name)
        if kind == "tune":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                posterior.tune((x, x), method=name, n_data=[2.0], prior_precision=[1.0])
    except (lk.errors.UnknownName, lk.errors.IncompatiblePair):
        return True
    except Exception:
        return False
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-features", action="store_true", help="fail, not skip, where a promised feature is missing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*features): skipped until the package has these features")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for feature in mark.args:
            if missing(feature) and not item.config.getoption("--all-features"):
                pytest.skip(f"{feature} is promised by the contract and not there yet")
