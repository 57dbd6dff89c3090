"""README's tables are what the result files and registries say."""

from __future__ import annotations

import pytest

from experiments import readme


def test_readme_is_up_to_date() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.render(text) == text, "run: python -m experiments readme"


def test_a_missing_place_is_reported() -> None:
    with pytest.raises(ValueError, match="ood_mnist"):
        readme.render("no tables here")
