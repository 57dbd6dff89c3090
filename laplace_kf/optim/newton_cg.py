"""Hessian-free optimisation: the damped exact Gauss-Newton system solved by preconditioned CG (methods 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import check_finite, to_device
from laplace_kf.curvature import make_pair
from laplace_kf.engine import Accumulator
from laplace_kf.errors import IncompatiblePair, UnknownName, UnsupportedLayer
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import preserved
from laplace_kf.operators import Matrix
from laplace_kf.optim.arguments import check_arguments
from laplace_kf.optim.base import Proposal, SecondOrder
from laplace_kf.optim.cg import Map, Progress, Run, conjugate_gradients
from laplace_kf.optim.damping import LevenbergMarquardt, ratio
from laplace_kf.optim.exact_curvature import DISTANCES, ExactCurvature
from laplace_kf.optim.inverse import INVERSES
from laplace_kf.optim.neighbours import hinted
from laplace_kf.optim.objective import Batch, counting
from laplace_kf.optim.penalties import PENALTIES, Curvature
from laplace_kf.optim.preconditioner import PRECONDITIONERS, Preconditioner
from laplace_kf.optim.recipes import RECIPES, Recipe
from laplace_kf.optim.running_statistics import averaged, dumped, loaded
from laplace_kf.optim.settings import (
    Damping,
    HessianFreePreset,
    HessianFreeSettings,
    Preconditioning,
    Scope,
    Step,
    System,
    shows,
    sorted_into,
)
from laplace_kf.optim.stepsize import line_search
from laplace_kf.structures.base import Statistics
from laplace_kf.tape import Observation

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HessianFree", "hessian_free"]

CONCERNS = (System, Preconditioning, Damping, Step, Scope)
NEED_ONE = 'need a preconditioner; use preconditioner="kronecker" or "diagonal"'


class HessianFree(SecondOrder):
    """Steps that solve the damped exact Gauss-Newton system by preconditioned conjugate gradients.

    The arguments are documented at the constructor; they are the fields of :class:`System`, :class:`Preconditioning`,
    :class:`Damping`, :class:`Step` and :class:`Scope` (:mod:`laplace_kf.optim.settings`).

    Attributes:
        run: the last run of conjugate gradients.
        diagnostics: ``tau, zeta, alpha, mu, rho, model_decrease, rejected`` of the last step
            (:class:`laplace_kf.optim.base.SecondOrder`).
    """

    @shows(*CONCERNS, options="of the preconditioner's structure and estimator (``samples=``).")
    def __init__(self, model: nn.Module, likelihood: str | Likelihood, **settings: Unpack[HessianFreeSettings]) -> None:
        """A Hessian-free optimiser.

        Args:
            model: the module that is trained.
            likelihood: registered name or object; the loss is ``mean(−log p) + l2/2 ‖θ‖²``.

        Raises:
            UnknownName: for a name that is not registered.
            IncompatiblePair: for choices that do not work together, and numbers out of range.
        """
        (system, preconditioning, damping, step, scope), options = sorted_into(settings, *CONCERNS)
        check_arguments(options)
        super().__init__(model, likelihood, step, scope, damping.tau)
        if self.peers.ranks is not None:
            raise IncompatiblePair(
                "hessian_free works in one process: every product of its conjugate gradients would have to be added up "
                "over all of them. With process_group= use lk.optim.kfac(model, likelihood, process_group=...)"
            )
        self._set_preconditioner(preconditioning, damping, options)
        self._set_system(system)
        self.zeta, self.adapt_tau, self.adapt_zeta = damping.zeta, damping.adapt_tau, damping.adapt_zeta
        self.tau_rule = damping.tau_rule if damping.tau_rule is not None else LevenbergMarquardt(1, 2 / 3, 0.25, 0.75)
        self._running: Statistics | None = None
        self._metric: Matrix | None = None
        self._inverted_at = 0.0  # the damping that the preconditioner was made with
        self._is_chain: bool | None = None  # known from the first minibatch on
        self.run: Run | None = None  # the last CG run, for looking at
        self._solution: Tensor | None = None
        self._given: list[Batch] = []
        self._curved: list[Batch] = []
        self._rest: list[Batch] = []
        self._structures: dict[str, Statistics] = {}

    def _set_preconditioner(self, given: Preconditioning, damping: Damping, options: Mapping[str, Any]) -> None:
        """The structured curvature that preconditions, if there is one."""
        name = given.preconditioner
        if not isinstance(name, (str, Preconditioner, type(None))):
            raise IncompatiblePair(
                f"preconditioner= is a name ({', '.join(map(repr, sorted(PRECONDITIONERS)))}) or a "
                f'lk.optim.Preconditioner, got {name!r}; none is preconditioner="none"'
            )
        row = PRECONDITIONERS[name] if isinstance(name, str) else name
        if row is None:
            with hinted(*CONCERNS):
                make_pair("kron", "sampled", dict(options))  # refuses what no preconditioner takes
        asked = options or given.damping is not None or damping.zeta is not None or given.ema or given.refresh > 1
        if row is None and (asked or INVERSES[given.inverse] is not INVERSES["block_diagonal"]):
            raise IncompatiblePair(
                "zeta, ema, refresh, inverse, damping and estimator options belong to a preconditioner, and there is "
                'none; use preconditioner="kronecker" or "diagonal"'
            )
        if row is None and (given.kappa is not None or given.exponent is not None):
            raise IncompatiblePair(f"kappa and exponent {NEED_ONE}")
        if row is not None:
            row = replace(
                row,
                damping=given.damping or row.damping,
                inverse=given.inverse,
                power=row.power if given.exponent is None else given.exponent,
                options={**row.options, **options},
            )
            if row.power != 1 and row.damping != "exact":
                raise IncompatiblePair(f'exponent={row.power} needs damping="exact" for the preconditioner')
        with hinted(*CONCERNS):
            self.preconditioner, self.pair = row, None if row is None else row.pair()
        self.kappa, self.ema, self.refresh = given.kappa, given.ema, given.refresh

    def _set_system(self, given: System) -> None:
        """What is solved, and how conjugate gradients are run."""
        self.recipe = given.recipe if isinstance(given.recipe, Recipe) else RECIPES[given.recipe]
        if given.penalty is not None and given.scale_sensitive and given.penalty != "diagonal":
            raise IncompatiblePair(
                f'scale_sensitive=True is penalty="diagonal", and penalty={given.penalty!r} was given too'
            )
        self.penalty = given.penalty or ("diagonal" if given.scale_sensitive else "identity")
        self._penalty = PENALTIES[self.penalty]
        if given.reduction not in ("undamped", "damped"):
            raise UnknownName("model of the reduction ratio", given.reduction, ["undamped", "damped"])
        self.reduction = given.reduction
        if self.preconditioner is None and self.penalty == "preconditioner":
            raise IncompatiblePair(f'penalty="preconditioner" {NEED_ONE}')
        if given.trust_radius is not None and self.penalty != "identity":
            raise IncompatiblePair(
                f"a trust region takes the place of the damping: leave out trust_radius or penalty={self.penalty!r}"
            )
        if self.recipe.held_out and given.curvature_fraction == 1:
            raise IncompatiblePair(
                "this recipe chooses on data outside the curvature part: take curvature_fraction < 1"
            )
        self.structural, self.distance = given.structural_damping or 0.0, DISTANCES[given.distance]
        if self.structural:
            self.objective.hidden = _hidden_modules(self.model, given.hidden)
            if given.distance == "cross_entropy":
                _require_logistic(self.objective.hidden)
        self.radius, self.part, self.momentum = given.trust_radius, given.curvature_fraction, given.momentum
        self.termination = given.termination if given.termination is not None else Progress()

    # -- data --------------------------------------------------------------------------------------------------------

    def step(self, x: Any = None, y: Any = None, *, curvature: Any = None) -> Tensor:  # type: ignore[override]
        """As :meth:`SecondOrder.step`; ``curvature`` is another minibatch for the products (methods 7.8).

        Returns:
            The regularised loss before the update, 0-dim.
        """
        self._given = []
        if curvature is not None:
            data = to_device(curvature, self.tracer.device)
            check_finite(data, self.steps, "the curvature batch")
            batch = Batch(data, 0, self.objective.random_state())
            with torch.no_grad():
                outputs, targets = self.objective.outputs(batch)
            self.likelihood.check(outputs, targets)
            self._given = [counting(batch, self.likelihood, outputs, targets)]
        return super().step(x, y)

    def _wants_tape(self, data: Any) -> bool:
        # along a chain products need no forward pass of their own; hidden activities are not on the tape
        if self._is_chain is None:
            self._is_chain = not self.structural and self._chained(data)
        return self._is_chain

    def _chained(self, data: Any) -> bool:
        """Whether the network is a chain; asked with one pass, as other networks need no tape at all here."""
        try:
            with preserved(self.model):
                self.tracer.chain_or_refusal(data)
        except UnsupportedLayer:
            return False
        return True

    def _measure(self, batch: Batch, observation: Observation | None, caught: Sequence[Tensor | None]) -> None:
        return

    def _forget(self) -> None:
        self._curved, self._rest, self._structures = [], [], {}

    def _choose_data(self, batches: Sequence[Batch]) -> None:
        if self._curved:
            return
        if self._given:
            self._curved, self._rest = list(self._given), list(batches)
            return
        pairs = [batch.split(self.part, 1, self.generator) for batch in batches]
        self._curved, self._rest = [part for part, _ in pairs], [rest for _, rest in pairs if rest is not None]

    def _statistics(self, key: str, pair: Any) -> Statistics:
        """Structured curvature of the curvature data, measured once a step."""
        if key not in self._structures:
            structure, estimator = pair
            accumulator = Accumulator(self.tracer, self.likelihood, estimator, structure, self.generator, self.dtype)
            with preserved(self.model), torch.enable_grad(), torch.autocast(self.tracer.device.type, enabled=False):
                for batch in self._curved:
                    accumulator.add(batch.data, self.steps)
            self._structures[key] = accumulator.freeze()
        return self._structures[key]

    # -- the update ----------------------------------------------------------------------------------------------------

    def _propose(self, batches: Sequence[Batch], loss: float, gradient: Tensor) -> Proposal:
        assert self.tau is not None
        theta = self.flat(self.named)
        self._choose_data(batches)
        tau = self.tau if self.radius is None else 0.0
        weights = {name: self.named[name] for name in self.layout.names}
        matrix = ExactCurvature(self.objective, self._curved, weights, self.structural, self.distance)

        def undamped(v: Tensor) -> Tensor:
            parts = matrix.product(self.split(v))
            return torch.cat([part.reshape(-1) for part in parts]).to(v).add_(v, alpha=self.l2)

        own = self._penalty(Curvature(gradient, self._diagonal, lambda: self._updated(matrix).mean(), undamped))
        metric = self._preconditioner(tau * own.mean, matrix)
        start = None
        if self.momentum and self._solution is not None and self.recipe.decay and self.radius is None:
            start = self.recipe.decay * self._solution
        reductions: list[float] = []

        def watch(j: int, x: Tensor) -> bool:
            assert self.recipe.watch is not None
            reductions.append(here - self._value(self._curved, theta + x))
            return self.recipe.watch(reductions)

        here = self._value(self._curved, theta) if self.recipe.watch is not None else 0.0
        run = conjugate_gradients(
            lambda v: undamped(v).add_(own.apply(v), alpha=tau),
            -gradient,
            start=start,
            precondition=None if metric is None else self._precisely(metric.solve),
            metric=None if metric is None else self._precisely(metric.matvec),
            radius=self.radius,
            limit=self.recipe.limit,
            progress=self.termination,
            watch=watch if self.recipe.watch is not None else None,
        )
        judged = self._rest if self.recipe.held_out and self._rest else self._curved
        delta = self.recipe.choose(run, lambda x: self._value(judged, theta + x))
        self.run, self._candidate = run, run.x
        curved = undamped(delta)
        if self.reduction == "damped":
            curved.add_(own.apply(delta), alpha=tau)
        return self._searched(batches, loss, gradient, theta, delta, curved)

    def _diagonal(self, estimator: str) -> Tensor:
        return self._statistics(estimator, make_pair("diag", estimator, {})).mean().diag()

    def _precisely(self, apply: Map) -> Map:
        """The map in full precision: under autocast a preconditioner would not be the same matrix at every step."""

        def applied(v: Tensor) -> Tensor:
            with torch.autocast(self.tracer.device.type, enabled=False):
                return apply(v)

        return applied

    def _preconditioner(self, scale: float, matrix: ExactCurvature) -> Matrix | None:
        """The preconditioner at this step's damping; between refreshes the one of before."""
        if self.preconditioner is None:
            return None
        if self._metric is not None and self.steps % self.refresh:
            return self._metric
        running = self._updated(matrix)
        k = (scale if self.zeta is None else self.zeta) + self.l2 + self._least(running)
        self._inverted_at = k
        with torch.autocast(self.tracer.device.type, enabled=False):
            self._metric = self.preconditioner.build(running, k)
        return self._metric

    def _updated(self, matrix: ExactCurvature) -> Statistics:
        """The curvature of the preconditioner: with this step's in it where a step refreshes it, once."""
        due = self._running is None or not self.steps % self.refresh
        if due and "preconditioner" not in self._structures:
            new = self._with_structural(self._statistics("preconditioner", self.pair), matrix)
            self._running = averaged(self._running, new, self.steps, self.ema)
        assert self._running is not None
        return self._running

    def _with_structural(self, statistics: Statistics, matrix: ExactCurvature) -> Statistics:
        """The curvature of the preconditioner with ``μ diag(D)`` in it: P is for the damped matrix (methods 7.6)."""
        if not self.structural or self.pair is None:
            return statistics
        found = matrix.hidden_diagonal(self.generator)
        parts = {name: statistics.count * part[None] for name, part in found.items()}
        values = {name: block.pack(parts)[0] for name, block in statistics.blocks.items()}
        return replace(statistics, sums=self.pair[0].with_diagonal(statistics.sums, values))

    def _searched(
        self, batches: Sequence[Batch], loss: float, gradient: Tensor, theta: Tensor, delta: Tensor, curved: Tensor
    ) -> Proposal:
        slope = float(gradient.double() @ delta.double())
        change = slope + 0.5 * float(delta.double() @ curved.double())
        seen: list[float] = []
        bare: list[float] = []  # without the L2 term

        def objective(alpha: float) -> float:
            weights = self._weights(theta + alpha * delta)
            bare.append(self.objective.loss(batches, weights))
            seen.append(bare[-1] + self._l2_value(weights))
            return seen[-1]

        alpha, _ = line_search(objective, loss, slope)
        rho = ratio(loss, seen[0], change, self.dtype)
        rates = self._rates()
        final = rates * alpha * delta
        # a step of length 0 is the line search's refusal, but with more damping there may be another direction
        if alpha == 0.0 and not math.isfinite(seen[0]):
            final = torch.full_like(delta, math.nan)
        same = alpha > 0 and isinstance(rates, float) and rates == 1.0  # the search ended at the new weights
        after = bare[-1] if same else None
        return Proposal(final, change, alpha, self.recipe.decay, batches, rho=rho, after=after)

    def _least(self, statistics: Statistics) -> float:
        """A small part of the mean curvature: a preconditioner must be positive without λ too (κ of methods 7.6)."""
        diagonal = statistics.mean().diag()
        default = 1e-2 if self.penalty != "identity" or self.radius is not None else 0.0
        return (default if self.kappa is None else self.kappa) * float(diagonal.mean())

    def _weights(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: part.to(self.named[name]) for name, part in self.split(flat).items()}

    def _value(self, batches: Sequence[Batch], flat: Tensor) -> float:
        """The regularised loss at flat weights; parameters outside the layout add a constant that is left in."""
        weights = self._weights(flat)
        return self.objective.loss(batches, weights) + self._l2_value(weights)

    def _l2_value(self, weights: Mapping[str, Tensor]) -> float:
        if not self.l2:
            return 0.0
        now = {name: weights.get(name, self.named[name]) for name in self.names}
        return self.l2 / 2 * float(sum(part.double().square().sum() for part in now.values()))

    def _more_damping(self, factor: float) -> None:
        assert self.tau is not None
        self.tau = max(self.tau, 1e-6) * factor
        if self.zeta is not None:
            self.zeta = max(self.zeta, 1e-6) * factor
        self._solution = self._metric = None
        if self.radius is not None:
            self.radius /= factor

    def _wants_ratio(self) -> bool:
        return False

    def _accepted(self, proposal: Proposal, rho: float | None) -> None:
        assert self.tau is not None
        self._solution = self._candidate
        if not self.adapt_tau or not self.tau_rule.due(self.steps):
            return
        adapted = self.tau_rule.adapted(self.tau, rho)
        if self.zeta is not None and self.adapt_zeta and self.tau:
            self.zeta *= adapted / self.tau
        if self.radius is None:
            self.tau = adapted
        elif self.tau:
            self.radius *= self.tau / adapted

    def _damping(self) -> dict[str, float]:
        assert self.tau is not None
        return {"tau": self.tau, "zeta": self.tau if self.zeta is None else self.zeta}

    def _mutable(self) -> list[Any]:
        return []

    def _export(self) -> dict[str, Any]:
        return {
            "solution": self._solution,
            "radius": self.radius,
            "zeta": self.zeta,
            "factors": dumped(self._running),
            "inverted_at": self._inverted_at if self._metric is not None else None,
        }

    def _import(self, state: Mapping[str, Any]) -> None:
        solution, at = state["solution"], state["inverted_at"]
        self._solution = None if solution is None else solution.to(self.tracer.device, self.dtype)
        self.radius, self.zeta = state["radius"], state["zeta"]
        self._metric = None
        if self.preconditioner is not None and self.pair is not None and at is not None:
            self._running = loaded(state["factors"], self.pair[0], self.tracer.device)
            assert self._running is not None
            self._inverted_at, self._metric = at, self.preconditioner.build(self._running, at)


def _require_logistic(hidden: Sequence[nn.Module]) -> None:
    for module in hidden:
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.Tanh, nn.ReLU)):
            raise IncompatiblePair(
                f'distance="cross_entropy" is of logistic units; {type(module).__name__} has others. Use '
                'distance="squared"'
            )


def _hidden_modules(model: nn.Module, patterns: Sequence[str] | None) -> list[nn.Module]:
    named = {name: module for name, module in model.named_modules() if name}
    if patterns is not None:
        found = [module for name, module in named.items() if any(fnmatchcase(name, p) for p in patterns)]
    else:
        found = [module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase))]
    if not found:
        raise UnknownName("pattern of hidden modules", patterns or "recurrent modules", named)
    return found


@shows(*CONCERNS, options="of the preconditioner's structure and estimator (``samples=``).")
def hessian_free(
    model: nn.Module,
    likelihood: str | Likelihood,
    structural_damping: float | None = None,
    **settings: Unpack[HessianFreePreset],
) -> HessianFree:
    """Hessian-free optimisation (methods 7); with ``structural_damping`` the recipe for recurrent networks.

    That is ``recipe="recurrent"`` and no preconditioner, unless they are given.

    Args:
        model: the module that is trained.
        likelihood: registered name or object.
        structural_damping: μ (1/30 in Martens 2016, 4.13), ``None`` for feed-forward networks.
    """
    row: dict[str, Any] = {} if structural_damping is None else {"recipe": "recurrent", "preconditioner": "none"}
    return HessianFree(model, likelihood, structural_damping=structural_damping, **{**row, **settings})
