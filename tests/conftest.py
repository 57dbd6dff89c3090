"""Settings shared by every test."""

from __future__ import annotations

import pytest
import torch

# The nets of the tests are tiny: threads cost more than they bring, and one thread makes sums reproducible.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--triples", action="store_true", help="contract tests over all triples of registered rules")
