"""Avalanche: a learner of :mod:`laplace_kf.continual` as a plugin of its strategies, in two lines::

    learner = lk.continual.OnlineLaplace(model, "categorical", multiplier=10.0)
    strategy = Naive(model=model, optimizer=optimizer, plugins=[lk.bridges.avalanche.LaplacePlugin(learner)])
    for experience in benchmark.train_stream:
        strategy.train(experience)

Every experience is a task: its penalty joins the loss of the next ones. Needs Avalanche: ``pip install avalanche-lib``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_kf.batches import Forward
from laplace_kf.continual import Learner
from laplace_kf.errors import IncompatiblePair

try:
    from avalanche.models import MultiTaskModule
    from avalanche.training.plugins import SupervisedPlugin
except ImportError as error:
    raise ImportError(
        "The bridge to Avalanche needs the package 'avalanche', which is not installed or lacks one of its own "
        "requirements: pip install avalanche-lib",
        name=error.name,
    ) from error

__all__ = ["LaplacePlugin"]


class LaplacePlugin(SupervisedPlugin):  # type: ignore[misc, unused-ignore]
    """Adds a learner's penalty to the loss of a strategy, and takes in every experience after it was trained on.

    Multi-task models of Avalanche are called with the label of the experience's task; give the learner ``parameters=``
    patterns that leave their heads out.

    Args:
        learner: any :class:`~laplace_kf.continual.Learner` around the strategy's model.
        implicit: whether the penalty is stepped implicitly
            (:meth:`~laplace_kf.continual.Learner.precondition_gradients`), which allows any multiplier; for
            ``torch.optim.SGD``.
    """

    def __init__(self, learner: Learner, *, implicit: bool = False) -> None:
        super().__init__()
        self.learner, self.implicit = learner, implicit

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Before an experience.

        Raises:
            IncompatiblePair: if the learner is around another model, or the loss is not a mean over examples.
        """
        if strategy.model is not self.learner.model:
            raise IncompatiblePair(
                "the plugin's learner is around another model than the strategy's; give both the same object: "
                "learner = OnlineLaplace(model, ...), Naive(model=model, ...)"
            )
        how = getattr(strategy._criterion, "reduction", "mean")
        if how != "mean":
            raise IncompatiblePair(
                f"the strategy's criterion has reduction={how!r}, and the penalty is scaled for a mean over examples: "
                f'{type(strategy._criterion).__name__}(reduction="mean")'
            )

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Between the loss and its gradient: adds the penalty over the number of the experience's examples."""
        task = self.learner.record(strategy.loss.reshape(()))  # theirs is (1,)
        strategy.loss = task + self.learner.penalty() / len(strategy.experience.dataset)

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Between the gradients and the optimiser's step."""
        rate = float(strategy.optimizer.param_groups[0]["lr"])
        if self.implicit and rate > 0:
            self.learner.precondition_gradients(rate / len(strategy.experience.dataset))

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """After the optimiser's step."""
        self.learner.after_step()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """After an experience: one pass over its data, with the transformations of evaluation."""
        experience = strategy.experience
        forward: Forward | None = None
        if isinstance(strategy.model, MultiTaskModule):
            forward = _of_task(experience.task_label)
        data = _Pairs(experience.dataset.eval(), strategy.train_mb_size, strategy.device)
        self.learner.after_task(data, forward=forward)


def _of_task(label: int) -> Forward:
    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0], label), batch[1]

    return forward


class _Pairs:
    """Batches ``(x, y)`` of an Avalanche dataset, whose own have labels of tasks too."""

    def __init__(self, dataset: Any, size: int, device: Any) -> None:
        self.dataset, self.size, self.device = dataset, size, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        collate = getattr(self.dataset, "collate_fn", None)
        for batch in DataLoader(self.dataset, self.size, collate_fn=collate):
            yield batch[0].to(self.device), batch[1].to(self.device)
