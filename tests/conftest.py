"""Settings shared by every test."""

from __future__ import annotations

import gc

import pytest
import torch

# The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
torch.set_num_threads(1)


def _seed_the_processor(seed: int) -> torch.Generator:
    return torch.default_generator.manual_seed(int(seed))


if not torch.accelerator.is_available():
    # torch keeps the seed, and the text of the whole stack, for each kind of device that may still be found: a
    # thousand times the cost of seeding, several times in most tests.
    torch.manual_seed = torch.random.manual_seed = _seed_the_processor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--triples", action="store_true", help="contract tests over all triples of registered rules")


def pytest_collection_finish() -> None:
    """What is there now, modules and tests, stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
