"""E22: targeted, iterated attacks on digit classifiers.

Steps of size 0.01 towards the digit 0, through every predictive, on images that it does not take for a 0: share
predicted as a 0, accuracy and entropy after every few steps.

Source: Botev 2020, 5.2.3, figure 5.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import laplace_kf as lk
from experiments.common.checks import require
from experiments.common.drawing import lines
from experiments.common.statements import Found, Statement, judged
from experiments.ood.attacks import EDGE, AttackConfig, attacked, inside_grid, size
from laplace_kf.reports.html import Picture, Report

__all__ = ["STATEMENTS", "Config", "run", "steps_until"]


@dataclass
class Config(AttackConfig):
    """Settings of E22.

    Args:
        target: the class that is aimed at.
        step: size of a step, in units of the pixels' ranges.
        steps: of the attack at most.
        every: steps between two looks.
    """

    target: int = 0
    step: float = 0.01
    steps: int = 50
    every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("target", self.target, 0 <= self.target <= 9, "a digit")
        require("step", self.step, self.step > 0, "above 0")
        require("every", self.every, 1 <= self.every <= self.steps, "from 1 to steps")


NEVER = f"a method was not fooled on half of the images within the steps, or {EDGE}"
STATEMENTS = (
    Statement("the Kronecker posterior is fooled on half of the images after about twice as many steps as MAP (ratio)",
              "Kronecker over MAP", 1.5, float("inf"), "2", "all fooled", NEVER),
    Statement("and as MC dropout", "Kronecker over MC dropout", 1.5, float("inf"), "2", "all fooled", NEVER),
    Statement("and as the diagonal posterior", "Kronecker over diagonal", 1.5, float("inf"), "2", "all fooled", NEVER),
    Statement("it takes about 20 steps for half of the images", "half, Kronecker", 15, 25, "20", "all fooled", NEVER),
    Statement("the others take about 10 (their mean)", "half, others", 7, 13, "10", "all fooled", NEVER),
    Statement("the diagonal one is like MC dropout", "diagonal over MC dropout", 0.75, 1.33, "1", "all fooled", NEVER),
    Statement("the Kronecker posterior's peak entropy is slightly lower than the largest of the others (ratio)",
              "peak entropy", 0.7, 1.0, "", "all fooled", NEVER),
)  # fmt: skip


def steps_until(share: float, steps: Sequence[int], fooled: Sequence[float]) -> float:
    """Where the share of fooled images reaches ``share``, linear between looks; infinite if it does not."""
    for k in range(1, len(steps)):
        if fooled[k] >= share:
            along = (share - fooled[k - 1]) / (fooled[k] - fooled[k - 1]) if fooled[k] > fooled[k - 1] else 0.0
            return steps[k - 1] + max(along, 0.0) * (steps[k] - steps[k - 1])
    return float("inf")


def run(config: Config) -> Report:
    """Shares, accuracies and entropies by method and step."""
    shown: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {"fooled": {}, "entropy": {}}
    details: dict[str, object] = {}
    looks = [*range(0, config.steps, config.every), config.steps]

    def measure(seed: int) -> Found:
        found = attacked(config, seed)
        numbers: dict[str, float] = {}
        for name, predict in found.predictives.items():
            with torch.no_grad():
                before = predict(found.images).probs.argmax(-1)
            keep = before != config.target
            x, labels = found.images[keep], found.labels[keep]
            fooled, entropy, accuracy = [], [], []
            for k, at in enumerate(looks):
                if k:
                    x = lk.attacks.targeted(predict, x, config.target, config.step, at - looks[k - 1], found.ranges)
                with torch.no_grad():
                    prediction = predict(x)
                guess = prediction.probs.argmax(-1)
                fooled.append(float((guess == config.target).double().mean()))
                accuracy.append(float((guess == labels).double().mean()))
                entropy.append(float(prediction.entropy.mean()))
            shown["fooled"].setdefault(name, (looks, fooled))
            shown["entropy"].setdefault(name, (looks, entropy))
            numbers[f"half, {name}"] = steps_until(0.5, looks, fooled)
            numbers[f"all, {name}"] = steps_until(0.995, looks, fooled)
            numbers[f"peak entropy, {name}"] = max(entropy)
            numbers[f"fooled in the end, {name}"] = fooled[-1]
            numbers[f"accuracy in the end, {name}"] = accuracy[-1]
        others = [name for name in found.predictives if name != "Kronecker"]
        for other in others:
            numbers[f"Kronecker over {other}"] = numbers["half, Kronecker"] / numbers[f"half, {other}"]
        numbers["half, others"] = sum(numbers[f"half, {other}"] for other in others) / len(others)
        numbers["diagonal over MC dropout"] = numbers["half, diagonal"] / numbers["half, MC dropout"]
        numbers["all fooled"] = inside_grid(found) * all(numbers[f"half, {name}"] < float("inf") for name in others)
        numbers["peak entropy"] = numbers["peak entropy, Kronecker"] / max(
            numbers[f"peak entropy, {o}"] for o in others
        )
        details[f"tuned, seed {seed}"] = found.tuned
        return numbers

    def pictures() -> Sequence[Picture]:
        return [lines(what, f"{what.capitalize()}, mean over images, seed {config.seed}.", curves, ("steps", what))
                for what, curves in shown.items()]  # fmt: skip

    return judged(
        "E22: targeted attacks",
        f"784-{config.hidden}-{config.hidden}-10 ReLU units with dropout on binarised MNIST; {config.steps} steps "
        f"towards {config.target}.",
        config,
        measure,
        STATEMENTS,
        size=size(config),
        pictures=pictures,
        details=details,
    )
