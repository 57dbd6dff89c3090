"""The Laplace log evidence in its terms, and its maximum over prior precisions and the noise scale (methods 9.4).

At fixed weights and curvature the log evidence is concave in ``log λ`` of every block and ``log σ`` together: an
eigenvalue gives ``−½ log(1 + exp(u))`` with ``u`` linear in them, the rest are linear terms and ``−exp`` of linear
ones. So there is one maximum, and going up along one group of coordinates after the other finds it. With one λ its
slope is ``½ (γ − λ ‖θ*‖²)``, zero where λ is MacKay's effective number of parameters over ``‖θ*‖²``. That is so for
exact damping; with the other dampings every step is still an ascent.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from laplace_kf.likelihoods import Likelihood
from laplace_kf.operators import Blockwise, CurvatureBlock
from laplace_kf.operators.blockwise import prior_of
from laplace_kf.posterior.prior import PriorPrecision, prior_tensors
from laplace_kf.structures.base import Statistics
from laplace_kf.tape import FlatLayout

__all__ = ["Evidence", "EvidenceModel", "ascend", "squares_by_block"]

STEP = 3.0  # longest Newton step, in nats of λ or σ
LIMIT = 30.0  # |log λ| beyond which a maximum counts as infinitely far away
ROUNDS = 100


Slope = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """Terms of the Laplace log marginal likelihood, 0-dim tensors in nats; differentiable in λ and the noise scale.

    Attributes:
        fit: ``log p(D|θ*)``, times ``N`` over the number of examples seen.
        log_det_ratio: ``log|Λ| − log|Λ₀|`` with ``Λ₀ = λ I``: by how much the data narrow the prior, never negative.
        scatter: ``θ*ᵀ Λ₀ θ*``.
    """

    fit: Tensor
    log_det_ratio: Tensor
    scatter: Tensor
    _slope: Callable[[], Slope] | None = field(default=None, repr=False, compare=False)

    @property
    def total(self) -> Tensor:
        """``fit − ½ (log_det_ratio + scatter)``, 0-dim: the log evidence."""
        return torch.sub(self.fit, self.log_det_ratio + self.scatter, alpha=0.5)

    @cached_property
    def slope(self) -> Slope:
        """The derivative of :attr:`total` in λ, 0-dim in float64, without a graph: ``½ (γ/λ − ‖θ*‖²)``.

        With λ by name patterns, one for each pattern. For searches of one's own: it is a sum over eigenvalues in closed
        form, for a fraction of what a backward pass costs, and λ may be a plain number.
        """
        assert self._slope is not None, "an evidence that was not asked of a posterior"
        with torch.inference_mode(False), torch.enable_grad():
            return self._slope()

    def __str__(self) -> str:
        terms = {"fit": self.fit, "log_det_ratio": self.log_det_ratio, "scatter": self.scatter, "total": self.total}
        return "Evidence(" + ", ".join(f"{name}={float(value.detach()):.6g}" for name, value in terms.items()) + ")"


@dataclass(frozen=True)
class EvidenceModel:
    """What the evidence of a fitted posterior is made of, as a function of N, λ and the noise.

    Args:
        statistics: of the fit.
        curvature: its mean.
        squares: ``‖θ*‖²`` by block and parameter name, 0-dim in float64 (:func:`squares_by_block`).
        noise: the likelihood's parameters at the time of the fit.
        damping: how Kronecker blocks are damped.
    """

    statistics: Statistics
    curvature: Blockwise
    squares: dict[str, dict[str, Tensor]]
    noise: dict[str, float]
    damping: str

    def terms(self, n: float, prior: Tensor | dict[str, Tensor], likelihood: Likelihood) -> Evidence:
        """The evidence at ``N``, λ (0-dim in float64, or by parameter name) and the likelihood's noise scale."""
        factor, fit = self._rescaled(likelihood)
        fit = fit if n == self.statistics.count else fit * (n / self.statistics.count)
        if isinstance(prior, Tensor) and self._joint is not None:
            values, weights, square = self._joint
            return Evidence(fit, torch.dot(weights, (values * (n * factor) / prior).log1p()), prior * square)
        by_block = torch.stack(self._ratios(n, factor, prior))
        scatter = torch.stack(self._scatters(prior))
        return Evidence(fit, by_block.sum(), scatter.sum())

    def slope(self, n: float, factor: float | Tensor, prior: PriorPrecision, layout: FlatLayout) -> Slope:
        """The derivative of the evidence in λ, 0-dim, as :attr:`Evidence.slope` has it.

        Args:
            n: data count.
            factor: on the curvature since the fit.
            prior: λ as numbers.
            layout: with the names that λ's patterns stand for.
        """
        if self._joint is not None and not isinstance(prior, Mapping):
            values, weights, square = self._joint
            nodes = values * (n * factor)
            effective = torch.dot(weights, nodes / (nodes + prior))
            return effective.div_(prior).sub_(square).mul_(0.5)
        like = torch.zeros((), dtype=torch.float64)
        named = prior if isinstance(prior, Mapping) else {"": prior}
        leaves = {name: like.new_tensor(value).requires_grad_() for name, value in named.items()}
        given = prior_tensors(leaves if isinstance(prior, Mapping) else leaves[""], layout, like)
        parts = torch.stack([*self._ratios(n, factor, given), *self._scatters(given)])
        slopes = torch.autograd.grad(-parts.sum() / 2, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True)) if isinstance(prior, Mapping) else slopes[0]

    @cached_property
    def _joint(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Nodes and weights ``(M,)`` of all blocks' spectra together, and ``‖θ*‖²`` (0-dim): what one λ needs.

        ``None`` where a block has no such form.
        """
        matrices = [matrix for _, matrix in self.curvature.entries]
        if not all(isinstance(m, CurvatureBlock) and m.sums_over_nodes(self.damping) for m in matrices):
            return None
        values, weights = zip(*(m.nodes() for m in matrices if isinstance(m, CurvatureBlock)), strict=True)
        squares = torch.stack([square for own in self.squares.values() for square in own.values()])
        return torch.cat(values), torch.cat(weights), squares.sum()

    def _rescaled(self, likelihood: Likelihood) -> tuple[float | Tensor, Tensor]:
        known = (self.statistics.log_likelihood, self.statistics.terms, self.statistics.moments)
        factor, fit = likelihood.rescaled(self.noise, *known)
        return factor.double().cpu() if isinstance(factor, Tensor) else factor, fit

    def _ratios(self, n: float, factor: float | Tensor, prior: Tensor | dict[str, Tensor]) -> list[Tensor]:
        found = []
        for block, matrix in self.curvature.entries:
            assert isinstance(matrix, CurvatureBlock), f"block {block.name!r} is a {type(matrix).__name__}"
            found.append(matrix.log_det_ratio(n, factor, prior_of(block, prior), self.damping))
        return found

    def _scatters(self, prior: Tensor | dict[str, Tensor]) -> list[Tensor]:
        """``λ_b ‖θ_b*‖²`` of every block."""
        found = []
        for block, _ in self.curvature.entries:
            own = self.squares[block.name].items()
            found.append(torch.stack([(prior if isinstance(prior, Tensor) else prior[p]) * s for p, s in own]).sum())
        return found

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """For every block the number of its group: blocks that are parts of one parameter have one λ."""
        numbers: list[int] = []
        for k, (block, _) in enumerate(self.curvature.entries):
            numbers.append(k)
            before = [
                numbers[j] for j in range(k) if set(self.curvature.entries[j][0].parameters) & {*block.parameters}
            ]
            numbers = [min(before) if number in (k, *before) else number for number in numbers] if before else numbers
        order = {number: k for k, number in enumerate(dict.fromkeys(numbers))}
        return tuple(order[number] for number in numbers)

    def by_name(self, prior: Tensor) -> dict[str, Tensor]:
        """λ by parameter name from one value a group of blocks, ``(B,)``."""
        pairs = zip(self.curvature.entries, self.groups, strict=True)
        return {p: prior[group] for (block, _), group in pairs for p in block.parameters}

    def patterns(self, prior: Tensor) -> dict[str, float]:
        """:meth:`by_name` of ``(B,)`` as numbers, by patterns that match one name each."""
        return {glob.escape(name): float(value) for name, value in self.by_name(prior).items()}

    def maximise(
        self, n: float, start: Tensor, likelihood: Likelihood, noise: bool
    ) -> list[tuple[Tensor, float | None, float]]:
        """Climbs to the maximum over λ and, if asked, the noise scale.

        Args:
            n: data count.
            start: λ where to begin, float64: ``(1,)`` for one shared by all blocks, or ``(B,)`` for one a group.
            likelihood: with the noise scale where to begin.
            noise: whether to move it.

        Returns:
            λ like ``start``, the noise scale (None if it is not tuned) and the log evidence after every step; the last
            is the maximum, and no step goes down.
        """
        shared = len(start) == 1
        groups = torch.tensor(self.groups)
        sigma = likelihood.noise_scale if noise else None
        path: list[tuple[Tensor, float | None, float]] = []
        current = start

        def of_priors(u: Tensor) -> Tensor:
            factor, _ = self._rescaled(likelihood)
            prior = u.exp()
            given = prior[0] if shared else self.by_name(prior)
            parts = -(torch.stack(self._ratios(n, factor, given)) + torch.stack(self._scatters(given))) / 2
            return parts.sum()[None] if shared else torch.zeros_like(u).index_add(0, groups, parts)

        def of_noise(v: Tensor) -> Tensor:
            factor, fit = self._rescaled(likelihood.with_noise_scale(v.exp()[0]))
            given = current[0] if shared else self.by_name(current)
            return (fit * (n / self.statistics.count) - torch.stack(self._ratios(n, factor, given)).sum() / 2)[None]

        def note() -> float:
            given = current[0] if shared else self.by_name(current)
            path.append((current, sigma, float(self.terms(n, given, likelihood).total)))
            return path[-1][2]

        value = note()
        for _ in range(ROUNDS):
            for u in ascend(of_priors, current.log())[1:]:
                current = u.exp()
                note()
            if sigma is not None:
                for v in ascend(of_noise, torch.tensor([sigma], dtype=torch.float64).log())[1:]:
                    sigma = float(v.exp())
                    likelihood = likelihood.with_noise_scale(sigma)
                    note()
            before, value = value, path[-1][2]
            if sigma is None or value - before <= 1e-9 * abs(value):
                break
        return path


def squares_by_block(curvature: Blockwise, vector: Tensor) -> dict[str, dict[str, Tensor]]:
    """``‖v‖²`` of ``vector (P,)`` by block and parameter, of the entries that belong to the block and are not held."""
    parts = curvature.layout.hold(curvature.layout.split(vector[None].double()))
    found = {}
    for block, _ in curvature.entries:
        own = block.unpack(block.pack({name: parts[name] for name in block.parameters}))
        found[block.name] = {name: part.square().sum().cpu() for name, part in own.items()}
    return found


def ascend(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float = 1e-6) -> list[Tensor]:
    """Maximises a sum of concave functions of one coordinate each, by Newton steps that never go down.

    Args:
        objective: coordinates ``(K,)`` to terms ``(K,)``; term k depends on coordinate k only.
        start: where to begin, ``(K,)`` float64.
        tolerance: largest move of a coordinate at which to stop.

    Returns:
        The coordinates ``(K,)`` at the start and after every step.
    """
    with torch.enable_grad():  # whatever the caller's mode
        return _climb(objective, start.detach().clone(), tolerance)


def _climb(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> list[Tensor]:
    path = [start]
    value = objective(path[0]).detach()
    for _ in range(ROUNDS):
        point = path[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(point).sum(), point, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), point)
        slope = slope.detach()
        newton = torch.where(bend < 0, slope / -bend, slope.sign() * STEP).clamp(-STEP, STEP)
        move = (point.detach() + newton).clamp(-LIMIT, LIMIT) - point.detach()
        for _ in range(30):  # a coordinate that would go down takes half the step
            worse = ~(objective(path[-1] + move).detach() >= value)
            if not bool(worse.any()):
                break
            move = torch.where(worse, move / 2, move)
        move = torch.where(worse, 0.0, move)
        if float(move.abs().max()) == 0:
            break
        path.append(path[-1] + move)
        value = objective(path[-1]).detach()
        if float(move.abs().max()) < tolerance:
            break
    return path
