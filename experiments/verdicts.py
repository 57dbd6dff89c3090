"""Every claim of the papers in one form, whichever experiment judged it: what the overview pages are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.registry import EXPERIMENTS, Experiment

__all__ = ["FOLDED", "VIEWS", "WORDS", "Entry", "Verdict", "counts", "entries"]

ROOT = Path(__file__).parent.parent
WORDS = ("confirmed", "refuted", "not comparable")
"""What a verdict can be."""

FOLDED = {
    "E1": "autoencoders", "E2": "autoencoders", "E4": "recurrent", "E12": "autoencoders", "E14": "autoencoders",
    "E15": "autoencoders", "E19": "toy_regression", "E20": "ood_mnist", "E24": "multiplier_toy",
    "E25": "continual_permuted", "E26": "continual_multiplier", "E27": "continual_disjoint",
    "E28": "continual_vision", "E35": "continual_terms",
}  # fmt: skip
"""Experiments whose results have a name of their own under ``docs/results/``; the others have their id's."""
VIEWS = ("E1", "E2", "E12", "E15")
"""Experiments whose claims are some of E14's, on the same runs."""


@dataclass(frozen=True)
class Verdict:
    """One claim.

    Args:
        claim: in words.
        here: our number, with its spread over seeds where there is one.
        published: the papers' number, empty if they have none.
        verdict: one of :data:`WORDS`.
        why: what a comparison lacks, where it is not comparable.
        seeds: on how many seeds the claim holds, empty if that was not counted.
    """

    claim: str
    here: str
    published: str
    verdict: str
    why: str = ""
    seeds: str = ""


@dataclass(frozen=True)
class Entry:
    """One experiment: its claims, and what the run was that they are judged on.

    Args:
        id: ``E1`` to ``E35``.
        title: one line.
        verdicts: its claims; empty if nothing was judged.
        result: the content of its result file, None if there is none.
        own: whether the result file is about this experiment alone.
        command: what makes it.
    """

    id: str
    title: str
    verdicts: Sequence[Verdict]
    result: Mapping[str, Any] | None
    own: bool
    command: str

    @property
    def size(self) -> str:
        """How large the run was, beside the published one."""
        assert self.result is not None
        return str(self.result.get("size") or self.result.get("summary") or "")

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        assert self.result is not None
        return len(self.result.get("seeds", [self.result["seed"]]))


def counts(verdicts: Sequence[Verdict]) -> str:
    """``5 confirmed, 1 refuted``."""
    found = {word: sum(v.verdict == word for v in verdicts) for word in WORDS}
    return ", ".join(f"{count} {word}" for word, count in found.items() if count) or "none judged"


def entries(folder: Path = ROOT / "docs" / "results") -> Iterator[Entry]:
    """The 35 experiments in order, from the result files in ``folder``."""
    for entry in EXPERIMENTS.values():
        if re.fullmatch(r"E\d+", entry.id):
            path = folder / f"{FOLDED.get(entry.id, entry.id)}.json"
            result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            verdicts = [] if result is None else [_verdict(v) for v in _own(entry, result)]
            yield Entry(entry.id, entry.title, verdicts, result, entry.id not in FOLDED,
                        f"python -m experiments run {entry.id}")  # fmt: skip


def _own(entry: Experiment, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The verdicts of a result that are about this experiment: those on two methods that it runs."""
    found: list[Mapping[str, Any]] = [v for v in result.get("verdicts", []) if isinstance(v, Mapping)]
    if not any("problem" in v for v in found):
        return found
    _, config = runner.resolve(entry.id, [])
    methods = set(config.methods)
    return [v for v in found if {v["method"], v["other"]} <= methods]


def _verdict(found: Mapping[str, Any]) -> Verdict:
    if "problem" in found:  # a number out of the runs of two methods on one problem
        value = found["value"]
        here = "never reached" if value is None else f"{value:.4g} ({found['unit']})"
        return Verdict(f"{found['problem'].upper()}: {found['claim']}", here, "", found["verdict"])
    if "difference" in found:  # two methods, seed by seed
        here = (
            f"{found['value']['mean']:.4g} against {found['reference']['mean']:.4g} "
            f"(difference {found['difference']['mean']:+.4g} ± {found['difference']['std']:.2g})"
        )
        return Verdict(found["claim"], here, "", found["verdict"])
    here = f"{found['value']['mean']:.4g} ± {found['value']['std']:.2g}"
    return Verdict(found["claim"], here, found["published"], found["verdict"], found["why"], found["seeds"])
