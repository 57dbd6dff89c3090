"""How a Hessian-free step uses its CG run: when to stop watching the true objective, which iterate to take.

The three recipes of methods 7.9 and the one of the recurrent experiments (7.3), as rows of a registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from laplace_kf.optim.cg import Run
from laplace_kf.registry import Registry

__all__ = ["RECIPES", "Recipe", "Watch", "backtracked", "falling_back", "last", "smallest", "worse_than_before"]

Value = Callable[[Tensor], float]
Watch = Callable[[list[float]], bool]
Choice = Callable[[Run, Value], Tensor]


def last(run: Run, value: Value) -> Tensor:
    """The last iterate ``(P,)``."""
    return run.x


def backtracked(run: Run, value: Value) -> Tensor:
    """Walking back from the last kept iterate until the objective stops improving (methods 7.5); ``(P,)``."""
    best, lowest = run.x, value(run.x)
    for _, x in reversed(run.kept[:-1]):
        found = value(x)
        if not found < lowest and lowest == lowest:  # NaN at the end must not stop the walk
            break
        if found == found:
            best, lowest = x, found
    return best


def smallest(run: Run, value: Value) -> Tensor:
    """The kept iterate with the smallest objective, ``(P,)``."""
    scored = [(found, k) for k, (_, x) in enumerate(run.kept) if (found := value(x)) == found]
    return run.kept[min(scored)[1]][1] if scored else run.x


def falling_back(reductions: list[float]) -> bool:
    """Whether the reduction of the objective fell below 90 % of the largest one of this run (methods 7.3)."""
    return max(reductions) > 0 and reductions[-1] < 0.9 * max(reductions)


def worse_than_before(reductions: list[float]) -> bool:
    """Whether the objective is clearly worse than a few looks before (methods 7.9 b)."""
    if len(reductions) < 4:
        return False
    before = reductions[-4]
    return reductions[-1] < before - 0.05 * abs(before)


@dataclass(frozen=True)
class Recipe:
    """One way to run and use CG.

    Attributes:
        limit: CG steps at most.
        decay: of the warm start.
        choose: which iterate becomes the update.
        watch: stops CG from the reductions of the objective on the curvature data at kept iterates, or ``None``.
        held_out: whether iterates are chosen on the data outside the curvature part.
    """

    limit: int = 250
    decay: float = 0.95
    choose: Choice = backtracked
    watch: Watch | None = None
    held_out: bool = False


RECIPES: Registry[Recipe] = Registry("Hessian-free recipe")
RECIPES.register("original")(Recipe())
RECIPES.register("held_out")(Recipe(choose=smallest, watch=worse_than_before, held_out=True))
RECIPES.register("short")(Recipe(limit=50, choose=last))
RECIPES.register("recurrent")(Recipe(limit=300, watch=falling_back))
