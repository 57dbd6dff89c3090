"""A learner as a callback, for training loops that offer hooks (Lightning's names; nothing of it is imported)."""

from __future__ import annotations

from typing import Any

import torch

from laplace_kf.continual.base import Learner, Loader
from laplace_kf.posterior.prior import positive

__all__ = ["Callback"]


class Callback:
    """Adds a learner's penalty to the gradients of a training loop that it does not own.

    Args:
        learner: any :class:`Learner`.
        loader: the task's data.
        n_task: number of its examples; the loss of the loop is a mean over examples.
        implicit: whether the penalty is stepped implicitly (:meth:`Learner.precondition_gradients`), which allows any
            multiplier; for ``torch.optim.SGD`` in a loop that calls ``on_before_optimizer_step``.

    Every hook takes and ignores whatever arguments the loop passes. Gradients must not be scaled (mixed precision with
    a loss scale) between ``on_after_backward`` and the optimiser's step.
    """

    def __init__(self, learner: Learner, loader: Loader, n_task: float, *, implicit: bool = False) -> None:
        self.learner, self.loader, self.n_task = learner, loader, positive("n_task", n_task)
        self.implicit = implicit

    def on_after_backward(self, *args: Any, **kwargs: Any) -> None:
        """After the loss was back-propagated: adds the penalty's gradient."""
        (self.learner.penalty() / self.n_task).backward()

    def on_before_optimizer_step(
        self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Between the gradients and the optimiser's step, with the learning rate of its first group."""
        rate = float(optimizer.param_groups[0]["lr"])
        if self.implicit and rate > 0:
            self.learner.precondition_gradients(rate / self.n_task)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimiser's step."""
        self.learner.after_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """After the last epoch of the task."""
        self.learner.after_task(self.loader)
