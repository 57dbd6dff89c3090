"""Tables and verdicts of the pairs of image sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ood_pairs.problems import DEVELOPMENT, SOURCES
from laplace_kf.reports.html import Table

__all__ = ["TARGETS", "cells", "judged", "pairs_table", "quality_table", "rows", "targets_table"]

TARGETS = {("mnist", "notmnist"): 0.995, ("mnist", "fashion-mnist"): 0.98, ("digits 0-4", "rest"): 0.945}
"""AUROC that ``kind="auto"`` was meant to reach."""
AUTO = "auto"
RIVALS = ("MAP: entropy", "ensemble: information")
MIXTURE, ENSEMBLE = "mixture: auto", ("ensemble: entropy", "ensemble: information")
Found = Mapping[str, Mapping[str, Any]]


def named(source: str, stranger: str) -> str:
    """How a pair is called in tables."""
    return f"{source} → {'the other classes' if stranger == 'rest' else stranger}"


def rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: AUROC by pair and score; pairs for development come last and say so."""
    pairs = [
        (source, stranger, scores)
        for source in SOURCES
        for stranger, scores in found.get(source, {}).get("pairs", {}).items()
    ]
    columns = list(dict.fromkeys(name for _, _, scores in pairs for name in scores))
    body = []
    for source, stranger, scores in pairs:
        mark = " (development)" if source in DEVELOPMENT else ""
        body.append([named(source, stranger) + mark, *cells(scores, columns)])
    return ["pair", *columns], body


def cells(scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> list[str]:
    """AUROC of every score; a dash for one that was not measured."""
    return [f"{scores[name]['auroc']:.4f}" if name in scores else "–" for name in columns]


def pairs_table(found: Found) -> Table:
    """AUROC of every score on every pair."""
    note = (
        "AUROC, in-distribution test images against strangers. Auto: harmonic mean of the p-values of the "
        "entropy at the mean weights, of the leverage of the last layer's input, of its direction, and of the "
        "direction in all layers (last layer: without it; all layers: with their leverage too), with references from "
        "held-out images. Pairs "
        "marked as development are kept for settling constants of the scores; they are not judged."
    )
    return Table("AUROC", *rows(found), note)


def judged(found: Found) -> list[dict[str, Any]]:
    """Whether ``kind="auto"`` reaches its targets and is ahead of entropy and of the ensemble's information.

    And whether that of the mixture is ahead of the better score of the ensemble; pair by pair.
    """
    verdicts = []
    for source, part in found.items():
        if source in DEVELOPMENT:
            continue
        for stranger, scores in part["pairs"].items():
            of = {name: each["auroc"] for name, each in scores.items()}
            wanted = {f"at least {least}": least for pair, least in TARGETS.items() if pair == (source, stranger)}
            wanted |= {f"ahead of {rival}": of[rival] for rival in RIVALS}
            best = max(ENSEMBLE, key=lambda name: of[name])
            rows = [(AUTO, text, least) for text, least in wanted.items()]
            rows += [(MIXTURE, f"ahead of {best}", of[best])] if MIXTURE in of else []
            verdicts += [
                {"claim": f"{name} on {named(source, stranger)}: {text}", "value": of[name], "reference": least,
                 "verdict": "confirmed" if of[name] >= least else "refuted"}
                for name, text, least in rows
            ]  # fmt: skip
    return verdicts


def quality_table(found: Found) -> Table:
    """Accuracy and negative log-likelihood of the test images of what was trained on."""
    body = []
    for source, part in found.items():
        for name, of in part["quality"].items():
            body.append([source, name, f"{100 * of['accuracy']:.2f}", f"{of['nll']:.4f}", f"{100 * of['ece']:.2f}"])
    return Table("Known images", ["trained on", "prediction", "accuracy %", "NLL", "ECE %"], body, "")


def targets_table(verdicts: list[dict[str, Any]]) -> Table:
    """One row per claim."""
    body = [[v["claim"], f"{v['value']:.4f}", f"{v['reference']:.4f}", v["verdict"]] for v in verdicts]
    return Table("Claims", ["claim", "AUROC", "compared with", "verdict"], body, "", prose=True)
