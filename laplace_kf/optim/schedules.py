"""Schedules and start values around the optimisers: batch sizes, averages, Nesterov momentum, sparse weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from laplace_kf.operators import fresh_generator

__all__ = ["averaging_weight", "batch_size", "nesterov_momentum", "sparse_init_"]


def batch_size(step: int, n_data: int, first: int = 1000, reaches: int = 500) -> int:
    """Minibatch size of step ``step`` (1, 2, ...): exponential, all data at step ``reaches`` (methods 6.3).

    ``min(first · e^{(step−1)/b}, n_data)`` with ``b = (reaches − 1) / ln(n_data / first)``, rounded.

    Raises:
        ValueError: for a step below 1.
    """
    if step < 1:
        raise ValueError(f"steps are numbered from 1, got {step}")
    if n_data <= first:
        return n_data
    growth = math.log(n_data / first) / max(1, reaches - 1)
    return min(n_data, round(first * math.exp(min(growth * (step - 1), math.log(n_data)))))


def averaging_weight(step: int, limit: float) -> float:
    """``min(1 − 1/step, limit)``: the plain mean at first, then an exponential average (methods 4.3, 6.1, 6.3)."""
    return min(1 - 1 / step, limit)


def nesterov_momentum(step: int, limit: float = 0.99) -> float:
    """Momentum of step ``step`` (0, 1, ...) of the NAG baseline: ``min(1 − 2^{−1−log₂(⌊step/250⌋+1)}, limit)``.

    Martens 2016 only refers to it (methods 16).
    """
    return min(1 - 2.0 ** (-1 - math.log2(step // 250 + 1)), limit)


@torch.no_grad()
def sparse_init_(
    model: nn.Module, nonzero: int = 15, scale: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Sparse initialisation in place: every unit gets exactly ``nonzero`` incoming weights (methods 7.10).

    Feed-forward weights, and the input weights of recurrent layers, are drawn from ``N(0, scale²)``; recurrent
    weights and the biases of recurrent layers from ``N(0, 1/nonzero)``; other biases are 0. A unit with fewer inputs
    uses all of them. Parameters with fewer than two axes that are no biases are left alone.

    Args:
        model: the module whose weights are overwritten.
        nonzero: incoming connections per unit.
        scale: standard deviation of feed-forward weights.
        generator: random numbers; a fresh private one by default.

    Returns:
        The model.
    """
    generator = generator if generator is not None else fresh_generator()
    spread = nonzero**-0.5
    for module in model.modules():
        recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("bias"):
                noise = _normal(parameter, generator) * spread
                parameter.copy_(noise if recurrent else torch.zeros_like(parameter))
            elif parameter.dim() >= 2:
                parameter.copy_(
                    _sparse(parameter, nonzero, spread if name.startswith("weight_hh") else scale, generator)
                )
    return model


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _sparse(like: Tensor, nonzero: int, scale: float, generator: torch.Generator) -> Tensor:
    rows = torch.zeros(like.shape[0], like[0].numel())
    for row in rows:
        chosen = torch.randperm(len(row), generator=generator, device=generator.device)[:nonzero]
        row[chosen] = torch.randn(len(chosen), generator=generator, device=generator.device) * scale
    return rows.reshape(like.shape).to(like)
