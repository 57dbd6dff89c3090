"""What the trainers' callbacks share: fit a posterior when training has ended, tune it, keep it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from laplace_kf.errors import IncompatiblePair, NotFitted
from laplace_kf.likelihoods import Likelihood
from laplace_kf.posterior import LaplacePosterior

__all__ = ["AfterTraining"]


class AfterTraining:
    """A posterior that is fitted at the end of a trainer's run.

    Args:
        likelihood: registered name or likelihood object.
        tune: ``None`` tunes where there are validation data, ``True`` insists on them, ``False`` leaves it out; a
            mapping has arguments of :meth:`~laplace_kf.LaplacePosterior.tune` (``{"objective": "evidence"}`` needs no
            validation data).
        train, validation: data instead of the trainer's own loaders, in any form that ``fit`` and ``tune`` take.
        save: path of a file that :meth:`~laplace_kf.LaplacePosterior.save` writes.
        generator: random numbers of the fit and of the search; fresh ones by default.
        **options: arguments of :class:`~laplace_kf.LaplacePosterior` after the likelihood.
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        *,
        tune: bool | Mapping[str, Any] | None = None,
        train: Any = None,
        validation: Any = None,
        save: str | os.PathLike[str] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        self.likelihood, self.options = likelihood, options
        self.tune, self.train, self.validation = tune, train, validation
        self.save, self.generator = save, generator
        self._made: LaplacePosterior | None = None

    @property
    def posterior(self) -> LaplacePosterior:
        """The posterior of the last training that ended.

        Raises:
            NotFitted: before the end of a training.
        """
        if self._made is None:
            raise NotFitted("the posterior is fitted when training ends: call the trainer first")
        return self._made

    def check(self, model: nn.Module) -> Likelihood:
        """Before training: refuses arguments that would be refused after it, and returns the likelihood.

        Raises:
            LaplaceKFError: as :class:`~laplace_kf.LaplacePosterior`.
        """
        return LaplacePosterior(model, self.likelihood, **self.options).likelihood

    def finish(self, model: nn.Module, train: Any, validation: Any, processes: int) -> dict[str, float]:
        """Fits, tunes and saves; the numbers are for a log.

        Args:
            model: the trained module.
            train, validation: the trainer's loaders; ``None`` where it has none.
            processes: number of processes that train together.

        Raises:
            IncompatiblePair: without data, without validation data where ``tune=True``, or with several processes.
        """
        if processes > 1:
            raise IncompatiblePair(
                f"training ran in {processes} processes, and a posterior is fitted in one: leave the callback out, "
                f"load the trained weights in one process, and call "
                f"LaplacePosterior(model, {self.likelihood!r}).fit(loader)"
            )
        train = train if self.train is None else self.train
        validation = validation if self.validation is None else self.validation
        if train is None:
            raise IncompatiblePair("the trainer has no training loader; pass one: LaplaceCallback(..., train=loader)")
        settings = dict(self.tune) if isinstance(self.tune, Mapping) else {}
        wanted = self.tune is not False and self.tune is not None
        if validation is None and wanted and "objective" not in settings:
            raise IncompatiblePair(
                "tune needs validation data, and the trainer has none; pass LaplaceCallback(..., validation=loader), "
                'tune={"objective": "evidence"}, or tune=False'
            )
        with torch.inference_mode(False), torch.enable_grad():
            made = LaplacePosterior(model, self.likelihood, **self.options)
            made.fit(train, generator=self.generator)
            found: dict[str, float] = {}
            if self.tune is not False and (validation is not None or settings):
                best = made.tune(validation, generator=self.generator, **settings).best
                found = {name: float(value) for name, value in best.items() if isinstance(value, (int, float))}
        if self.save is not None:
            made.save(self.save)
        self._made = made
        return {"n_data": made.n_data, **found}
