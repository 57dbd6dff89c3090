"""What the diagnostics share: dense matrices of small networks, and walks over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.agreement import as_read
from laplace_kf.batches import Forward, as_batches
from laplace_kf.errors import ShapeMismatch
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.missing import check_batch
from laplace_kf.models import preserved, require_memory, usable
from laplace_kf.passes import Pass, walk
from laplace_kf.tape import FlatLayout, Observation, Tracer

__all__ = ["Dense", "Parameters", "cosine", "dense", "observed", "repeatable", "require_dense", "walked"]

Parameters = str | Sequence[str]
INSTEAD = "Dense matrices are for small networks: leave parameters out with parameters=[patterns], or take products."


@dataclass(frozen=True)
class Dense:
    """Gradient and Gauss-Newton matrix of a small network.

    Attributes:
        gradient: of the mean negative log-likelihood, ``(P,)``.
        ggn: mean Gauss-Newton matrix, ``(P, P)``.
        layout: flat order of the selected parameters.
        count: N.
    """

    gradient: Tensor
    ggn: Tensor
    layout: FlatLayout
    count: int

    @cached_property
    def modules(self) -> dict[str, Tensor]:
        """Flat positions ``(P_l,)`` of the parameters of every module, by its path."""
        found: dict[str, list[Tensor]] = {}
        start = 0
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            found.setdefault(name.rpartition(".")[0], []).append(torch.arange(start, start + size))
            start += size
        return {name: torch.cat(parts) for name, parts in found.items()}


def require_dense(size: int, like: Tensor, what: str) -> None:
    """Refuses a ``(size, size)`` matrix in the type and on the device of ``like`` (any shape) that does not fit.

    Raises:
        IncompatiblePair: says how much memory it needs.
    """
    require_memory(3 * size * size * like.element_size(), like.device, f"{what} of shape ({size}, {size})", INSTEAD)


def walked(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    visit: Callable[[Pass], None],
    forward: Forward | None,
    parameters: Parameters = "all",
) -> tuple[FlatLayout, int]:
    """:func:`laplace_kf.passes.walk` with a likelihood by name: flat order and number of examples."""
    return walk(model, get_likelihood(likelihood), data, visit, parameters=parameters, forward=forward)


def dense(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    forward: Forward | None,
    parameters: Parameters = "all",
) -> Dense:
    """Gradient and dense Gauss-Newton matrix, by products with every unit vector.

    Raises:
        IncompatiblePair: if the matrix does not fit into the memory.
    """
    sums: list[Tensor] = []

    def visit(seen: Pass) -> None:
        size, like = seen.layout.size, seen.weights[0]
        require_dense(size, like, "the Gauss-Newton matrix")
        found = [seen.gradient(), seen.ggn_rows(torch.eye(size, dtype=like.dtype, device=like.device))]
        sums[:] = found if not sums else [total + part for total, part in zip(sums, found, strict=True)]

    layout, count = walked(model, likelihood, data, visit, forward, parameters)
    ggn = sums[1] / count
    return Dense(sums[0] / count, (ggn + ggn.T) / 2, layout, count)


def cosine(u: Tensor, v: Tensor) -> float:
    """Cosine of the angle between two vectors ``(P,)``; 0 if one of them is zero."""
    size = float(u.norm() * v.norm())
    return float(u @ v) / size if size else 0.0


def repeatable(data: Any) -> Any:
    """Data that can be gone over again: an iterator is made into a list."""
    return list(data) if isinstance(data, Iterator) else data


def observed(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    visit: Callable[[Observation, Likelihood, Tracer], None],
    forward: Forward | None,
    parameters: Parameters = "all",
) -> None:
    """Goes over data on the tape, in eval mode; the model is left exactly as it was.

    Raises:
        ShapeMismatch: if the data are empty.
        UnsupportedLayer: if a parameter never took part.
    """
    model, rule = usable(model), get_likelihood(likelihood)
    with preserved(model):
        tracer = Tracer(model, forward, parameters)
        index = -1
        for index, batch in enumerate(as_batches(data, model)):
            check_batch(batch, index, "the batch", forward, rule.nan_is_missing)
            seen = tracer.observe(batch, index)
            rule = as_read(rule, model, seen.batch, forward, seen.outputs, seen.targets)
            rule.check(seen.outputs.detach(), seen.targets)
            visit(seen, rule, tracer)
        if index < 0:
            raise ShapeMismatch(
                "the data are empty: no batch was yielded; a generator that was read before is empty: give a list "
                "or a DataLoader"
            )
        tracer.require_all_seen()
