"""The tutorials of the bridges run, where the libraries that they are about are installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_documentation import run_examples

PAGES = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "adapters"
NEEDS = {
    "avalanche": ("avalanche",),
    "botorch": ("botorch",),
    "lightning": ("lightning",),
    "optuna": ("optuna",),
    "scikit_learn": ("sklearn", "skorch"),
    "torch_uncertainty": ("torch_uncertainty",),
    "transformers": ("transformers", "accelerate", "peft"),
}


def test_every_page_says_what_it_needs() -> None:
    assert sorted(NEEDS) == sorted(page.stem for page in PAGES.glob("*.md"))


@pytest.mark.parametrize("name", sorted(NEEDS))
@pytest.mark.filterwarnings("ignore")
def test_tutorials_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS[name]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    import torch

    with torch.random.fork_rng(devices=[]):
        run_examples(PAGES / f"{name}.md")
