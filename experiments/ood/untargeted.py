"""E21: untargeted attacks on digit classifiers.

One fast gradient step of size ε away from the predicted class, through every predictive: mean entropy and accuracy
as ε grows. Pixels move by ε times their range over the training images.

Source: Botev 2020, 5.2.3, figure 5.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

import laplace_kf as lk
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Statement, judged
from experiments.ood.attacks import EDGE, AttackConfig, attacked, inside_grid, size
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run"]


@dataclass
class Config(AttackConfig):
    """Settings of E21.

    Args:
        epsilons: sizes of the step.
    """

    epsilons: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])

    def __post_init__(self) -> None:
        super().__post_init__()
        require("epsilons", self.epsilons, self.epsilons and min(self.epsilons) > 0, "numbers above 0")


Tuned = partial(Statement, needs="inside the grid", otherwise=EDGE)
STATEMENTS = (
    Tuned("entropy of the Kronecker posterior is above MAP's (mean over ε, difference)", "Kronecker - MAP", 1e-9),
    Tuned("and beyond MC dropout's", "Kronecker - MC dropout", 1e-9),
    Tuned("and beyond the diagonal posterior's", "Kronecker - diagonal", 1e-9),
    Tuned("the Kronecker posterior keeps a higher accuracy than MC dropout (mean over ε, difference)",
              "accuracy, Kronecker - MC dropout", 1e-9),
    Tuned("and so does the diagonal one", "accuracy, diagonal - MC dropout", 1e-9),
    Statement("MAP is more accurate than MC dropout (mean over ε, difference)", "accuracy, MAP - MC dropout", 0),
    Statement("and more certain of its mistakes (entropy of wrong predictions, difference)", "wrong, MAP - MC dropout",
              most=0),
)  # fmt: skip


def run(config: Config) -> Report:
    """Entropy and accuracy by method and ε."""
    shown: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {"entropy": {}, "accuracy": {}}
    details: dict[str, object] = {}

    def measure(seed: int) -> Found:
        found = attacked(config, seed)
        numbers: dict[str, float] = {}
        means: dict[str, dict[str, float]] = {}
        for name, predict in found.predictives.items():
            entropy, accuracy, wrong = [], [], []
            for epsilon in [0.0, *config.epsilons]:
                moved = lk.attacks.fgsm(predict, found.images, epsilon, found.ranges)
                with torch.no_grad():
                    prediction = predict(moved)
                right = prediction.probs.argmax(-1) == found.labels
                entropy.append(float(prediction.entropy.mean()))
                accuracy.append(float(right.double().mean()))
                wrong.append(prediction.entropy[~right])
                numbers[f"entropy, {name}, ε = {epsilon:g}"] = entropy[-1]
                numbers[f"accuracy, {name}, ε = {epsilon:g}"] = accuracy[-1]
            for what, values in (("entropy", entropy), ("accuracy", accuracy)):
                shown[what].setdefault(name, ([0.0, *config.epsilons], values))
            means[name] = {
                "entropy": sum(entropy[1:]) / len(config.epsilons),
                "accuracy": sum(accuracy[1:]) / len(config.epsilons),
                "wrong": float(torch.cat(wrong[1:]).mean()),
            }  # fmt: skip
        others = [name for name in means if name != "MAP"]
        details[f"tuned, seed {seed}"] = found.tuned
        for other in others:
            if other != "Kronecker":
                numbers[f"Kronecker - {other}"] = means["Kronecker"]["entropy"] - means[other]["entropy"]
        numbers["Kronecker - MAP"] = means["Kronecker"]["entropy"] - means["MAP"]["entropy"]
        for name in ("Kronecker", "diagonal"):
            difference = means[name]["accuracy"] - means["MC dropout"]["accuracy"]
            numbers[f"accuracy, {name} - MC dropout"] = difference
        for what in ("accuracy", "wrong"):
            numbers[f"{what}, MAP - MC dropout"] = means["MAP"][what] - means["MC dropout"][what]
        numbers["inside the grid"] = inside_grid(found)
        return numbers

    def pictures() -> Sequence[Picture]:
        return [lines(what, f"Mean {what} after a step of size ε, seed {config.seed}.", curves, ("ε", what))
                for what, curves in shown.items()]  # fmt: skip

    return judged(
        "E21: untargeted attacks",
        f"784-{config.hidden}-{config.hidden}-10 ReLU units with dropout on binarised MNIST.",
        config,
        measure,
        STATEMENTS,
        size=size(config),
        pictures=pictures,
        details=details,
    )
