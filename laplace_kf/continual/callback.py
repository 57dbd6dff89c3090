"""A learner as a callback: of Lightning's trainers where it is installed, and of loops that call its hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_kf.continual.base import Learner, Loader
from laplace_kf.errors import IncompatiblePair
from laplace_kf.posterior.prior import positive
from laplace_kf.trainers import TrainerCallback, is_trainer

__all__ = ["Callback"]


class Callback(TrainerCallback):
    """Adds a learner's penalty to the gradients of a training loop that it does not own.

    Where ``lightning`` or ``pytorch_lightning`` is installed, an instance is one of its ``Callback`` too (imported when
    the first one is made). In its trainer the penalty comes in once an optimiser step, after the gradients were
    accumulated and unscaled and before they are clipped: accumulation, mixed precision and clipping need no care. In
    other loops call the hooks by yourself; gradients must then not be scaled between ``on_after_backward`` and the
    optimiser's step, and ``on_after_backward`` comes once a step.

    Args:
        learner: any :class:`Learner`.
        loader: the task's data.
        n_task: number of its examples; the loss of the loop is a mean over examples.
        implicit: whether the penalty is stepped implicitly (:meth:`Learner.precondition_gradients`), which allows any
            multiplier; for ``torch.optim.SGD`` in a loop that calls ``on_before_optimizer_step``.

    Every hook takes and ignores whatever arguments the loop passes.
    """

    def __init__(self, learner: Learner, loader: Loader, n_task: float, *, implicit: bool = False) -> None:
        self.learner, self.loader, self.n_task = learner, loader, positive("n_task", n_task)
        self.implicit = implicit
        self._gradients: dict[str, Tensor] | None = None  # of the task's loss, between the hooks of one trainer's step

    def on_train_start(self, trainer: Any = None, *args: Any, **kwargs: Any) -> None:
        """Before the first step.

        Raises:
            IncompatiblePair: for a Lightning trainer with several optimisers.
        """
        if is_trainer(trainer) and len(trainer.optimizers) > 1:
            raise IncompatiblePair(
                f"the trainer has {len(trainer.optimizers)} optimisers, and the penalty would come before each: use "
                "one optimiser, or add learner.penalty() / n_task to the loss in training_step"
            )

    def on_after_backward(self, trainer: Any = None, *args: Any, **kwargs: Any) -> None:
        """After the loss was back-propagated: adds the penalty's gradient, but not yet for a Lightning trainer."""
        if not is_trainer(trainer):
            self._add_penalty()

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Between the gradients and the optimiser's step, with the learning rate of its first group."""
        if is_trainer(trainer):
            named = self.learner.model.named_parameters()
            self._gradients = {n: p.grad.detach().to_dense().clone() for n, p in named if p.grad is not None}
            self._add_penalty()
        rate = float(optimizer.param_groups[0]["lr"])
        if self.implicit and rate > 0:
            self.learner.precondition_gradients(rate / self.n_task)

    def on_train_batch_end(self, trainer: Any = None, *args: Any, **kwargs: Any) -> None:
        """After the optimiser's step, if there was one for this minibatch."""
        if not is_trainer(trainer):
            self.learner.after_step()
        elif self._gradients is not None:
            self.learner.after_step(self._gradients)
            self._gradients = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """After the last epoch of the task."""
        with torch.enable_grad():
            self.learner.after_task(self.loader)

    def _add_penalty(self) -> None:
        with torch.enable_grad():
            penalty = self.learner.penalty() / self.n_task
            if penalty.requires_grad:
                penalty.backward()
