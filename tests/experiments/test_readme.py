"""README's tables are what the result files and registries say."""

from __future__ import annotations

import pytest

from experiments import readme


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_are_up_to_date(page: str) -> None:
    text = (readme.ROOT / page).read_text()
    assert readme.render(text, page) == text, "run: python -m experiments readme"


def test_every_table_has_a_page() -> None:
    assert {name for names in readme.PAGES.values() for name in names} == set(readme.TABLES)


def test_a_missing_place_is_reported() -> None:
    with pytest.raises(ValueError, match="ood_mnist"):
        readme.render("no tables here")
