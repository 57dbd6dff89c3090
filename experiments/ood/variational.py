"""Mean-field variational baseline: an independent Gaussian per weight, fitted to the data's evidence bound.

Source: methods 10.4 (FFG).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.common.training import generator, mlp

__all__ = ["MeanFieldLinear", "kl", "mean_field_mlp", "predict"]


class MeanFieldLinear(nn.Module):
    """A linear layer with an independent Gaussian over every weight and bias.

    In training, noise is drawn on the pre-activations, whose distribution given the inputs is Gaussian with mean
    ``M a + m`` and variance ``Σ_w a² + Σ_b`` (the local reparameterisation): one draw per example instead of one per
    batch. In eval mode every call draws one set of weights for all its inputs.

    Args:
        layer: gives the initial means.
        sigma: initial standard deviation of every weight.
        rng: draws the noise; on the layer's device.
    """

    def __init__(self, layer: nn.Linear, sigma: float, rng: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        start = math.log(math.expm1(sigma))  # softplus(start) = sigma
        self.weight_rho = nn.Parameter(torch.full_like(self.weight, start))
        self.bias_rho = nn.Parameter(torch.full_like(self.bias, start))
        self.rng = rng

    def forward(self, inputs: Tensor) -> Tensor:
        """``(N, I) -> (N, O)``, with a fresh draw at every call."""
        weight_sd, bias_sd = (nn.functional.softplus(rho) for rho in (self.weight_rho, self.bias_rho))
        if not self.training:
            weight, bias = self.weight + weight_sd * self._noise(weight_sd), self.bias + bias_sd * self._noise(bias_sd)
            return nn.functional.linear(inputs, weight, bias)
        mean = nn.functional.linear(inputs, self.weight, self.bias)
        variance = nn.functional.linear(inputs.square(), weight_sd.square(), bias_sd.square())
        return mean + variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * self._noise(mean)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.rng)


def mean_field_mlp(
    widths: Sequence[int], *, sigma: float, seed: int, device: torch.device | str = "cpu"
) -> nn.Sequential:
    """The network of :func:`experiments.common.training.mlp` with mean-field layers, on ``device``."""
    rng = generator(seed, device)
    plain = mlp(widths, seed=seed).to(device)
    return nn.Sequential(*(MeanFieldLinear(m, sigma, rng) if isinstance(m, nn.Linear) else m for m in plain))


def kl(model: nn.Module, prior_precision: float) -> Tensor:
    """``KL(q ‖ N(0, I/λ))`` summed over all weights: ``½ Σ (λσ² + λμ² - 1 - ln λσ²)``, a 0-dim tensor."""
    terms = []
    for layer in (module for module in model.modules() if isinstance(module, MeanFieldLinear)):
        for mean, rho in ((layer.weight, layer.weight_rho), (layer.bias, layer.bias_rho)):
            scaled = prior_precision * nn.functional.softplus(rho).square()
            terms.append(0.5 * (scaled + prior_precision * mean.square() - 1 - scaled.log()).sum())
    return torch.stack(terms).sum()


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, samples: int, *, size: int = 5000) -> Tensor:
    """Class probabilities ``(N, C)`` averaged over ``samples`` draws."""
    parts = [sum(model(part).softmax(-1) for _ in range(samples)) / samples for part in inputs.split(size)]
    return torch.cat(parts)
