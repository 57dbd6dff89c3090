"""Puts the tables of :mod:`experiments.tables` into README.md and ``docs/``: no number is typed by hand."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

from experiments import overview
from experiments.job_tables import JOB_TABLES
from experiments.registry import EXPERIMENTS
from experiments.site_tables import SITE_TABLES
from experiments.tables import ROOT, STREAMS
from experiments.tables import TABLES as RESULT_TABLES
from experiments.verdicts import FOLDED

__all__ = ["COLLECTED", "PAGES", "ROOT", "TABLES", "render", "report", "write"]

TABLES = RESULT_TABLES | SITE_TABLES | JOB_TABLES
"""Functions that make the tables, by name."""

PAGES = {
    "README.md": (
        "ood_mnist",
        "calibration_short",
        "fit_cost",
        "continual_short",
        "optimizers",
        "predictions",
        "importance",
        "many_outputs",
        "support",
        "papers_short",
    ),
    "docs/many_outputs.md": ("wide_factors",),
    "docs/toy_regression.md": ("toy_regression",),
    "docs/ood_pairs.md": ("ood_pairs",),
    "docs/acquisition.md": ("labels",),
    "docs/attribution.md": ("attribution", "attribution_text", "attribution_peers", "attribution_cost"),
    "docs/bridges.md": ("bayesian_optimisation",),
    "docs/conditioning.md": ("pruning",),
    "docs/uci.md": ("uci",),
    "docs/calibration.md": ("calibration",),
    "docs/shakespeare.md": ("shakespeare",),
    "docs/recurrent.md": ("recurrent",),
    "docs/continual.md": tuple(STREAMS),
    "docs/chaining.md": ("penalty",),
    "docs/experiments.md": ("papers", "ood_mnist_published"),
    "docs/optimizers.md": ("autoencoders", "first_order_grid", "characters", "optimizers"),
    "docs/options.md": ("option_structures", "option_estimators", "option_methods", "option_scores", "option_chains"),
    "docs/benchmarks.md": (
        "aims",
        "cells",
        "peers",
        "fit_cost",
        "predictions",
        "importance",
        "auto_estimator",
        "many_outputs",
        "per_example",
        "quality",
    ),
    "docs/plans.md": ("plans",),
    "docs/migrating.md": ("migrating",),
    "docs/tutorials/large_models.md": ("tuning",),
}
"""Which tables stand on which page."""


def render(text: str, page: str = "README.md") -> str:
    """The text of a page with every marked table replaced by what the files say now.

    Raises:
        ValueError: if the text lacks the place of one of the page's tables.
    """
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no place for table {name!r}")
        text = pattern.sub(partial(_filled, TABLES[name]()), text)
    return text


def _folder(run: str) -> str:
    """Where ``python -m experiments run <run>`` writes."""
    experiment, _, out = run.partition(" --out ")
    return out or f"results/{experiment}"


COLLECTED = {
    "results/E20/result.json": "docs/results/ood_mnist.json",
    "results/E20/entropy.png": "docs/pictures/ood_mnist.png",
    "results/E20_published/result.json": "docs/results/ood_mnist_published.json",
    "results/E20_published/entropy.png": "docs/pictures/ood_mnist_published.png",
    "results/E19/result.json": "docs/results/toy_regression.json",
    "results/E19/bands.png": "docs/pictures/toy_regression.png",
    "results/marglik/marglik.json": "docs/results/marglik.json",
    "results/marglik/marglik.png": "docs/pictures/marglik.png",
    "results/demo/entropy.png": "docs/pictures/demo.png",
    "results/attribution/result.json": "docs/results/attribution.json",
    "results/attribution/influential.png": "docs/pictures/attribution.png",
    "results/attribution_text/result.json": "docs/results/attribution_text.json",
    "results/characters/result.json": "docs/results/characters.json",
    "results/labels/result.json": "docs/results/labels.json",
    "results/ood_pairs/result.json": "docs/results/ood_pairs.json",
    "results/uci/result.json": "docs/results/uci.json",
    "results/calibration/result.json": "docs/results/calibration.json",
    "results/calibration/differences.png": "docs/pictures/calibration.png",
    "results/E4/result.json": "docs/results/recurrent.json",
    "results/E4/errors.png": "docs/pictures/recurrent.png",
    "results/E14/result.json": "docs/results/autoencoders.json",
    "results/E14/curves.png": "docs/pictures/autoencoders_curves.png",
    "results/E14/mnist.png": "docs/pictures/autoencoders_mnist.png",
    "results/E14_grid/result.json": "docs/results/autoencoders_grid.json",
    "results/shakespeare/result.json": "docs/results/shakespeare.json",
    "results/shakespeare/characters.png": "docs/pictures/shakespeare.png",
    "results/shakespeare/histograms.png": "docs/pictures/shakespeare_histograms.png",
    **{
        f"results/{name}/result.json": f"docs/results/{name}.json"
        for name, entry in EXPERIMENTS.items()
        if entry.id.startswith("E") and entry.module and name not in FOLDED
    },
    **{f"{_folder(run)}/result.json": f"docs/results/{name}.json" for name, run in STREAMS.items()},
    **{
        f"{_folder(STREAMS[name])}/{picture}.png": f"docs/pictures/{name}.png"
        for name, picture in {
            "continual_permuted": "accuracy",
            "continual_permuted_50": "accuracy",
            "continual_disjoint": "accuracy",
            "continual_vision": "accuracy",
            "rotated_mnist": "accuracy",
            "streaming_regression": "error",
            "continual_multiplier": "sweep",
            "continual_terms": "accuracy",
            "multiplier_toy": "path",
        }.items()
    },
}


def _filled(content: str, place: re.Match[str]) -> str:
    return f"{place[1]}{content}\n{place[2]}"


def write() -> None:
    """Copies what runs of the experiments left under ``results/`` into ``docs/``, then rewrites the pages."""
    for source, target in COLLECTED.items():
        if (ROOT / source).is_file():
            (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, ROOT / target)
    for page in PAGES:
        (ROOT / page).write_text(render((ROOT / page).read_text(), page))
    report()


def report() -> Path:
    """Writes the page of all claims from the results that ``docs/`` holds."""
    pages: dict[str, list[str]] = {name: [] for name in {*COLLECTED.values()} if name.endswith(".json")}
    for source, target in COLLECTED.items():
        folder = source.rpartition("/")[0]
        if target.endswith(".png") and (result := COLLECTED.get(f"{folder}/result.json")) in pages:
            pages[result].append(f"../{target.removeprefix('docs/')}")
    return overview.write(ROOT / "docs" / "results", {Path(name).stem: drawn for name, drawn in pages.items()})
