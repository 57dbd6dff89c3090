"""Scores at drawn targets where every row has random numbers of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_kf.draws import Source
from laplace_kf.outputs.rows import map_rows

__all__ = ["drawn_scores"]


def drawn_scores(likelihood: Any, z: Tensor, y: Any, draws: Source) -> Tensor:
    """Scores ``(B, C)`` at targets drawn for rows ``z (B, C)``; ``y`` are the rows of the data's targets.

    Row by row where the rows have numbers of their own and the likelihood cannot use them at once: the class that says
    how it draws (``_draw``) does not say ``draws_by_row``. Drawn targets that are a tensor are scored all at once.
    """
    kind = _saying(likelihood, "_draw")
    if isinstance(draws, torch.Generator) or vars(kind).get("draws_by_row", False):
        found: Tensor = likelihood._position_drawn_score(z, y, draws)
        return found
    generators = draws.generators()
    if _saying(likelihood, "_position_drawn_score") is _saying(likelihood, "drawn_score"):  # not one of its own
        model = likelihood._drawn()
        drawn = [model.sample(z[b : b + 1], generator) for b, generator in enumerate(generators)]
        if all(isinstance(one, Tensor) for one in drawn):
            found = model.score(z, torch.cat(drawn))
            return found
        return torch.cat([model.score(z[b : b + 1], one) for b, one in enumerate(drawn)])
    rows = [
        likelihood._position_drawn_score(z[b : b + 1], map_rows(y, partial(_row, place=b)), generator)
        for b, generator in enumerate(generators)
    ]
    return torch.cat(rows)


def _saying(likelihood: Any, name: str) -> type:
    """The class that has a likelihood's attribute."""
    return next(one for one in type(likelihood).__mro__ if name in vars(one))


def _row(tensor: Tensor, place: int) -> Tensor:
    return tensor[place : place + 1]
