"""Monte Carlo predictive: outputs at weights drawn from the posterior (methods 10.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import Forward, predicted, tensors_of, to_device
from laplace_kf.engine import preserved
from laplace_kf.errors import NonFinite, ShapeMismatch
from laplace_kf.operators import Blockwise, fresh_generator

__all__ = ["draw_seeds", "outputs_at", "sampled_outputs", "shifted", "weight_noise"]


class _Caller(nn.Module):
    """Calls a model on one input structure, so that ``functional_call`` can put other weights in for the call."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Any) -> Tensor:
        return predicted(self.model, inputs, self._forward)


def outputs_at(model: nn.Module, forward: Forward | None, weights: Mapping[str, Tensor] | None, inputs: Any) -> Tensor:
    """Network outputs ``(N, ...)`` with some parameters replaced; the model itself is not touched.

    Args:
        model: the module, in the mode it is to run in (see :func:`laplace_kf.engine.preserved`).
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        weights: replacements by parameter name, ``None`` for the model's own.
        inputs: what the model takes: a tensor, a tuple, or a mapping of keyword arguments.

    Raises:
        ShapeMismatch: if the outputs have no example and output axes.
    """
    caller = _Caller(model, forward)
    track = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(inputs))
    with torch.set_grad_enabled(track):
        replaced = {f"model.{name}": value for name, value in (weights or {}).items()}
        outputs: Tensor = torch.func.functional_call(caller, replaced, (inputs,))
    if outputs.dim() < 2:
        raise ShapeMismatch(
            f"the model's outputs must be (N, C), (N, T, C) or (N, C, H, W), got {tuple(outputs.shape)}"
        )
    return outputs


def draw_seeds(samples: int, generator: torch.Generator | None) -> list[int]:
    """One seed per draw, so that a draw does not depend on how many are made at once.

    Raises:
        ValueError: if ``samples`` is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    generator = generator if generator is not None else fresh_generator()
    return torch.randint(2**62, (samples,), generator=generator, device=generator.device).tolist()


def weight_noise(precision: Blockwise, seed: int) -> dict[str, Tensor]:
    """One draw from ``N(0, precision⁻¹)`` as parameter-shaped tensors by name."""
    drawn = precision.draw(1, torch.Generator().manual_seed(seed))
    return {name: value[0] for name, value in drawn.items()}


def shifted(mean: Mapping[str, Tensor], noise: Mapping[str, Tensor], spread: float = 1.0) -> dict[str, Tensor]:
    """``mean + spread · noise`` by parameter name, of the same shapes; names without noise keep it."""
    return {name: value + spread * noise[name].to(value) if name in noise else value for name, value in mean.items()}


def sampled_outputs(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    seeds: Sequence[int],
    inputs: Any,
) -> Tensor:
    """Outputs ``(S, N, ...)`` of one batch of inputs at one weight draw per seed.

    Raises:
        NonFinite: if outputs are not finite; says which knob to turn.
    """
    inputs = to_device(inputs, next(iter(mean.values())).device)
    with preserved(model):
        draws = (shifted(mean, weight_noise(precision, seed)) for seed in seeds)
        drawn = torch.stack([outputs_at(model, forward, weights, inputs) for weights in draws])
    if not torch.isfinite(drawn.detach()).all():
        raise NonFinite("outputs at sampled weights have NaN or infinite entries; increase prior_precision or n_data")
    return drawn
