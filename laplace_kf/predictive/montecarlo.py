"""Monte Carlo predictive: outputs at weights, or pre-activations, drawn from the posterior (methods 10.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, check_finite, to_device
from laplace_kf.errors import IncompatiblePair, NonFinite
from laplace_kf.models import preserved, undisturbed
from laplace_kf.operators import Blockwise
from laplace_kf.predictive.activations import activation_outputs, examples
from laplace_kf.predictive.asked import asked, labelled
from laplace_kf.predictive.calls import outputs_at
from laplace_kf.predictive.cost import activations_are_cheaper
from laplace_kf.predictive.draws import DRAWS, Draws
from laplace_kf.predictive.padding import without_padding
from laplace_kf.predictive.suffix import cut
from laplace_kf.predictive.weights import WeightDraws
from laplace_kf.registry import Registry
from laplace_kf.replica import stage

if TYPE_CHECKING:
    from laplace_kf.likelihoods import Likelihood, Prediction

__all__ = ["SPACES", "Predictor", "independent_examples", "monte_carlo", "sampled_outputs", "shifted", "weight_noise"]

Mean = Mapping[str, Tensor]
Space = Callable[[nn.Module, "Forward | None", Mean, Blockwise, Draws, Any], Tensor]
SPACES: Registry[Space] = Registry("sampling space")


def weight_noise(precision: Blockwise, seed: int) -> dict[str, Tensor]:
    """One draw from ``N(0, precision⁻¹)`` as parameter-shaped tensors by name."""
    drawn = precision.draw(1, torch.Generator().manual_seed(seed))
    return {name: value[0] for name, value in drawn.items()}


def shifted(mean: Mapping[str, Tensor], noise: Mapping[str, Tensor], spread: float = 1.0) -> dict[str, Tensor]:
    """``mean + spread · noise`` by parameter name, of the same shapes; names without noise keep it."""
    return {name: value + spread * noise[name].to(value) if name in noise else value for name, value in mean.items()}


@SPACES.register("weights")
def _weights(
    model: nn.Module, forward: Forward | None, mean: Mean, precision: Blockwise, draws: Draws, inputs: Any
) -> Tensor:
    """One set of weight draws for the whole batch."""
    return WeightDraws(model, forward, mean, precision, draws, examples(inputs)).outputs(inputs)


SPACES.register("activations")(activation_outputs)


@SPACES.register("auto")
def _auto(
    model: nn.Module, forward: Forward | None, mean: Mean, precision: Blockwise, draws: Draws, inputs: Any
) -> Tensor:
    """Pre-activations where they are allowed and cheaper (see :mod:`laplace_kf.predictive.cost`), else weights."""
    if activations_are_cheaper(precision, examples(inputs), draws.samples):
        try:
            return activation_outputs(model, forward, mean, precision, draws, inputs)
        except IncompatiblePair:
            pass  # how this model uses its weights does not allow it
    return _weights(model, forward, mean, precision, draws, inputs)


def independent_examples(space: str) -> bool:
    """Whether the draws of a space are made anew for every example."""
    return SPACES[space] is activation_outputs


def monte_carlo(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    inputs: Any,
    samples: int,
    space: str = "auto",
    draws: str = "independent",
    generator: torch.Generator | None = None,
    functions: bool = False,
) -> Tensor:
    """Outputs ``(S, N, ...)`` of one batch of inputs at S draws from ``N(mean, precision⁻¹)``.

    Args:
        model: the module; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        mean: mean weights by parameter name, each of its parameter's shape.
        precision: precision of the flat weights ``(P,)``.
        inputs: what the model takes.
        samples: S.
        space: ``"weights"`` draws one set of weights per sample for the whole batch, ``"activations"`` draws every
            example's pre-activations anew, ``"auto"`` takes the cheaper of the two.
        draws: ``"independent"``, ``"antithetic"`` or ``"sobol"`` (see :mod:`laplace_kf.predictive.draws`).
        generator: random numbers; a fresh private one by default.
        functions: whether a draw has to be one function over all inputs: ``"auto"`` then draws weights.

    Raises:
        UnknownName: for an unknown space or kind of draws.
        IncompatiblePair: for ``space="activations"`` where it is not exact, or Sobol points in too many directions.
        NonFinite: if outputs are not finite; says which knob to turn.
    """
    chosen, noise = (
        _weights if functions and SPACES[space] is _auto else SPACES[space],
        DRAWS[draws](samples, generator),
    )
    inputs = to_device(inputs, next(iter(mean.values())).device)
    model, forward, inputs = cut(model, forward, mean, inputs)
    with preserved(model):
        return _finite(chosen(model, forward, mean, precision, noise, inputs))


def sampled_outputs(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    seeds: Sequence[int],
    inputs: Any,
) -> Tensor:
    """Outputs ``(S, N, ...)`` of one batch of inputs at one independent weight draw per seed.

    Raises:
        NonFinite: if outputs are not finite; says which knob to turn.
    """
    inputs = to_device(inputs, next(iter(mean.values())).device)
    model, forward, inputs = cut(model, forward, mean, inputs)
    with preserved(model):
        draws = (shifted(mean, weight_noise(precision, seed)) for seed in seeds)
        return _finite(torch.stack([outputs_at(model, forward, weights, inputs) for weights in draws]))


def _finite(drawn: Tensor) -> Tensor:
    if not torch.isfinite(drawn.detach()).all():
        raise NonFinite("outputs at sampled weights have NaN or infinite entries; increase prior_precision or n_data")
    return drawn


class Predictor:
    """Predictions of many batches from one set of weight draws, made once.

    All batches see the same S functions: predictions at different inputs are consistent with each other, and a batch
    costs its forward passes only. If the draws do not fit into memory (1 GiB), they are made anew from their seeds for
    every batch, with the same values.

    Args:
        model: the module.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        likelihood: turns outputs into predictions.
        mean: mean weights by parameter name, each of its parameter's shape.
        precision: precision of the flat weights ``(P,)``.
        draws: noise of S draws.
        looked: (model, forward, inputs) → the inputs, looked at before anything is computed with them.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        likelihood: Likelihood,
        mean: Mapping[str, Tensor],
        precision: Blockwise,
        draws: Draws,
        looked: Callable[[nn.Module, Forward | None, Any], Any] = asked,
    ) -> None:
        self.likelihood, self._looked = likelihood, looked
        self._device = next(iter(mean.values())).device
        with undisturbed():
            self._draws = WeightDraws(model, forward, mean, precision, draws, float("inf"), keep=True)
        self._samples = draws.samples

    def __repr__(self) -> str:
        model = type(self._draws.model).__name__
        return f"Predictor({model}, {self.likelihood!r}, samples={self._samples})"

    def outputs(self, x: Any) -> Tensor:
        """Outputs ``(S, N, ...)`` at inputs.

        Raises:
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        with stage(self._draws.model, self._draws.forward) as (model, forward):
            x = self._looked(model, forward, x)
            check_finite(x, 0, "the input")
            with preserved(model):
                return _finite(self._draws.outputs(to_device(x, self._device), model, forward))

    def __call__(self, x: Any, *, keep_samples: bool = False) -> Prediction:
        """Predictive distribution at inputs; see :meth:`laplace_kf.LaplacePosterior.predict`."""
        found = self.likelihood.predict(self.outputs(x), keep_samples=keep_samples)
        found = labelled(self._draws.model, self._draws.forward, x, found)
        return without_padding(found, x, self._draws.forward)
