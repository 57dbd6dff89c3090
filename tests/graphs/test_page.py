"""The examples of docs/graphs.md run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "graphs.md"


def test_examples_of_the_page_run() -> None:
    pytest.importorskip("torch_geometric")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["prediction"].probs.shape == (1, 30, 3)
    assert names["prediction"].position_entropy.shape == (1, 30)
    assert names["posterior"].n_data == 1
