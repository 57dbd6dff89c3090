"""The one interface of all methods: a penalty for the training loss, and what to do after a step and after a task."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair, InvalidArgument, ShapeMismatch
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.models import usable
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision, by_parameter, checked_prior, positive
from laplace_kf.reading import Part, reading
from laplace_kf.structures import Structure
from laplace_kf.tape import select
from laplace_kf.tape.blocks import flat_layout

__all__ = ["AGAIN", "GIVEN", "Learner", "Loader", "require_again", "require_data"]

Loader = Iterable[Any] | tuple[Any, Tensor]


def require_data(known: int, tasks: int, advice: str) -> None:
    """For methods that revisit data.

    Raises:
        IncompatiblePair: unless the data of as many tasks are ``known`` as are finished.
    """
    if known != tasks:
        raise IncompatiblePair(advice.format(known=known, tasks=tasks))


def require_again(*loaders: Loader) -> None:
    """For methods that go over the data of every task more than once.

    Raises:
        ShapeMismatch: for data that can be gone through only once.
    """
    for loader in loaders:
        if isinstance(loader, Iterator):
            raise ShapeMismatch(
                f"the data of each task are needed again, but a {type(loader).__name__} can be gone through only once: "
                "pass a DataLoader, a list of batches or a pair of tensors (a generator can be made into a list: "
                "list(batches))"
            )


AGAIN = (
    "the data of {tasks} finished tasks are needed again, and a state does not hold them: call revisit([loader, ...]) "
    "after load_state_dict"
)
GIVEN = "{known} loaders were given for {tasks} finished tasks"


class Learner(ABC):
    """A method for learning tasks one after another with one network.

    The loop around it::

        for loader in tasks:
            for x, y in epochs_of(loader):
                loss = learner.record(cross_entropy(model(x), y)) + learner.penalty() / N_task
                optimizer.zero_grad(); loss.backward(); optimizer.step()
                learner.after_step()
            learner.after_task(loader)

    Args:
        model: the network; the user trains it, a learner only reads it.
        likelihood: registered name or likelihood object.
        structure: of the curvature, as for :class:`laplace_kf.LaplacePosterior`.
        multiplier: λ_c > 0, on the curvature of every task (methods 11.1).
        prior_precision: λ of the prior around 0 of the first task; later penalties have it around the latest mean
            (methods 11.3).
        parameters: ``"all"`` or name patterns; with several heads, patterns that leave the heads out.
        head_precision: λ of the trainable parameters that ``parameters`` leaves out (heads, also new ones), a number,
            0-dim tensor or mapping like ``prior_precision``; default: that one; 0: they have no penalty. It is around 0
            for a head that no finished task has seen, and then around the value the head had at the latest
            :meth:`after_task`: where a later task does not use a head, nothing moves it, frozen or not. Create a head
            when its task comes; one that was there before keeps its initial value as its centre.
        inputs, targets: functions of a batch of another form, with ``outputs = model(*inputs(batch))``.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``.
        **options: further options of the posterior (``estimator``, ``samples``, ``dtype``, ...).

    Attributes:
        tasks: number of finished tasks.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        structure: str | Structure = "kron",
        multiplier: float = 1.0,
        prior_precision: PriorPrecision = 1.0,
        parameters: str | Sequence[str] = "all",
        *,
        head_precision: PriorPrecision | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        **options: Any,
    ) -> None:
        self.model = usable(model)
        self.likelihood = get_likelihood(likelihood)
        self.structure = structure
        self.multiplier = positive("multiplier", multiplier)
        self.prior_precision = checked_prior(prior_precision)
        self.parameters = parameters if isinstance(parameters, str) else tuple(parameters)
        self.head_precision = None if head_precision is None else checked_prior(head_precision)
        self._heads: dict[str, Tensor] = {}  # what finished tasks left, by parameter name
        self.forward = reading(forward, inputs, targets)
        self.options = options
        self.tasks = 0
        names = self._names()
        by_parameter(self.prior_precision, flat_layout(dict(self.model.named_parameters()), names))  # refuses early
        LaplacePosterior(self.model, self.likelihood, structure, parameters=self.parameters, **options)  # as well

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {self.likelihood!r}, structure={self.structure!r}, "
            f"multiplier={self.multiplier!r}, prior_precision={self.prior_precision!r}; tasks={self.tasks})"
        )

    # -- what a method says --------------------------------------------------------------------------------------------

    @abstractmethod
    def _penalty(self) -> Tensor:
        """The penalty of the selected parameters, 0-dim."""

    @abstractmethod
    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        """Takes in a finished task; ``fitting`` is what a fit takes for it (generator, checkpoint)."""

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`_state` gave."""
        return

    # -- the interface -------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """What keeps the network from forgetting, 0-dim and differentiable: add ``penalty() / N_task`` to a mean loss.

        It is on the scale of a sum over examples: without ``1 / N_task``, ``N_task`` times too strong (methods 11.1).
        """
        total = self._penalty()
        for name, weight in self._left_out().items():
            centre = self._heads.get(name)
            if centre is not None and torch.equal(weight.detach(), centre.to(weight)):
                continue  # no gradient at all, not one of zeros: momentum would still move the head
            shift = weight if centre is None else weight - centre.to(weight)
            total = total + (self._head_prior(name) * shift.square().sum() / 2).to(total)
        return total

    def _left_out(self) -> dict[str, Tensor]:
        """The trainable parameters that are not selected, by name."""
        mine = set(self._names())
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in mine}

    def _finished_heads(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self._left_out().items()}

    def _head_prior(self, name: str) -> float | Tensor:
        prior = self.prior_precision if self.head_precision is None else self.head_precision
        if not isinstance(prior, Mapping):
            return prior
        for pattern, value in prior.items():
            if fnmatchcase(name, pattern):
                return value
        raise InvalidArgument(
            f"no prior precision for {name!r}, which parameters= leaves out: add a pattern to prior_precision, or give "
            "head_precision (0 for no penalty)"
        )

    def precondition_gradients(self, rate: float) -> None:
        """Between ``backward()`` and the step of ``torch.optim.SGD``: steps the penalty implicitly.

        The gradients ``g`` become ``(I + rate · Λ)⁻¹ g`` with the penalty's matrix Λ
        (:meth:`laplace_kf.LaplacePosterior.precondition_gradients`), so that no multiplier is too stiff for the
        learning rate and no decay over tasks is needed. Nothing happens for methods without a penalty, and in the first
        task. Optimisers that rescale gradients by themselves (Adam) undo it.

        Args:
            rate: ``lr / N_task``, positive; lr is the optimiser's current one.
        """
        self._precondition(positive("rate", rate))

    def _precondition(self, rate: float) -> None:
        return

    def record(self, loss: Tensor) -> Tensor:
        """Marks the task's loss ``()``, without the penalty, and returns it; only path methods make use of it."""
        return loss

    def after_step(self, gradients: Mapping[str, Tensor] | None = None) -> None:
        """To be called after every ``optimizer.step()``, before the gradients are zeroed; most methods do nothing.

        Args:
            gradients: of the task's loss alone, parameter-shaped by name, where the loop has them.
        """
        return

    def after_task(
        self,
        loader: Loader,
        *,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        generator: torch.Generator | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
    ) -> None:
        """To be called when the network is trained on a task; goes over its data once.

        Args:
            loader: the task's data: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``.
            forward, inputs, targets: as in the constructor, if this task needs others (its own head).
            generator: random numbers of the estimator; a fresh private one by default.
            checkpoint, every: as of :meth:`laplace_kf.LaplacePosterior.fit`: the same call, made again after an
                interruption with the learner in the same state, goes on.

        Raises:
            ShapeMismatch, NonFinite, UnsupportedLayer: as of :meth:`laplace_kf.LaplacePosterior.fit`; the learner is
                then what it was.
        """
        own = reading(forward, inputs, targets)
        fitting = {"generator": generator, "checkpoint": checkpoint, "every": every}
        self._after_task(loader, own if own is not None else self.forward, fitting)
        self._heads.update(self._finished_heads())
        self.tasks += 1

    def training_data(self, loader: Loader) -> Loader:
        """The data to train on for a new task: the task's own, but for joint training."""
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, as tensors and plain values (``torch.load(weights_only=True)`` reads it).

        The network, the optimiser and the random states are the user's to save beside it.
        """
        heads = {name: value.clone() for name, value in self._heads.items()}
        return {"method": type(self).__name__, "tasks": self.tasks, "heads": heads, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state of :meth:`state_dict`, for a learner constructed in the same way around the same network.

        Raises:
            IncompatiblePair: if the state is that of another method.
        """
        if state.get("method") != type(self).__name__:
            raise IncompatiblePair(
                f"this is a state of {state.get('method')!r}, not of {type(self).__name__!r}: load it into one"
            )
        self._load(state)
        self._heads = {name: value.clone() for name, value in state.get("heads", {}).items()}
        self.tasks = int(state["tasks"])

    # -- shared --------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return select(self.model, self.parameters)

    def _weights(self) -> dict[str, Tensor]:
        """The selected parameters by name."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self._names()}

    def _pull(self, centres: Mapping[str, Tensor] | None = None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """``½ Σ λ (θ − centre)²`` over the selected parameters, around 0 without centres."""
        weights = weights if weights is not None else self._weights()
        named = by_parameter(self.prior_precision, flat_layout(weights, list(weights)))
        terms = []
        for name, weight in weights.items():
            shift = weight if centres is None or name not in centres else weight - centres[name]
            value: Any = named[name] if named is not None else self.prior_precision
            terms.append(value * shift.square().sum() / 2)
        return torch.stack(terms).sum()

    def _posterior(
        self,
        loader: Loader,
        prior_precision: PriorPrecision,
        forward: Forward | None,
        fitting: Mapping[str, Any],
    ) -> LaplacePosterior:
        """The posterior of one task on its own, with the multiplier on its curvature."""
        posterior = LaplacePosterior(
            self.model,
            self.likelihood,
            self.structure,
            parameters=self.parameters,
            prior_precision=prior_precision,
            forward=forward,
            **self.options,
        ).fit(loader, **fitting)
        posterior.n_data = posterior.n_data * self.multiplier
        return posterior

    def _packed(self, posterior: LaplacePosterior) -> dict[str, Any]:
        tensors, header = posterior.packed()
        return {"tensors": {n: t.detach().clone() for n, t in tensors.items()}, "header": json.dumps(header)}

    def _unpacked(self, state: Mapping[str, Any]) -> LaplacePosterior:
        return LaplacePosterior.unpacked(
            state["tensors"],
            json.loads(state["header"]),
            self.model,
            likelihood=self.likelihood,
            forward=self.forward,
        )
