"""Fits one row's model, compares its diagonal with a dense float64 reference, and measures costs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk
from benchmarks.models.problem import Problem, Row
from benchmarks.models.torchvision import torchvision_or_standin

__all__ = ["Result", "measure", "reference"]


@dataclass
class Result:
    """What was found for a row.

    Attributes:
        row: the row.
        parameters: number of selected parameters.
        error: relative error ``‖d − d_ref‖ / ‖d_ref‖`` of the diagonal; ``None`` if the model did not fit.
        fit: a Kronecker fit, in forward and backward passes over the same batch.
        tune: ``tune()`` as called without arguments, in the same unit.
        refused: the first line of the error, if there was one.
    """

    row: Row
    parameters: int = 0
    error: float | None = None
    fit: float | None = None
    tune: float | None = None
    refused: str = ""


def measure(row: Row, costs: bool = True) -> Result:
    """One row; with ``costs`` also what a fit and a tuning cost."""
    torch.manual_seed(0)
    result = Result(row)
    try:
        with torchvision_or_standin():
            problem = row.make()
        problem.model.double()
        problem.batch = _map(problem.batch, lambda t: t.double() if t.is_floating_point() else t)
        weights = _selected(problem)
        _move(weights)
        result.parameters = sum(p.numel() for p in weights.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result.error = _error(problem, weights)
            if costs:
                result.fit, result.tune = _costs(problem)
    except Exception as error:
        result.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return result


def _move(weights: Mapping[str, Tensor], scale: float = 0.05) -> None:
    """Moves all parameters a little, as training does: one that starts at 0 (a norm, a gate) hides all before it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights.values():
            weight += scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)


def _error(problem: Problem, weights: Mapping[str, Tensor]) -> float:
    stats = lk.curvature.estimate(
        problem.model, problem.likelihood, [problem.batch], structure="diag", **problem.options
    )
    found, expected = stats.mean().diag(), reference(problem, weights)
    return float((found - expected).norm() / expected.norm())


def reference(problem: Problem, weights: Mapping[str, Tensor]) -> Tensor:
    """Diagonal of the mean Gauss-Newton curvature, from dense Jacobians of one example after the other.

    Nothing of the package takes part.
    """
    logits = problem.logits or _logits
    count = len(_map_first(problem.batch)) if problem.cut is None else len(problem.batch)
    cut = problem.cut or (lambda batch, n: _map(batch, lambda t: t[n : n + 1]))
    total = torch.zeros(sum(p.numel() for p in weights.values()), dtype=torch.float64)
    for n in range(count):
        z = logits(problem.model, cut(problem.batch, n))  # (1, T, C)
        z = z.reshape(-1, z.shape[-1])
        for t in range(len(z)):
            if problem.counted is not None and not bool(problem.counted[n, t]):
                continue
            rows = [torch.autograd.grad(c, list(weights.values()), retain_graph=True, allow_unused=True) for c in z[t]]
            jacobian = torch.stack(
                [torch.cat([_flat(g, w) for g, w in zip(r, weights.values(), strict=True)]) for r in rows]
            )
            total += ((_output_curvature(problem, z[t].detach(), n) @ jacobian) * jacobian).sum(0)
    return total / count


def _flat(gradient: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(weight.numel(), dtype=torch.float64) if gradient is None else gradient.to_dense().reshape(-1)


def _output_curvature(problem: Problem, z: Tensor, n: int) -> Tensor:
    if problem.curvature is not None:
        return problem.curvature(z, n)
    if problem.likelihood == "categorical":
        p = z.softmax(0)
        return torch.diag(p) - torch.outer(p, p)
    if problem.likelihood == "bernoulli":
        p = z.sigmoid()
        return torch.diag(p * (1 - p))
    assert problem.likelihood == "gaussian"
    return torch.eye(len(z), dtype=z.dtype)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        found = model(**{name: value for name, value in batch.items() if name != "labels"})
        found = found.logits if hasattr(found, "logits") else found
    else:
        x = batch[0]
        found = model(*x) if isinstance(x, tuple) else model(x)
    z: Tensor = found if isinstance(found, Tensor) else found[0]
    return z.reshape(z.shape[0], -1, z.shape[-1])


def _costs(problem: Problem) -> tuple[float, float]:
    logits = problem.logits or _logits

    def train() -> None:
        logits(problem.model, problem.batch).square().mean().backward()

    step = min(_seconds(train) for _ in range(5))
    problem.model.zero_grad(set_to_none=True)
    posterior = lk.LaplacePosterior(problem.model, problem.likelihood, prior_precision=10.0, **problem.options)
    posterior.fit([problem.batch])  # what is found out once about a network belongs to the first fit, and to a warm-up
    fit = min(_seconds(lambda: posterior.fit([problem.batch])) for _ in range(3))
    return fit / step, _seconds(lambda: posterior.tune([problem.batch], generator=torch.Generator())) / step


def _seconds(job: Callable[[], Any]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def _selected(problem: Problem) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    return named if problem.names is None else {name: p for name, p in named.items() if name in set(problem.names)}


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _map(value, change) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(value, change) for value in batch)
    return batch.apply(change, *[k for k, v in batch.to_dict().items() if v.is_floating_point()])


def _map_first(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return _map_first(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
