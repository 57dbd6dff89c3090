"""Settings shared by every test."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.contracts.design import covering

# The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
torch.set_num_threads(1)


def _seed_the_processor(seed: int) -> torch.Generator:
    return torch.default_generator.manual_seed(int(seed))


if not torch.accelerator.is_available():
    # torch keeps the seed, and the text of the whole stack, for each kind of device that may still be found: a
    # thousand times the cost of seeding, several times in most tests.
    torch.manual_seed = torch.random.manual_seed = _seed_the_processor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triples", action="store_true",
        help="all triples of registered rules in the contract tests, and every combination in tests marked `pairs`",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.pairs(one=[...], two=[...], ...)``: few combinations, with every pair of values in one of them."""
    for mark in metafunc.definition.iter_markers("pairs"):
        factors = {name: list(values) for name, values in mark.kwargs.items()}
        strength = len(factors) if metafunc.config.getoption("--triples") else 2
        rows = covering({name: [str(k) for k in range(len(values))] for name, values in factors.items()}, strength)
        chosen = [tuple(factors[name][int(k)] for name, k in row.items()) for row in rows]
        metafunc.parametrize(list(factors), chosen)


# While modules are imported and tests collected nothing is garbage that is worth looking for ...
gc.disable()


def pytest_collection_finish() -> None:
    """... and what is there afterwards stays; later garbage is looked for less often than by default."""
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
    gc.enable()
