"""What all second-order optimisers share: gradients, acceptance of a step, groups, state, averages.

One update is two calls, so that gradients can be accumulated and clipped as usual::

    opt.zero_grad()
    loss = opt.backward(x, y)      # any number of minibatches; fills .grad and measures curvature
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()

and ``opt.step(x, y)`` is both for one minibatch.
"""

from __future__ import annotations

import glob
import inspect
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from laplace_kf import weighting
from laplace_kf.agreement import as_read, require_same_loss, warn_of_links
from laplace_kf.batches import check_finite, to_device, to_tensors
from laplace_kf.callers import users_line, warn_user
from laplace_kf.errors import IncompatiblePair, NonFinite, NotFitted, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.linalg import all_finite
from laplace_kf.lookups import leaves_hooks_out
from laplace_kf.missing import check_batch
from laplace_kf.models import lasting, parameters_of, preserved, usable
from laplace_kf.operators import fresh_generator
from laplace_kf.optim.atomic import unless_it_fails
from laplace_kf.optim.damping import ratio, start_value
from laplace_kf.optim.groups import first_order_step, hooks_that_change, make_groups, require_trained, require_unmerged
from laplace_kf.optim.objective import Batch, Objective, counting
from laplace_kf.optim.peers import peers_of
from laplace_kf.optim.pending_step import PendingStep, Proposal, gradient_of
from laplace_kf.optim.running_statistics import shapes_in
from laplace_kf.optim.schedules import averaging_weight
from laplace_kf.optim.settings import Scope, Step
from laplace_kf.reading import reading
from laplace_kf.returned import as_tensor
from laplace_kf.substitution import require_reached
from laplace_kf.tape import FlatLayout, Observation, Tracer
from laplace_kf.tape.blocks import flat_layout
from laplace_kf.tape.chance import require_a_function, require_derivatives

__all__ = ["Proposal", "SecondOrder"]

BOOST = 10.0  # factor on the damping after a rejected step
RETRIES = 12


@explained
class SecondOrder(torch.optim.Optimizer):
    """Base of the second-order optimisers.

    Args:
        model: the module that is trained.
        likelihood: registered name or object; the loss is ``mean(−log p) + l2/2 ‖θ‖²``.
        step: regulariser, learning rate, average of iterates, and which steps are refused (see below).
        scope: parameters, groups (:func:`laplace_kf.optim.groups.make_groups`), batch form, random numbers.
        tau: damping of the exact curvature; default 150 for losses summed over many outputs, else 1.

    A step that raises the loss of its own minibatch by more than ``step.max_rise`` times its size (the mean of
    ``|−log p|`` over examples) is refused, as one with a loss that is not finite is, and tried again with 10 times the
    damping, at most 12 times; then the weights stay. The loss after the step is looked at on the part of the minibatch
    that the curvature came from, and on all of it where it rose there or is needed anyway (for ρ, in a line search): no
    pass more than without the rule unless the loss rose. Infinity: only the finiteness counts.

    Attributes:
        diagnostics: ``tau, zeta, alpha, mu, rho, model_decrease, rejected`` of the last step; ``rho`` and
            ``model_decrease`` are NaN where nothing asked for them, ``rejected`` counts the updates that were refused
            before one was accepted.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are made with the optimiser.

        Raises:
            IncompatiblePair: afterwards.
        """
        if "named" in vars(self):
            raise IncompatiblePair(
                "groups of parameters are made with the optimiser, whose curvature is of its own ones; make a new one "
                'for more parameters, with groups=[{"params": patterns, "lr": 0.1}] where rates differ'
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which would hold the model and half of what a step needs.

        Raises:
            IncompatiblePair: always; says what to do.
        """
        raise IncompatiblePair(
            f"a {type(self).__name__} is neither copied nor pickled, as it goes with its model; copy the model, make "
            "an optimiser for it with the same settings, and twin.load_state_dict(deepcopy(optimizer.state_dict()))"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters, as of any optimiser of torch.

        Raises:
            IncompatiblePair: for a ``GradScaler``, which reads them to divide gradients that it never multiplied.
        """
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if reader.startswith("torch.") and reader.endswith("grad_scaler"):  # of FSDP, too
            raise IncompatiblePair(
                "GradScaler has nothing to scale here: backward and step take the gradient of the loss as it is, in "
                "full precision outside of the model. Call optimizer.step() in place of scaler.step(optimizer), and "
                "leave scaler.scale, scaler.unscale_ and scaler.update out"
            )
        found: list[dict[str, Any]] = self.__dict__["param_groups"]
        return found

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = value

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        step: Step,
        scope: Scope,
        tau: float | None,
    ) -> None:
        given, model = model, usable(model)
        self.peers = peers_of(scope.process_group, given, model)
        forward = reading(scope.forward, scope.inputs, scope.targets)
        self.model, self.likelihood, self.user_forward = model, get_likelihood(likelihood), forward
        self.l2, self.tau = float(step.l2), tau
        self.averaging, self.max_rise = step.averaging, float(step.max_rise)
        self.generator = self.peers.own(scope.generator if scope.generator is not None else fresh_generator())
        self.weights: weighting.Weights = scope.weights if callable(scope.weights) else bool(scope.weights)
        read = weighting.reader(forward, self.weights)
        start = {"lr": step.lr, "first_order": False, "momentum": 0.0}
        super().__init__(make_groups(model, scope.parameters, scope.groups), start)
        self.named: dict[str, Tensor] = dict(model.named_parameters())
        second = {n for group in self.param_groups if not group["first_order"] for n in group["param_names"]}
        chosen = {n for group in self.param_groups for n in group["param_names"]}
        self.names = [name for name in self.named if name in chosen]
        self.layout: FlatLayout = flat_layout(self.named, [name for name in self.named if name in second])
        self.objective = Objective(model, self.likelihood, read, self.peers)
        names = [glob.escape(name) for name in self.layout.names]
        self.tracer = Tracer(model, read, names, unused=scope.unused, shared=self.peers.ranks is not None)
        self.unused = scope.unused
        self.steps = 0
        self.default_damping = 1.0  # of losses like this one; known from the first minibatch on
        self.diagnostics: dict[str, float] = {}
        self._average: dict[str, Tensor] = {}
        self.pending = PendingStep(self.objective, self.tracer, self.named, self.names, self.l2)
        self._met: frozenset[str] = frozenset()  # parameters that a loss depended on
        self._reached = False  # whether trial steps can put other weights into the model; asked once
        self._direct = False  # inside step(x, y): nobody can change .grad before it is used

    # -- what a subclass adds ----------------------------------------------------------------------------------------

    @abstractmethod
    def _measure(self, batch: Batch, observation: Observation | None, caught: Sequence[Tensor | None]) -> None:
        """Takes in the curvature of one minibatch; ``observation`` is its pass on the tape if one was made.

        ``caught`` are gradients of its mean loss, at the places that :meth:`_edges` named.
        """

    def _edges(self, observation: Observation | None) -> list[GradientEdge]:
        """Places inside a pass whose gradients are of use; the gradient's own backward pass gives them, too."""
        return []

    @abstractmethod
    def _wants_tape(self, data: Any) -> bool:
        """Whether the gradient's own pass over this minibatch should be on the tape."""

    @abstractmethod
    def _propose(self, batches: Sequence[Batch], loss: float, gradient: Tensor) -> Proposal:
        """The update from the regularised loss and its gradient ``(P,)``."""

    @abstractmethod
    def _more_damping(self, factor: float) -> None:
        """Multiplies the damping after a rejected update."""

    @abstractmethod
    def _wants_ratio(self) -> bool:
        """Whether the ratio ρ is needed at this step."""

    @abstractmethod
    def _accepted(self, proposal: Proposal, rho: float | None) -> None:
        """After an update was made; ``rho`` is ``None`` where it was not measured or means nothing."""

    @abstractmethod
    def _forget(self) -> None:
        """Drops what :meth:`_measure` took in since the last step."""

    @abstractmethod
    def _mutable(self) -> list[Any]:
        """The objects whose attributes a step changes, besides this one."""

    @abstractmethod
    def _export(self) -> dict[str, Any]:
        """State of the subclass as plain values and tensors."""

    @abstractmethod
    def _import(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`_export`."""

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def _zero(self) -> Tensor:
        """0-dim, in the type of the objective and on its device."""
        return torch.zeros((), dtype=self.dtype, device=self.tracer.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of flat vectors: the parameters', float32 at least."""
        kinds = [self.named[name].dtype for name in self.layout.names] + [torch.float32]
        out = kinds[0]
        for kind in kinds[1:]:
            out = torch.promote_types(out, kind)
        return out

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Parameter-shaped tensors by name as one vector ``(P,)``, second-order parameters only."""
        dtype = self.dtype
        return self.layout.join({n: tensors[n].detach()[None].to(dtype) for n in self.layout.names})[0]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flat` for a vector ``(P,)`` (views)."""
        return {name: part[0] for name, part in self.layout.split(flat[None]).items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients and everything that was measured since the last step."""
        super().zero_grad(set_to_none)
        self._clear()

    def _clear(self) -> None:
        self.pending.clear()
        self._direct = False
        self._forget()

    @lasting()
    @torch.enable_grad()
    def backward(self, x: Any, y: Any = None) -> Tensor:
        """Takes in one minibatch: its gradient goes into ``.grad``, its curvature is measured.

        Several calls before a :meth:`step` accumulate: ``.grad`` is then the gradient of the mean over all examples.

        Args:
            x: inputs ``(N, ...)`` with targets ``y``, or a whole batch (a mapping, a pair) without.
            y: targets.

        Returns:
            The regularised loss of the minibatches so far, 0-dim.

        Raises:
            NonFinite: for NaN or infinity in the batch, its outputs or its loss; nothing is changed then.
            ShapeMismatch: if targets do not fit the outputs.
            UnsupportedLayer: for a parameter that cannot be handled.
        """
        with unless_it_fails(self), self.peers.doing("backward"):
            self._take_in(x, y)
        return self.pending.regularised(self._zero)

    @torch.enable_grad()
    def _take_in(self, x: Any, y: Any) -> None:
        self._require_unchanged()
        data = to_device(to_tensors(x if y is None else (x, y), self.model), self.tracer.device)
        check_batch(data, self.steps, "the batch", self.tracer.forward, self.likelihood.nan_is_missing)
        if self.steps == 0 and not self.pending.batches:
            with preserved(self.model):
                require_same_loss(self.model, data, self.tracer.forward, self.likelihood)
        if not self._reached:
            self._require_reached(data)
        batch = Batch(data, 0, self.objective.random_state())
        outputs, targets, observation = self.pending.outputs(data, self.steps, self._wants_tape(data))
        if outputs.dim() < 2 or outputs.shape[0] == 0:
            raise ShapeMismatch(f"the minibatch gave outputs {tuple(outputs.shape)}; they must be (N, ...) with N > 0")
        check_finite(outputs.detach(), self.steps, "the model's output")
        targets = to_device(targets, outputs.device)
        if self.steps == 0 and not self.pending.batches:
            warn_of_links(self.likelihood, self.model, outputs)
        self.likelihood = as_read(self.likelihood, self.model, data, self.tracer.forward, outputs, targets)
        self.objective.likelihood = self.likelihood
        self.likelihood.check(outputs.detach(), targets)
        losses = -self.likelihood.log_prob(outputs, targets)
        made = Batch(data, 0, batch.random, observation, losses.detach())
        batch = counting(made, self.likelihood, outputs, targets)
        if self.steps == 0:
            self.default_damping = self.peers.first(start_value(self.likelihood, targets, batch.count))
            self.tau = self.default_damping if self.tau is None else self.tau
        loss = losses.sum() / batch.count
        if not bool(torch.isfinite(loss)):
            raise NonFinite(
                f"the loss of the minibatch is {float(loss.detach())} before the step: check it; nothing changed"
            )
        if not loss.requires_grad:
            self.tracer.require_all_seen(self.layout.names)
        weights = [self.named[name] for name in self.names]
        wanted: list[Any] = [*weights, *self._edges(observation)]
        hooked = not self._met and any(weight._backward_hooks for weight in weights)
        keep = observation is not None
        grads = torch.autograd.grad(loss, wanted, retain_graph=keep or hooked, allow_unused=True)
        require_unmerged(self.model, [n for n, found in zip(self.names, grads, strict=False) if found is None])
        if hooked:
            self._say_of_hooks(hooks_that_change(loss, self.named, dict(zip(self.names, grads, strict=False)), keep))
        self._met |= {n for n, gradient in zip(self.names, grads, strict=False) if gradient is not None}
        try:
            self._measure(batch, observation, grads[len(weights) :])
            self.pending.add(batch, *self.peers.mean(grads[: len(weights)], weights, float(loss.detach()), batch.count))
        except BaseException:
            self._clear()  # its part of the sums cannot be taken out again
            raise

    def _say_of_hooks(self, names: Sequence[str]) -> None:
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            warn_user(
                f"a hook changes the gradient of parameter {names[0]!r}{more}, and steps are that gradient times an "
                "inverse curvature: entries that the hook sets to 0 move all the same. Leave weights that have to stay "
                "out with parameters=[patterns], or set them again after each step"
            )

    def _require_reached(self, data: Any) -> None:
        """Refuses weights that a trial step could not move, by a pass in the mode of the steps."""
        modes = [(module, module.training) for module in self.model.modules()]
        with preserved(self.model):
            for module, mode in modes:
                module.training = mode
            again = lambda other: as_tensor(self.objective.runner(other)[0])  # noqa: E731
            if any(mode for _, mode in modes):  # what changes in training mode is the user's business
                outputs = again(data)  # and fills what is kept from pass to pass, by which weights could be reached
                require_reached(self.model, self.user_forward, self.names, lambda: again(data))
            else:
                outputs = require_a_function(self.model, self.user_forward, self.names, again, data)
            require_derivatives(self.model, self.names, again, data, outputs)
            if not outputs.requires_grad:
                self.tracer.require_all_seen(self.layout.names)
        self._reached = True
        if leaves_hooks_out(self.model):
            warn_user(
                "the forward pass puts hooks on tensors (Tensor.register_hook), and what they make of gradients is left"
                " out: steps are of the loss itself. Clip or scale .grad between optimizer.backward(x, y) and step()"
            )

    def _require_unchanged(self) -> None:
        """Refuses a model whose layers were replaced since the optimiser was made."""
        shapes = [tuple(self.named[name].shape) for name in self.names]
        now = parameters_of(self.model, self.names, shapes, "the optimiser")
        require_trained(now, self.names)
        replaced = [name for name in self.names if now[name] is not self.named[name]]
        if replaced:
            raise ShapeMismatch(
                f"parameter {replaced[0]!r} is another object than when the optimiser was made (its layer was "
                "replaced, or it was assigned anew), so that steps would not reach it; make a new optimiser"
            )

    # -- the step ----------------------------------------------------------------------------------------------------

    @lasting()
    @torch.no_grad()
    def step(self, x: Any = None, y: Any = None) -> Tensor:  # type: ignore[override]
        """One update.

        Args:
            x: inputs ``(N, ...)`` with targets ``y``, or a whole batch; nothing to use what :meth:`backward` took in.
            y: targets.

        Returns:
            The regularised loss before the update, 0-dim.

        Raises:
            NotFitted: without a minibatch.
            IncompatiblePair: for a closure.
            NonFinite: for a batch, loss or gradient that is not finite.
            NotPositiveDefinite: for a block that is singular with its damping, or whose factorisation fails.

        Whatever it raises, weights, buffers, averages, factors, counters and random numbers are what they were before;
        minibatches of :meth:`backward` that were to be used are dropped.
        """
        self._refuse_habits(x)
        with unless_it_fails(self, drop=True), self.peers.doing("the step"):
            return self._step(x, y)

    def _refuse_habits(self, x: Any) -> None:
        """Refuses what first-order optimisers take: closures."""
        if inspect.isroutine(x):
            raise IncompatiblePair(
                "step takes a minibatch and no closure, because it measures curvature besides the gradient; use "
                "optimizer.step(x, y), or optimizer.backward(x, y) and optimizer.step()"
            )

    def _step(self, x: Any, y: Any) -> Tensor:
        if x is not None:
            self._clear()
            self._direct = True
            self._take_in(x, y)
        if not self.pending.batches:
            raise NotFitted("step needs a minibatch: call step(x, y), or backward(x, y) before step()")
        if self.peers.ranks is None:
            self.tracer.require_all_seen([n for n in self.layout.names if n not in self._met])
        loss = self.pending.regularised(self._zero.double())
        gradient = self.flat({n: gradient_of(self.named[n]) for n in self.layout.names})
        if not all_finite(gradient):
            raise NonFinite("the gradient has NaN or infinite entries; nothing was changed")
        self.steps += 1
        proposal, moved, after, rejected = self._search(float(loss), gradient)
        rho = proposal.rho
        if after is not None and self._wants_ratio():
            rho = self._ratio(float(loss), proposal, after)
        for name, value in self.peers.handed(moved).items():
            self.named[name].copy_(value)
        self.peers.settle_buffers(self.model)
        for group in self.param_groups:
            if group["first_order"]:
                first_order_step(group, self.state)
        torch.clear_autocast_cache()  # it may hold the old weights in a lower precision
        self._average_iterates()
        self._accepted(proposal, rho)
        self.diagnostics = {
            **self._damping(),
            "alpha": proposal.alpha,
            "mu": proposal.mu,
            "rho": math.nan if rho is None else rho,
            "model_decrease": -proposal.change,
            "rejected": rejected,
        }
        self._clear()
        return loss.to(self.dtype)

    @abstractmethod
    def _damping(self) -> dict[str, float]:
        """``tau`` and ``zeta`` for the diagnostics."""

    def _search(self, loss: float, gradient: Tensor) -> tuple[Proposal, dict[str, Tensor], float | None, int]:
        """Proposals with more and more damping until one can be accepted (``max_rise``).

        Returns:
            It, the new weights by name, their ``−log p``, and the number of refusals; if all are refused, a proposal
            of no change, no weights and ``None``.
        """
        batches = self.pending.batches
        for rejected in range(RETRIES + 1):
            proposal = self._agreed(self._propose(batches, loss, gradient))
            if all_finite(proposal.delta):
                moved = self._moved(proposal.delta)
                after = self._checked(batches, proposal, moved)
                if after is not None:
                    if rejected:
                        what = "update(s) with a loss that rose too much or was not finite were refused"
                        self._say(f"{rejected} {what}; the damping is now")
                    return proposal, moved, after, rejected
            self._more_damping(BOOST)
        # says nothing about the damping: the next minibatch starts with a little more than before
        self._more_damping(BOOST**-RETRIES)
        self._say("no update had a loss to accept and the weights are unchanged; the damping is now")
        return Proposal(torch.zeros_like(gradient), 0.0, 0.0, 0.0, batches), {}, None, RETRIES + 1

    def _agreed(self, proposal: Proposal) -> Proposal:
        """The proposal that all processes go on with."""
        return proposal

    def _checked(self, batches: Sequence[Batch], proposal: Proposal, moved: Mapping[str, Tensor]) -> float | None:
        """Mean ``−log p`` at new weights, of all minibatches or a part that is enough; ``None``: to be refused."""
        change = self._l2_change(proposal.delta)
        part = batches if self._wants_ratio() or proposal.after is not None else proposal.check
        after = self.objective.loss(part, moved) if proposal.after is None else proposal.after
        mine, all_of_it = (float(sum(b.count for b in each)) for each in (part, batches))
        mine, all_of_it = self.peers.total(mine, all_of_it)
        whole = part is batches or mine == all_of_it
        if not whole and not self._rise(part, after, change) <= 0:  # a part rises by chance, too
            after, part = self.objective.loss(batches, moved), batches
        return after if math.isfinite(after) and self._rise(part, after, change) <= self.max_rise else None

    def _rise(self, batches: Sequence[Batch], after: float, change: float) -> float:
        """By how much the regularised loss rose on minibatches, in units of the mean ``|−log p|`` before."""
        losses = [batch.losses.double().reshape(-1) for batch in batches if batch.losses is not None]
        before = torch.cat(losses) if len(losses) == len(batches) else torch.tensor([math.inf])
        sums = float(before.sum()), float(before.abs().sum()), float(sum(b.count for b in batches))
        below, size, count = self.peers.total(*sums)
        if not math.isfinite(below):
            return math.inf
        rise, size = after - below / count + change, size / count
        return rise / max(size, torch.finfo(torch.float32).tiny) if rise else 0.0

    def _say(self, what: str) -> None:
        damping = ", ".join(f"{key} = {value:.3g}" for key, value in self._damping().items())
        warnings.warn(f"step {self.steps}: {what} {damping}", RuntimeWarning, stacklevel=users_line())

    def _moved(self, delta: Tensor) -> dict[str, Tensor]:
        """The weights by name, parameter-shaped, after an update ``(P,)``."""
        named = self.named
        return {
            n: (named[n].detach().to(self.dtype) + part).to(named[n].dtype) for n, part in self.split(delta).items()
        }

    def _ratio(self, loss: float, proposal: Proposal, after: float) -> float | None:
        # both sides without the parameters that the model does not move: they cancel
        change = self._l2_change(proposal.delta)
        return ratio(loss, loss + (after - self.pending.loss) + change, proposal.change, self.dtype)

    def _l2_change(self, delta: Tensor) -> float:
        """By how much an update ``(P,)`` changes ``l2/2 ‖θ‖²``."""
        if not self.l2:
            return 0.0
        along = [part.flatten() @ self.named[n].detach().to(part).flatten() for n, part in self.split(delta).items()]
        return self.l2 * float(torch.stack(along).double().sum() + (delta @ delta).double() / 2)

    def _rates(self) -> Tensor | float:
        """Learning rate of every flat entry ``(P,)``, or one number if they agree."""
        by_name = {n: float(g["lr"]) for g in self.param_groups for n in g["param_names"]}
        rates = [by_name[name] for name in self.layout.names]
        if all(rate == rates[0] for rate in rates):
            return rates[0]
        values = torch.tensor(rates, dtype=self.dtype)
        return values.repeat_interleave(torch.tensor(self.layout.sizes)).to(self.tracer.device)

    def _average_iterates(self) -> None:
        if self.averaging is None:
            return
        beta = averaging_weight(self.steps, self.averaging)
        for name in self.names:
            value = self.named[name].detach()
            old = self._average.get(name)
            self._average[name] = value.clone() if old is None else beta * old + (1 - beta) * value

    def averaged_parameters(self) -> dict[str, Tensor]:
        """Averages of the iterates by name, parameter-shaped (methods 6.1, 6.3), for ``torch.func.functional_call``.

        A module registered at two places needs ``tie_weights=False`` there, or torch leaves the average in it.

        Raises:
            NotFitted: without ``averaging=`` or before the first step.
        """
        if not self._average:
            raise NotFitted("there is no average: construct with averaging=0.95 (or another limit) and take a step")
        return {name: value.clone() for name, value in self._average.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.likelihood!r}; {self.progress()})"

    def progress(self) -> str:
        """One line about the last step, as for ``tqdm``'s ``bar.set_postfix_str(opt.progress())``.

        It has the number of the step and the :attr:`diagnostics` that were measured, three digits each.
        """
        known = [f"{key} {value:.3g}" for key, value in self.diagnostics.items() if not math.isnan(value)]
        return f"step {self.steps}: " + ", ".join(known)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that reproduce the next step; loads under ``torch.load(weights_only=True)``.

        The weights and the caller's data order are not in it. Minibatches taken in by :meth:`backward` and not used
        yet are not either.
        """
        out = super().state_dict()
        out["second_order"] = {
            "steps": self.steps,
            "tau": self.tau,
            "diagnostics": dict(self.diagnostics),
            "average": dict(self._average),
            "generator": self.generator.get_state(),
            **self._export(),
        }
        return out

    def _require_state(self, state: Mapping[str, Any]) -> None:
        for name, shape in shapes_in(state).items():
            found = tuple(self.named[name].shape) if name in self.names else "no such parameter"
            if found != shape:
                raise ShapeMismatch(
                    f"the state has parameter {name!r} of shape {shape}, the optimiser has {found}; load it into an "
                    "optimiser of the model that it was saved for"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, for an optimiser constructed in the same way.

        Raises:
            ShapeMismatch: if the state is of another optimiser.
        """
        if "second_order" not in state_dict:
            raise ShapeMismatch("this state was not written by a laplace_kf optimiser: it has no key 'second_order'")
        state = state_dict["second_order"]
        self._require_state(state)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "second_order"})
        self.steps, self.tau = state["steps"], state["tau"]
        self.diagnostics = dict(state["diagnostics"])
        self._average = {name: value.to(self.named[name]) for name, value in state["average"].items()}
        self.generator.set_state(state["generator"].cpu())
        self.generator = self.peers.own(self.generator)
        self._clear()
        self._import(state)
