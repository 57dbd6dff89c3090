"""Tables, verdicts and the picture of the attribution experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laplace_kf.reports.html import Table

__all__ = [
    "AIMS",
    "PUBLISHED",
    "judged",
    "score_rows",
    "score_table",
    "targets_table",
    "tried_note",
    "tried_rows",
    "tried_table",
    "wrong_rows",
    "wrong_table",
]

AIMS = {1: 0.30, 10: 0.45, 50: 0.50}
"""Linear datamodelling scores to reach, by number of networks."""
PUBLISHED = {1: "influence by conjugate gradients 0.26", 10: "TRAK-10 0.33", 50: "TRAK-50 0.45"}
"""Deng et al. 2024 (dattri), MNIST and MLP; their own networks, subsets and truth."""
MINUTES = 10.0
FOUND, AREA = 0.85, 0.97
Found = Mapping[str, Any]


def score_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: linear datamodelling score by method and number of networks."""
    counts = sorted({int(count) for each in found["scores"].values() for count in each["score"]})
    body = []
    for name, each in found["scores"].items():
        cells = [f"{each['score'][str(n)]:.3f}" if str(n) in each["score"] else "" for n in counts]
        body.append([name, *cells, f"{each['training_seconds']:.1f}", f"{each['seconds']:.1f}"])
    head = [f"{count} network{'s' if count > 1 else ''}" for count in counts]
    return ["method, training of the scores' networks", *head, "s, training", "s, scores"], body


def score_table(found: Found) -> Table:
    """Linear datamodelling scores."""
    note = (
        f"Mean over {found['queries']} queries of the Spearman correlation with the losses of {found['subsets']} "
        "networks trained on other random halves, one each. Seconds: processor time for one network, one thread; "
        "scores with the fit. Published, on networks and halves of their own: " + ", ".join(PUBLISHED.values()) + "."
    )
    return Table("Linear datamodelling score", *score_rows(found), note)


def tried_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: linear datamodelling scores on the development halves by passes and λ."""
    tried = found["tried"].get("score", {})
    dampings = list(next(iter(tried.values()))) if tried else []
    rows = [[epochs, *(f"{each[damping]:.3f}" for damping in dampings)] for epochs, each in tried.items()]
    return ["epochs of the scores' networks", *(f"λ = {damping}" for damping in dampings)], rows


def tried_note(found: Found) -> str:
    """What the comparison of settings was made with, and how far prediction can go."""
    tried = found["tried"]
    if not tried:
        return "Not compared."
    return (
        f"Averages over {tried['networks']} networks, against {tried['halves']} other halves than those of the truth. "
        "Losses of second networks on the same halves, with another seed, have a correlation of "
        f"{tried['retrained']:.3f} with those of the first; no prediction from the half alone can be expected above "
        f"its root, {max(tried['retrained'], 0) ** 0.5:.2f}."
    )


def tried_table(found: Found) -> Table:
    """Settings compared."""
    return Table("Settings tried on other halves", *tried_rows(found), tried_note(found))


def wrong_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Head and rows: wrong labels found by score and training time."""
    body = [
        [score, epochs, f"{each['found']:.1%}", f"{each['area']:.4f}"]
        for epochs, by_score in found["wrong"].items()
        for score, each in by_score.items()
    ]
    return ["score", "epochs", "found in the first 10 %", "AUC"], body


def wrong_table(found: Found) -> Table:
    """Wrong labels found."""
    note = f"{found['wrong_share']:.0%} of the labels are replaced by others at random; one network on all of them."
    return Table("Wrong labels", *wrong_rows(found), note)


def judged(found: Found) -> list[dict[str, Any]]:
    """What was aimed at, what was reached by the method that reached most, and whether that is enough."""
    verdicts = []
    for count, aim in AIMS.items():
        reached = {name: each["score"].get(str(count)) for name, each in found["scores"].items()}
        known = {name: value for name, value in reached.items() if value is not None}
        if known:
            best = max(known, key=lambda name: known[name])
            verdicts.append(_verdict(f"linear datamodelling score, {count}", aim, known[best], best))
            spent = count * (found["scores"][best]["training_seconds"] + found["scores"][best]["seconds"]) / 60
            verdicts.append(_verdict(f"minutes of one core, {count}", MINUTES, spent, best, most=True))
    every = [(f"{score}, {epochs} epochs", each) for epochs, by in found["wrong"].items() for score, each in by.items()]
    for key, aim, what in (("found", FOUND, "wrong labels in the first 10 %"), ("area", AREA, "AUC of wrong labels")):
        name, each = max(every, key=lambda pair: pair[1][key])
        verdicts.append(_verdict(what, aim, each[key], name))
    return verdicts


def _verdict(what: str, aim: float, value: float, method: str, most: bool = False) -> dict[str, Any]:
    met = value <= aim if most else value >= aim
    return {"what": what, "aim": aim, "reached": value, "method": method, "met": bool(met)}


def targets_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """Aims, met or not."""
    rows = [[v["what"], f"{v['aim']:g}", f"{v['reached']:.3f}", v["method"], "met" if v["met"] else "missed"]
            for v in verdicts]  # fmt: skip
    return Table("Aims", ["what", "aim", "reached", "by", "verdict"], rows, "Also where we lose.", prose=True)
