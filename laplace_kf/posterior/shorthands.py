"""Questions that are one prediction and one look at it, for posteriors and for mixtures of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward
from laplace_kf.errors import InvalidType
from laplace_kf.likelihoods import Prediction
from laplace_kf.members import Members
from laplace_kf.neighbour_members import called
from laplace_kf.outputs.top import TopClasses
from laplace_kf.predictive.loaders import batch_after_batch, is_loader
from laplace_kf.registry import AUTO

__all__ = ["Shorthands"]


class Shorthands(Members, ABC):
    """What follows from ``predict`` alone, and what becomes of other libraries' names."""

    called = "posterior"
    predict: Callable[..., Prediction]

    @abstractmethod
    def _site(self) -> tuple[nn.Module, Forward | None, Any]:
        """The network that reads a batch, the user's ``forward=``, and whether batches have weights."""

    def __call__(self, *_: Any, **settings: Any) -> NoReturn:
        """Other libraries' posteriors are called; this one predicts.

        Raises:
            InvalidType: always, with the line to write.
        """
        raise InvalidType(f"a {type(self).__name__} is not called; use {called(settings)}")

    def predict_interval(
        self, x: Any, level: float = 0.9, of: str = "observation", **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper ends ``(N, C)`` of intervals at inputs: ``predict(x, **settings).interval(level, of)``.

        Arguments and errors as of :meth:`predict` and :meth:`laplace_kf.Prediction.interval`.
        """
        return self.predict(x, **settings).interval(level, of)

    def predict_top_k(
        self,
        x: Any,
        k: int = 5,
        *,
        space: str = AUTO,
        generator: torch.Generator | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> TopClasses:
        """The k most probable classes ``(N, k)`` at inputs: ``predict(x, **settings).top_k(k)``.

        Of a loader's batches nothing else is kept, so that memory does not grow with inputs × classes.

        Args:
            x: inputs as for :meth:`predict`, or a loader of batches.
            k: how many.
            space, generator, progress: as of :meth:`predict`.
            **settings: other arguments of :meth:`predict`.

        Raises:
            ValueError: for k below 1 or above the number of classes.
            IncompatiblePair: for predictions without classes that exclude each other.
        """
        if not is_loader(x):
            return self.predict(x, space=space, generator=generator, **settings).top_k(k)
        one = partial(self._top_k_of_batch, k=k, **settings)
        return batch_after_batch(one, x, *self._site(), space, generator, progress, TopClasses.joined)

    def _rows(self, one: Callable[..., Tensor], loader: Any, generator: torch.Generator | None = None) -> Tensor:
        """What ``one(x, generator=)`` says of every example of a loader, ``(N, ...)``."""

        def of_batch(x: Any, space: str, generator: torch.Generator) -> Tensor:
            return one(x, generator=generator)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(parts))

        return batch_after_batch(of_batch, loader, *self._site(), AUTO, generator, False, joined)

    def _top_k_of_batch(self, x: Any, k: int, **settings: Any) -> TopClasses:
        return self.predict(x, **settings).top_k(k)
