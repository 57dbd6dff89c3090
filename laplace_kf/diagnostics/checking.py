"""Derivatives against central differences: which one of a model, likelihood or layer rule is off (methods 2.7)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, mapped, run, to_device
from laplace_kf.engine import preserved
from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.models import usable
from laplace_kf.operators import standard_normal
from laplace_kf.passes import Pass, walk
from laplace_kf.substitution import substituted
from laplace_kf.tape import Tracer

__all__ = ["Check", "check"]

FIRST = (1e-3, 1e-4, 1e-5)  # steps of first differences, in directions of length 1
SECOND = (1e-2, 1e-3, 1e-4)  # of second differences
COARSE = 5e-2  # allowed where the model does not run in float64


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        errors: relative error by name: ``Jv`` (Jacobian products), ``JTw`` (back-propagated columns, through layer
            rules and autograd), ``H_L`` (output Hessian, curvature and root), ``score`` (gradient of the log density
            in the outputs), ``Gv`` and ``Hv`` (products with Gauss-Newton matrix and Hessian).
        off: the names whose error is above the tolerance.
        parameters: largest error of ``Jv`` and ``JTw`` by parameter name.
        rules: parameters whose layer rule failed, with the rule's name.
        tolerance: what was allowed.
    """

    errors: Mapping[str, float]
    off: tuple[str, ...]
    parameters: Mapping[str, float]
    rules: Mapping[str, str]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return not self.off

    def __str__(self) -> str:
        lines = [f"{name:>6}  {error:.2e}{'  OFF' if name in self.off else ''}" for name, error in self.errors.items()]
        wrong = [name for name, error in self.parameters.items() if not error <= self.tolerance]
        lines += [f"wrong at parameter {name!r}" for name in wrong]
        lines += [f"layer rule {rule!r} is wrong at parameter {name!r}" for name, rule in self.rules.items()]
        return "\n".join(lines)


def check(
    model: nn.Module,
    likelihood: str | Likelihood,
    batch: Any,
    forward: Forward | None = None,
    *,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Check:
    """Compares every derivative that curvature is made of with central differences (methods 2.7; Martens 2016, 4.5.1).

    For an own likelihood, ``forward=``, layer rule or ``autograd.Function``. Works on a copy in float64; every
    parameter is moved on its own, so a wrong derivative of a small one is not lost among others. A wrong derivative
    does not raise. Kinks (ReLU) that a difference happens to step over do not count: the best of three step sizes does.

    Args:
        model: any model.
        likelihood: registered name or object.
        batch: one batch, as of a loader; a small one.
        forward: ``(model, batch) -> (outputs, targets)``.
        tolerance: relative error that counts as off (0.05 at the least where the model cannot run in float64).
        generator: random directions; by default always the same ones.

    Raises:
        IncompatiblePair: for a tolerance that is not positive.
        LaplaceKFError: what fitting would raise for this model, likelihood and batch.
    """
    if not 0 < tolerance < float("inf"):
        raise IncompatiblePair(f"tolerance must be positive, got {tolerance}")
    rule = get_likelihood(likelihood)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    twin, wide_batch = _double(usable(model), batch, forward)
    if twin is None:
        twin, wide_batch, tolerance = copy.deepcopy(usable(model)), batch, max(tolerance, COARSE)
    twin.zero_grad()
    seen: list[_Differences] = []

    def visit(found: Pass) -> None:
        differences = _Differences(twin, forward, found, generator)
        differences.measure()
        seen.append(differences)

    rules, implied = _by_rules(twin, rule, wide_batch, forward)
    _Differences.implied = implied
    walk(twin, rule, [wide_batch], visit, forward=forward)
    errors = seen[0].errors
    # not (≤): NaN is off
    off = tuple(name for name, error in errors.items() if not error <= tolerance)
    return Check(errors, off, seen[0].parameters, rules, tolerance)


def _double(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[nn.Module | None, Any]:
    """A float64 copy and the batch for it; ``None`` if the copy does not run."""
    wide = mapped(batch, lambda t: t.double() if t.is_floating_point() else t)
    try:
        twin = copy.deepcopy(model).double()
        with preserved(twin), torch.no_grad():
            first = next(twin.parameters(), None)
            outputs, _ = run(twin, wide if first is None else to_device(wide, first.device), forward)
    except (RuntimeError, TypeError, ValueError):
        return None, wide
    return (twin if outputs.dtype == torch.float64 else None), wide
