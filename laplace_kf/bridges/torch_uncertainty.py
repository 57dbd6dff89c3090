"""torch-uncertainty: a posterior as a post-processing method of its routines, in one line::

    laplace = lk.bridges.torch_uncertainty.LaplacePostProcessing("categorical", train=train_loader)
    routine = ClassificationRoutine(model=model, num_classes=10, loss=None, post_processing=laplace)
    TUTrainer().test(routine, datamodule)

The library hands ``fit`` its post-processing split, which the network was not trained on: that is what the posterior is
tuned on. Its curvature is that of the training data, which therefore have to be given. Needs torch-uncertainty:
``pip install torch-uncertainty``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.bridges.after_training import AfterTraining
from laplace_kf.errors import IncompatiblePair
from laplace_kf.likelihoods import Bernoulli, Categorical, Likelihood
from laplace_kf.posterior import LaplacePosterior

try:
    from torch_uncertainty.post_processing import PostProcessing
except ImportError as error:
    raise ImportError(
        "The bridge to torch-uncertainty needs the package 'torch_uncertainty', which is not installed or lacks one of "
        "its own requirements: pip install torch-uncertainty",
        name=error.name,
    ) from error

__all__ = ["LaplacePostProcessing"]


class LaplacePostProcessing(PostProcessing):
    """A posterior as a ``torch_uncertainty.post_processing.PostProcessing``.

    Args:
        likelihood: registered name or likelihood object; of classes ``"categorical"``.
        train: the data that the network was trained on, in any form that :meth:`~laplace_kf.LaplacePosterior.fit`
            takes; without augmentation.
        model: the trained network; routines set it themselves.
        tune: ``False`` leaves out the search on the split that ``fit`` is given; a mapping has arguments of
            :meth:`~laplace_kf.LaplacePosterior.tune`.
        samples: draws of a prediction, where its method draws.
        save: path of a file that :meth:`~laplace_kf.LaplacePosterior.save` writes.
        generator: random numbers of fit, search and predictions; fresh ones by default.
        **options: arguments of :class:`~laplace_kf.LaplacePosterior` after the likelihood.

    Raises:
        IncompatiblePair: without ``train``; for Bernoulli outputs, as the library takes the softmax of what a method
            returns.
        LaplaceKFError: as :class:`~laplace_kf.LaplacePosterior`, when the network is set.
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        train: Any = None,
        model: nn.Module | None = None,
        *,
        tune: bool | Mapping[str, Any] = True,
        samples: int = 100,
        save: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if train is None:
            raise IncompatiblePair(
                "torch-uncertainty gives post-processing methods data that the network was not trained on, and the "
                f"curvature is of those that it was: LaplacePostProcessing({likelihood!r}, train=train_loader)"
            )
        self.samples, self.generator = samples, generator
        self._after = AfterTraining(likelihood, tune=tune, train=train, save=save, generator=generator, **options)
        if model is not None:
            self.set_model(model)

    @property
    def posterior(self) -> LaplacePosterior:
        """The fitted posterior.

        Raises:
            NotFitted: before :meth:`fit`.
        """
        return self._after.posterior

    def set_model(self, model: nn.Module) -> None:
        """Takes the trained network; wrong arguments are refused now."""
        likelihood = self._after.check(model)
        if isinstance(likelihood, Bernoulli):
            raise IncompatiblePair(
                "torch-uncertainty takes the softmax of what a post-processing method returns, which has no meaning "
                'for Bernoulli outputs: give the network an output for each class and use "categorical"'
            )
        super().set_model(model)
        self.trained = False

    def fit(self, dataloader: Any) -> None:
        """Fits the curvature on the training data and tunes on ``dataloader``, data that the network has not seen.

        Raises:
            IncompatiblePair: without a network.
        """
        if self.model is None:
            raise IncompatiblePair("there is no network yet: call set_model(model) before fit")
        self._after.finish(self.model, None, dataloader, 1)
        self.trained = True

    def forward(self, inputs: Tensor) -> Tensor:
        """Predictions at ``inputs (N, ...)``.

        Returns:
            Logarithms of class probabilities ``(N, C)``, of which a softmax makes the probabilities again; means
            ``(N, C)`` for likelihoods of numbers.

        Raises:
            NotFitted: before :meth:`fit`.
        """
        found = self.posterior.predict(inputs, samples=self.samples, generator=self.generator)
        if isinstance(self.posterior.likelihood, Categorical):
            return found.probs.clamp_min(torch.finfo(found.probs.dtype).tiny).log()
        return found.mean
