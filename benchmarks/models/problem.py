"""What a row of the table is: a third-party model, a batch as its users have it, and what has to be passed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Problem", "Row", "images", "rows"]

FAMILIES = ("vision", "language", "adapters", "graphs", "tabular", "segmentation", "tools")


@dataclass
class Problem:
    """A model with one minibatch.

    Attributes:
        model: the module, in eval mode.
        batch: what the loader of its users gives.
        likelihood: as for :class:`laplace_kf.LaplacePosterior`.
        options: further arguments of it.
        logits: ``(model, batch) -> (N, T, C)`` of a batch of examples, for the reference; by default from the batch.
        counted: which positions have a target that counts, ``(N, T)``; ``None`` for all.
        cut: ``(batch, n)``: example ``n`` alone; by default every tensor's row ``n``.
        curvature: ``(outputs (C,), n) -> (C, C)`` of example ``n``, for likelihoods that the reference does not know.
        names: the selected parameters, ``None`` for all that require gradients.
    """

    model: nn.Module
    batch: Any
    likelihood: Any = "categorical"
    options: Mapping[str, Any] = field(default_factory=dict)
    logits: Callable[[nn.Module, Any], Tensor] | None = None
    counted: Tensor | None = None
    cut: Callable[[Any, int], Any] | None = None
    curvature: Callable[[Tensor, int], Tensor] | None = None
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        package: the module that must be importable.
        name: the model's name.
        make: builds the problem; random weights, nothing is downloaded.
        passed: what has to be passed beside the model and the likelihood, in words or code.
    """

    package: str
    name: str
    make: Callable[[], Problem]
    passed: str = "nothing"


def images(make: Callable[[], nn.Module], size: int = 32) -> Callable[[], Problem]:
    """A classifier of three small images into three classes."""
    return lambda: Problem(make().eval(), (torch.randn(3, 3, size, size), torch.arange(3)))


def rows(families: Sequence[str] = FAMILIES) -> tuple[list[Row], list[Row]]:
    """Rows whose package is installed, and those that have to be left out."""
    every = [row for family in families for row in importlib.import_module(f"benchmarks.models.{family}").ROWS]
    here = {package: importlib.util.find_spec(package) is not None for package in {row.package for row in every}}
    return [row for row in every if here[row.package]], [row for row in every if not here[row.package]]
