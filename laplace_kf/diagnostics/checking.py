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
from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.models import lasting, preserved, usable
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


@lasting()
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
    directions = _Directions(generator)
    rules, implied = _by_rules(twin, rule, wide_batch, forward, directions)
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    walk(
        twin,
        rule,
        [wide_batch],
        lambda seen: found.append(_errors(twin, forward, seen, directions, implied)),
        forward=forward,
    )
    errors, parameters = found[0]
    off = tuple(name for name, error in errors.items() if not error <= tolerance)  # NaN is off
    return Check(errors, off, parameters, rules, tolerance)


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


class _Directions:
    """Random directions from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.seed: Tensor | None = None  # the column that is sent back, the same for rules and autograd

    def like(self, tensor: Tensor) -> Tensor:
        """Standard normal, of the shape of ``tensor``."""
        return standard_normal(tensor.shape, tensor, self.generator)

    def unit(self, size: int, like: Tensor) -> Tensor:
        """A direction of length 1, ``(size,)``."""
        drawn = standard_normal((size,), like, self.generator)
        return drawn / drawn.norm()

    def column(self, outputs: Tensor) -> Tensor:
        """The column of the shape of ``outputs``."""
        if self.seed is None or self.seed.shape != outputs.shape:
            self.seed = self.like(outputs.detach())
        return self.seed


def _by_rules(
    model: nn.Module, likelihood: Likelihood, batch: Any, forward: Forward | None, directions: _Directions
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Layer rules that failed by parameter name, and the gradients ``Jᵀw`` that all rules imply, parameter-shaped."""
    with preserved(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracer = Tracer(model, forward)
        tracer.observe(batch)
        failed = {name: block.failed for block in tracer.blocks.values() if block.failed for name in block.parameters}
        # as the rules say it where nothing else uses the parameter, as it is taken otherwise
        plain = Tracer(model, forward, verify=False) if failed else tracer
        seen = plain.observe(batch)
        implied: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, signal in seen.ruled_signals(directions.column(seen.outputs)[None]).items():
                block = plain.blocks[name]
                trusted = not failed or set(block.parameters) & set(failed) or name in tracer.blocks
                for parameter, part in (block.unpack(signal.total()[None]) if trusted else {}).items():
                    implied[parameter] = implied[parameter] + part[0] if parameter in implied else part[0]
    return failed, implied


def _errors(
    model: nn.Module, forward: Forward | None, seen: Pass, directions: _Directions, implied: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors by kind, and of the network's derivatives by parameter."""

    def outputs_at(change: Tensor) -> Tensor:
        parts = seen.layout.split(change[None])
        values = {n: w.detach() + parts[n][0] for n, w in zip(seen.layout.names, seen.weights, strict=True)}
        values.update({n: b.clone() for n, b in model.named_buffers()})
        with torch.no_grad():
            return substituted(model, values, lambda: run(model, seen.batch, forward))[0]

    pushed_error, pulled_error = _network(seen, outputs_at, directions, implied)
    rule, z = seen.likelihood, seen.outputs.detach()

    def log_prob(outputs: Tensor) -> Tensor:
        return rule.log_prob(outputs, seen.targets).detach()

    score, curvature = _likelihood(rule, z, seen.targets, log_prob, directions)
    errors = {
        "Jv": max(pushed_error.values()),
        "JTw": max(pulled_error.values()),
        "H_L": curvature,
        "score": score,
        "Gv": _gauss_newton(seen, outputs_at, log_prob, directions),
        "Hv": _hessian(seen, outputs_at, log_prob, directions),
    }
    return errors, {name: max(pushed_error[name], pulled_error[name]) for name in pushed_error}


def _network(
    seen: Pass, outputs_at: Callable[[Tensor], Tensor], directions: _Directions, implied: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of Jacobian products and of back-propagated columns, by parameter."""
    column = directions.column(seen.outputs)
    pulled = seen.layout.split(seen.pulled(column[None]))
    gradients = {
        name: [part[0]] + ([implied[name].to(part)] if name in implied else []) for name, part in pulled.items()
    }
    floor = 1e-6 * max(float(part.norm()) for parts in gradients.values() for part in parts)
    forward_error, backward_error = {}, {}
    start = 0
    for name, size in zip(seen.layout.names, seen.layout.sizes, strict=True):
        own = gradients[name]
        tries = [directions.unit(size, column)]
        tries += [part.reshape(-1) / part.norm() for part in own if float(part.norm()) > floor]
        forward_error[name] = backward_error[name] = 0.0
        for direction in tries:
            change = column.new_zeros(seen.layout.size)
            change[start : start + size] = direction
            jacobian = seen.pushed(change[None])[0]
            differences = [(outputs_at(e * change) - outputs_at(-e * change)) / (2 * e) for e in FIRST]
            least = 1e-6 * float(column.norm()) / size**0.5
            error = min(_relative(jacobian, found, least) for found in differences)
            forward_error[name] = max(forward_error[name], error)
            for part in own:
                along = float(part.reshape(-1) @ direction)
                scale = max(float(part.norm()) / size**0.5, floor)
                gaps = [_gap(along, float((column * found).sum()), scale) for found in differences]
                backward_error[name] = max(backward_error[name], min(gaps))
        start += size
    return forward_error, backward_error


def _likelihood(
    rule: Likelihood,
    z: Tensor,
    targets: Any,
    log_prob: Callable[[Tensor], Tensor],
    directions: _Directions,
) -> tuple[float, float]:
    """Errors of the score, and of Hessian, curvature and root, in the outputs ``z (N, ...)``."""
    slope = rule.score(z, targets).detach()
    matrix = rule.hessian(z, targets).detach()
    matrix = matrix if matrix.dim() == 4 else matrix[:, None]
    root = rule.hessian_root(z, targets).detach()
    score_error = curvature_error = 0.0
    for _ in range(3):
        u, w = directions.like(z), directions.like(z)
        along = (slope * u).flatten(1).sum(1)
        found = [(log_prob(z + e * u) - log_prob(z - e * u)) / (2 * e) for e in FIRST]
        score_error = max(score_error, min(_relative(along, part, 1e-6 * z.numel() ** 0.5) for part in found))
        rows = torch.einsum("ntc,ntcd,ntd->n", rule.to_positions(w), matrix, rule.to_positions(u))
        differences = [-_mixed(lambda a, b: log_prob(z + a * u + b * w), e) for e in SECOND]  # noqa: B023
        errors = [_closest(rows, differences)]
        product = (rule.curvature_product(z, u[None], targets)[0].detach() * w).flatten(1).sum(1)
        by_root = torch.einsum("vn,vn->n", (root * u).flatten(2).sum(2), (root * w).flatten(2).sum(2))
        errors.append(_relative(product, by_root, 1e-6))
        if rule.natural:  # otherwise the curvature is another matrix than the Hessian, on purpose
            errors += [_closest(product, differences), _closest(by_root, differences)]
        curvature_error = max(curvature_error, *errors)
    return score_error, curvature_error


def _gauss_newton(
    seen: Pass, outputs_at: Callable[[Tensor], Tensor], log_prob: Callable[[Tensor], Tensor], directions: _Directions
) -> float:
    """Error of ``uᵀ G v``, from differences of the outputs alone."""
    z, rule = seen.outputs.detach(), seen.likelihood
    v = directions.unit(seen.layout.size, z)
    product = seen.ggn_rows(v[None])[0]
    size = float(product.norm())
    error = 0.0
    for u in [directions.unit(len(v), z), *([product / size] if size else [])]:
        gaps = []
        for e in FIRST:
            du, dv = ((outputs_at(e * way) - outputs_at(-e * way)) / (2 * e) for way in (u, v))
            if rule.natural:
                scale = max(float(du.norm()), float(dv.norm()), 1e-12)
                values = [
                    -float(_mixed(lambda a, b: log_prob(z + a * du + b * dv), s / scale).sum())  # noqa: B023
                    for s in SECOND
                ]
            else:
                root = rule.hessian_root(z, seen.targets).detach()
                values = [float(((root * du).flatten(2).sum(2) * (root * dv).flatten(2).sum(2)).sum())]
            gaps += [_gap(float(u @ product), value, max(size / len(v) ** 0.5, 1e-7)) for value in values]
        error = max(error, min(gaps))
    return error


def _hessian(
    seen: Pass, outputs_at: Callable[[Tensor], Tensor], log_prob: Callable[[Tensor], Tensor], directions: _Directions
) -> float:
    """Error of ``uᵀ H v``, from differences of the loss alone."""
    v = directions.unit(seen.layout.size, seen.outputs.detach())
    product = seen.hessian_rows(v[None])[0]
    size = float(product.norm())
    error = 0.0
    for u in [directions.unit(len(v), v), *([product / size] if size else [])]:
        values = [-float(_mixed(lambda a, b: log_prob(outputs_at(a * u + b * v)), e).sum()) for e in SECOND]  # noqa: B023
        floor = max(size / len(v) ** 0.5, 1e-6 * max(1.0, float(log_prob(seen.outputs.detach()).abs().sum())))
        error = max(error, min(_gap(float(u @ product), value, floor) for value in values))
    return error


def _mixed(function: Callable[[float, float], Tensor], e: float) -> Tensor:
    """Mixed second difference of a function of two steps, of the shape of its values."""
    return (function(e, e) - function(e, -e) - function(-e, e) + function(-e, -e)) / (4 * e * e)


def _gap(a: float, b: float, floor: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), floor)


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    return float((a - b).norm()) / max(float(a.norm()), float(b.norm()), floor)


def _closest(a: Tensor, candidates: Sequence[Tensor]) -> float:
    """The smallest relative difference of ``a (N,)`` from the candidates."""
    return min(_relative(a, b, 1e-6 * len(a) ** 0.5) for b in candidates)
