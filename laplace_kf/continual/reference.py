"""The two lines every method is read against: training on task after task, and on all data seen so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from laplace_kf.batches import Forward, as_batches
from laplace_kf.continual.base import AGAIN, GIVEN, Learner, Loader, require_again, require_data
from laplace_kf.errors import ShapeMismatch

__all__ = ["FineTuning", "JointTraining"]


class FineTuning(Learner):
    """Nothing is kept of earlier tasks: the prior around 0 is the only penalty. Arguments as of :class:`Learner`."""

    def _penalty(self) -> torch.Tensor:
        return self._pull()

    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        return


class JointTraining(FineTuning):
    """Every task is trained on the data of all tasks so far: an upper bound (methods 11.7).

    It keeps the loaders of all tasks; :meth:`training_data` gives them with the new one, and ``N_task`` is then the
    number of all their examples. Arguments as of :class:`Learner`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Loader] = []

    def training_data(self, loader: Loader) -> Loader:
        """The data of all tasks: an iterable that goes from one loader to the next.

        Raises:
            IncompatiblePair: after :meth:`load_state_dict` without :meth:`revisit`.
            ShapeMismatch: for data that can be gone through only once.
        """
        require_data(len(self.seen), self.tasks, AGAIN)
        require_again(loader)
        return _Joined([*self.seen, loader])

    def revisit(self, loaders: Sequence[Loader]) -> None:
        """Brings back the data of the finished tasks after :meth:`load_state_dict`, which a state does not hold.

        Raises:
            IncompatiblePair: if their number is not that of the finished tasks.
        """
        require_data(len(loaders), self.tasks, GIVEN)
        require_again(*loaders)
        self.seen = list(loaders)

    def _after_task(self, loader: Loader, forward: Forward | None, fitting: Mapping[str, Any]) -> None:
        require_again(loader)
        self.seen.append(loader)

    def _finished_heads(self) -> dict[str, torch.Tensor]:
        return {}  # all heads go on learning from their own data, under the prior around 0


class _Joined:
    """Loaders one after the other, as often as it is gone through."""

    def __init__(self, loaders: Sequence[Loader]) -> None:
        self.loaders = list(loaders)

    def __iter__(self) -> Iterator[Any]:
        for k, loader in enumerate(self.loaders):
            empty = True
            for batch in as_batches(loader):
                empty = False
                yield batch
            if empty:
                raise ShapeMismatch(
                    f"the data of task {k + 1} of {len(self.loaders)} brought no batch (any more): its loader has to "
                    "begin anew each time it is gone through"
                )
