"""Second-order steps on the engine's factors: Botev's optimiser and K-FAC are settings of this one (methods 6).

Direction: the gradient through a damped inverse of running curvature. How far: the minimum of the exact quadratic
model along it, and along the previous update with ``momentum``. Damping: τ by Levenberg–Marquardt, ζ greedily.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from laplace_kf.curvature import make_pair
from laplace_kf.engine import Accumulator
from laplace_kf.errors import IncompatiblePair, NotFitted, NotPositiveDefinite
from laplace_kf.estimators import Estimator
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import preserved
from laplace_kf.operators import DAMPINGS, Matrix
from laplace_kf.optim.arguments import check_arguments
from laplace_kf.optim.base import Proposal, SecondOrder
from laplace_kf.optim.damping import GreedySearch, LevenbergMarquardt, StartSearch
from laplace_kf.optim.data_space import DataSpace, cheaper, gradient_factors
from laplace_kf.optim.inverse import INVERSES, damped_power
from laplace_kf.optim.links import Linked
from laplace_kf.optim.neighbours import hinted
from laplace_kf.optim.objective import Batch
from laplace_kf.optim.pending_step import agreed
from laplace_kf.optim.running import WARM_UP, Running
from laplace_kf.optim.settings import (
    Curvature,
    Factors,
    GaussNewtonDamping,
    GaussNewtonSettings,
    GaussNewtonStep,
    Scope,
    shows,
    sorted_into,
)
from laplace_kf.optim.shared_running import SharedRunning
from laplace_kf.optim.stepsize import model_change, optimal_coefficients
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.structures.base import Statistics, Structure
from laplace_kf.tape import Block, Observation

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GaussNewton"]

CONCERNS = (Factors, GaussNewtonDamping, GaussNewtonStep, Scope)

LEAST = 128  # examples that a part of a minibatch keeps: an eighth of a small one says nothing (methods 4.4)


def _combined(coefficients: Sequence[float], rows: Tensor) -> Tensor:
    """``Σ_k c_k rows_k`` of ``rows (K, P)``: for two or three, faster than a product with so flat a matrix."""
    total = rows[0] * coefficients[0]
    for coefficient, row in zip(coefficients[1:], rows[1:], strict=True):
        total.add_(row, alpha=coefficient)
    return total


def _inner(rows: Tensor) -> Tensor:
    """``rows rowsᵀ`` of ``rows (K, P)`` in float64, each product once."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for k, one in enumerate(rows):
        for j, other in enumerate(rows[: k + 1]):
            out[k, j] = out[j, k] = one @ other
    return out


class GaussNewton(SecondOrder):
    """Steps along the damped inverse of a running approximate curvature, as long as the exact model says.

    The defaults are Botev's optimiser; :func:`laplace_kf.optim.kfac` sets Martens's. The arguments are documented at
    the constructor; they are the fields of :class:`Factors`, :class:`GaussNewtonDamping`, :class:`GaussNewtonStep` and
    :class:`Scope` (:mod:`laplace_kf.optim.settings`).

    Attributes:
        diagnostics: ``tau, zeta, alpha, mu, rho, model_decrease, rejected`` of the last step
            (:class:`laplace_kf.optim.base.SecondOrder`).
    """

    zeta: float | None

    @shows(*CONCERNS, options='of structure and estimator, such as ``samples=`` of ``estimator="sampled"``.')
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        estimator: str | Estimator = "recursive",
        structure: str | Structure = "kron",
        **settings: Unpack[GaussNewtonSettings],
    ) -> None:
        """A second-order optimiser on running factors.

        Args:
            model: the module that is trained.
            likelihood: registered name or object; the loss is ``mean(−log p) + l2/2 ‖θ‖²``.
            estimator: ``"recursive"`` (KFRA), ``"sampled"`` (KFAC), ``"exact"`` (KFLR), ``"projection"``,
                ``"importance"`` or ``"auto"`` (``tolerance=``).
            structure: ``"kron"``, ``"diag"`` or another structure of the engine.

        Raises:
            UnknownName: for a name that is not registered.
            IncompatiblePair: for choices that do not work together, and numbers out of range.
            TypeError: for an argument that nothing takes.
        """
        (factors, damping, step, scope), options = sorted_into(settings, *CONCERNS)
        check_arguments(options)
        super().__init__(model, likelihood, step, scope, damping.tau)
        with hinted(Curvature, *CONCERNS):
            pair = make_pair(structure, estimator, options)
        self._set_factors(factors, *pair)
        self._set_damping(damping)
        self.rescale, self.momentum = step.rescale, step.momentum
        rules = self._accumulating, self.structure, self.ema, self.refresh, self._build
        ranks = self.peers.ranks
        self.running = Running(*rules) if ranks is None else SharedRunning(ranks, *rules)
        self._factored: list[Batch] = []  # the examples behind the factors of this step
        self._check: list[Batch] = []  # those of the exact products
        self._outer: dict[str, tuple[Tensor, Tensor]] = {}
        self._shortcut: list[Block] = []  # the blocks that these are of
        self._previous: Tensor | None = None

    def _set_factors(self, factors: Factors, inner: Structure, estimator: Estimator) -> None:
        """Which curvature is kept, and how it is inverted."""
        inner = inner.narrowed()
        self.estimator, self.inner = estimator, inner
        self.inverse, self.solver = INVERSES[factors.inverse], DAMPINGS[factors.damping]
        self.structure = self.inverse.structure(inner)
        self.damping, self.power = factors.damping, factors.power
        self.inverse.check(self.solver)
        self.factor_part, self.product_part = factors.parts
        product = self.solver.is_product and self.structure is inner
        if factors.low_rank and not product:
            raise IncompatiblePair(
                'low_rank=True needs inverse="block_diagonal" and damping="balanced" or "factored": inverses that are '
                "applied to the factors of a gradient are Kronecker products"
            )
        if self.peers.ranks is not None:
            self._require_additive(factors)
        self.ema, self.refresh, self.factors_every = factors.ema, factors.refresh, factors.factors_every
        wanted = factors.low_rank is None and self.peers.ranks is None and (self.refresh > 1 or not self.l2)
        self.low_rank = product and (bool(factors.low_rank) or wanted)
        self.data_space = DataSpace(self.l2)

    def _require_additive(self, factors: Factors) -> None:
        """Refuses what is not a sum over the minibatches of several processes."""
        wrong = None
        if self.structure.several_passes or factors.inverse != "block_diagonal":
            wrong = (
                f'structure={self.inner.name!r} with inverse={factors.inverse!r}: use structure="kron" or "diag" and '
            )
            wrong += 'inverse="block_diagonal"'
        if factors.low_rank:
            wrong = "low_rank=True: leave it out"
        if wrong is not None:
            raise IncompatiblePair(f"with process_group= factors are added up over processes, which leaves out {wrong}")

    def synchronize(self) -> None:
        """Adds up the processes' parts of the running factors, as the next refresh would; all of them call this.

        Before :meth:`state_dict` and :meth:`posterior` between refreshes. One process alone has nothing to do.

        Raises:
            DistributedFailure: if another process failed.
        """
        with self.peers.doing("synchronize"):
            self.running.fold()

    def _agreed(self, proposal: Proposal) -> Proposal:
        found, (self.tau, self.zeta) = agreed(self.peers, proposal, self.tau, self.zeta)
        return found

    def _set_damping(self, damping: GaussNewtonDamping) -> None:
        """Start values of τ and ζ, and how they move."""
        self.zeta = damping.zeta
        self.start = StartSearch() if damping.search_start else None
        self._free = (damping.tau is None, damping.zeta is None)
        self.adapt_tau, self.adapt_zeta = damping.adapt_tau, damping.adapt_zeta
        self.tau_rule = damping.tau_rule if damping.tau_rule is not None else LevenbergMarquardt()
        self.zeta_rule = damping.zeta_rule if damping.zeta_rule is not None else GreedySearch()

    # -- curvature -----------------------------------------------------------------------------------------------------

    def _wants_tape(self, data: Any) -> bool:
        # along a chain the exact products too need no pass of their own
        return self.factor_part == 1 or self.tracer.may_be_chain

    def _edges(self, observation: Observation | None) -> list[GradientEdge]:
        found = cheaper(observation) if observation is not None and self.low_rank and self._direct else []
        self._shortcut = [block for block, _ in found]
        return [edge for _, edge in found]

    def _measure(self, batch: Batch, observation: Observation | None, caught: Sequence[Tensor | None]) -> None:
        step = self.steps + 1
        if step <= WARM_UP or step % self.factors_every == 0:
            part = batch.part(self.factor_part, LEAST, self.generator)
            self._factored.append(part)
        else:
            part = None
        with self._calm(batch.seen if part is None else part.seen):
            if part is not None:
                self.running.take(part.data if part.seen is None else part.seen, self.steps)
            if observation is not None and caught:
                self._outer = gradient_factors(observation, self._shortcut, caught)

    def _accumulating(self, structure: Structure) -> Accumulator:
        return Accumulator(self.tracer, self.likelihood, self.estimator, structure, self.generator, self.dtype)

    @contextmanager
    def _calm(self, seen: Observation | None) -> Iterator[None]:
        """Curvature is that of the model in eval mode and full precision; along a chain that was seen it is not run."""
        if seen is not None and seen.chain is not None:
            yield
            return
        with preserved(self.model), torch.autocast(self.tracer.device.type, enabled=False):
            yield

    def _forget(self) -> None:
        self.running.forget()
        self._factored, self._check, self._outer = [], [], {}

    @property
    def statistics(self) -> Statistics | None:
        """The running factors, ``None`` before the first step.

        Raises:
            IncompatiblePair: if processes have parts of them that are not added up yet (:meth:`synchronize`).
        """
        self.running.require_whole()
        return self.running.statistics

    def _build(self, statistics: Statistics, zeta: float) -> Matrix:
        k = max(zeta + self.l2, 0.0)
        matrix = self.inverse.build(statistics, k, self.solver, self.power != 1.0)
        return damped_power(matrix, self.power)

    # -- the update ----------------------------------------------------------------------------------------------------

    def _propose(self, batches: Sequence[Batch], loss: float, gradient: Tensor) -> Proposal:
        with torch.autocast(self.tracer.device.type, enabled=False):  # curvature, solves and products in full precision
            return self._best(batches, gradient)

    def _best(self, batches: Sequence[Batch], gradient: Tensor) -> Proposal:
        with self._calm(None) if self.structure.several_passes else nullcontext():
            self.running.update(self.steps)
        assert self.tau is not None
        if self.zeta is None:
            self.zeta = self.tau
        if not self._check:
            self._check = [batch.part(self.product_part, LEAST, self.generator) for batch in batches]
            if self.start is not None and self.steps == 1:
                self._search_start(self.start, gradient)
        values = self.zeta_rule.candidates(self.steps, self.zeta, self.l2) if self.adapt_zeta else [self.zeta]
        fresh = len(values) > 1 or self.running.wants_fresh(self.steps)
        found: list[tuple[float, Matrix]] = []
        directions = gradient.new_empty(len(values) + 1, len(gradient))  # and the previous update
        for number, zeta in enumerate(values):
            try:
                matrix = self.running.fresh(zeta) if fresh else self.running.kept(zeta)
                solved = self._solved(matrix, zeta, gradient, fresh, several=len(values) > 1)
            except NotPositiveDefinite:
                if number + 1 == len(values) and not found:
                    raise
                continue
            torch.neg(solved, out=directions[len(found)])
            found.append((zeta, matrix))
        best, proposal = self._along(directions[: len(found) + 1], gradient)
        self.zeta, matrix = found[best]
        if fresh:
            self.running.keep(matrix, self.zeta)
        return proposal

    def _solved(self, matrix: Matrix, zeta: float, gradient: Tensor, fresh: bool, several: bool) -> Tensor:
        """``matrix⁻¹ gradient (P,)``, in the space of the data where the matrix stays for a while."""
        if fresh and self.l2 and (several or self.running.due(self.steps + 1)):
            self.data_space.forget()
            return matrix.solve(gradient)
        return self.data_space.solve(matrix, gradient, self._outer, self.named, max(zeta + self.l2, 0.0))

    def _search_start(self, search: StartSearch, gradient: Tensor) -> None:
        """Replaces the start values that were not given, from the ``gradient (P,)`` of the first step."""
        assert self.tau is not None and self.zeta is not None
        ladder = search.ladder(self.default_damping)
        taus, zetas = (
            ladder if free else [value] for free, value in zip(self._free, (self.tau, self.zeta), strict=True)
        )
        rates, here = self._rates(), self.objective.loss(self._check, {})
        decrease: dict[tuple[float, float], float] = {}
        for zeta in zetas:
            try:
                direction = self.running.fresh(zeta).solve(gradient).neg_()
            except NotPositiveDefinite:
                continue
            products = self.objective.products(self._check, self.layout.split(direction[None]))
            square, slope = (direction @ direction).double(), (direction @ gradient).double()[None]
            for tau in taus:
                alpha = 1.0
                if self.rescale:
                    alpha = float(optimal_coefficients(products + (tau + self.l2) * square, slope))
                delta = rates * alpha * direction
                after = self.objective.loss(self._check, self._moved(delta)) + self._l2_change(delta)
                decrease[tau, zeta] = here - after
        self.tau, self.zeta = search.chosen(decrease) or (self.tau, self.zeta)

    def _along(self, directions: Tensor, gradient: Tensor) -> tuple[int, Proposal]:
        """The minimum of the exact model along each of ``(K + 1, P)`` directions, the last row to be written yet.

        With momentum along the previous update as well.

        Returns:
            Which direction gives the lowest minimum, and the proposal.
        """
        count = len(directions) - 1
        last = []
        if self.momentum and self._previous is not None:
            directions[count] = self._previous
            last = [count]
        directions = directions[: count + len(last)]
        slope = (directions @ gradient).double()
        for k in range(count):
            if float(slope[k]) >= 0:  # round-off; the gradient itself always descends
                torch.neg(gradient, out=directions[k])
                slope[k] = (directions[k] @ gradient).double()
        rates = self._rates()
        measured = self.rescale or count > 1 or self._wants_ratio() or not isinstance(rates, float)
        curvature = self._curvature(directions) if measured else slope.new_full((len(slope), len(slope)), math.nan)
        parts = [parts for parts in (self._factored, self._check) if parts]
        check = min(parts, key=lambda parts: sum(part.count for part in parts))
        best: tuple[int, Proposal] | None = None
        for k in range(count):
            rows = [k, *last]
            seen, down = curvature[rows][:, rows], slope[rows]
            coefficients = optimal_coefficients(seen, down) if self.rescale else torch.ones_like(down)
            if isinstance(rates, float):
                change = model_change(rates * coefficients, seen, down)
            else:
                delta = rates * (coefficients.to(directions) @ directions[rows])
                change = model_change(
                    torch.ones(1, dtype=torch.float64), self._curvature(delta[None]), (delta @ gradient).double()[None]
                )
            if best is not None and not change < best[1].change:
                continue
            if isinstance(rates, float):
                chosen = directions if len(rows) == len(directions) else directions[rows]
                delta = _combined((rates * coefficients).tolist(), chosen)
            mu = float(coefficients[1]) if last else 0.0
            best = k, Proposal(delta, change, float(coefficients[0]), mu, check)
        assert best is not None
        if best[1].alpha == 0.0 and self.adapt_tau and float(slope[best[0]]) < 0:  # no curvature at all along it
            assert self.tau is not None
            self.tau = max(self.tau, 1e-6) / self.tau_rule.factor
        return best

    def _curvature(self, directions: Tensor) -> Tensor:
        """Products of directions ``(K, P)`` with the damped exact curvature, ``(K, K)`` float64."""
        assert self.tau is not None
        products = self.objective.products(self._check, self.layout.split(directions))
        return products + (self.tau + self.l2) * _inner(directions)

    def _more_damping(self, factor: float) -> None:
        assert self.tau is not None and self.zeta is not None
        self.tau, self.zeta = max(self.tau, 1e-6) * factor, max(self.zeta, 1e-6) * factor
        self.running.drop(self.zeta)

    def _wants_ratio(self) -> bool:
        return self.adapt_tau and self.tau_rule.due(self.steps)

    def _accepted(self, proposal: Proposal, rho: float | None) -> None:
        assert self.tau is not None
        if self._wants_ratio():
            self.tau = self.tau_rule.adapted(self.tau, rho)
        self._previous = proposal.delta if self.momentum else None

    def _damping(self) -> dict[str, float]:
        assert self.tau is not None and self.zeta is not None
        return {"tau": self.tau, "zeta": self.zeta}

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def posterior(
        self, n_data: float, prior_precision: float | None = None, damping: str = "exact"
    ) -> LaplacePosterior:
        """The running factors as a Laplace posterior at the current weights; no second pass over data.

        Args:
            n_data: N.
            prior_precision: λ; default ``n_data · l2``, which the training loss implies (methods 9.1), or 1 without.
            damping: of the posterior, see :class:`laplace_kf.LaplacePosterior`.

        Raises:
            NotFitted: before the first step.
        """
        if self.statistics is None:
            raise NotFitted("there are no running factors yet: take a step first")
        if prior_precision is None:
            prior_precision = n_data * self.l2 if self.l2 else 1.0
        statistics = self.statistics
        if isinstance(statistics.structure, Linked):
            statistics = statistics.structure.unlinked(statistics)
        posterior = LaplacePosterior(
            self.model,
            self.likelihood,
            structure=self.inner,
            estimator=self.estimator,
            parameters=list(self.layout.names),
            prior_precision=prior_precision,
            damping=damping,
            forward=self.user_forward,
            weights=self.weights,
            unused=self.unused,
        )
        return posterior.adopt(statistics.scale(n_data / statistics.count), n_data)

    def _mutable(self) -> list[Any]:
        return [self.running, self.data_space]

    def _export(self) -> dict[str, Any]:
        kept = {**self.running.export(), **self.data_space.export()}
        return {"zeta": self.zeta, "previous": self._previous, **kept}

    def _import(self, state: Mapping[str, Any]) -> None:
        device = self.tracer.device
        self.zeta = state["zeta"]
        self._previous = None if state["previous"] is None else state["previous"].to(device, self.dtype)
        self.running.load(state, device)
        self.data_space.load(state, self.named)
