"""Start weights: sparse (methods 7.10), and with variances that keep signals level (Glorot and Bengio 2010)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from laplace_kf.operators import fresh_generator
from laplace_kf.optim.arguments import check_arguments

__all__ = ["glorot_init_", "sparse_init_"]


@torch.no_grad()
def sparse_init_(
    model: nn.Module, nonzero: int = 15, scale: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Sparse initialisation in place: every unit gets exactly ``nonzero`` incoming weights (methods 7.10).

    In a feed-forward model weights are drawn from ``N(0, scale²)`` and biases are 0. In a model with recurrent layers
    only the matrices of their inputs are ``N(0, scale²)``; recurrent and all other (output) matrices and all biases are
    ``N(0, 1/nonzero)``. Torch's recurrent layers have two biases that act as their sum: the second one starts at 0,
    except in a GRU, where its last third acts on its own. A unit with fewer inputs uses all of them. A unit of a
    convolution is an output channel, of a transposed one too (its weights are ``(I, O/groups, ...)``); of
    ``nn.Bilinear`` an output; of a recurrent layer every gate of a cell. Embeddings, whose rows are no units with
    inputs, and parameters with fewer than two axes that are no biases are left alone.

    Args:
        model: the module whose weights are overwritten.
        nonzero: incoming connections per unit.
        scale: standard deviation of feed-forward, or of recurrent networks' input weights.
        generator: random numbers; a fresh private one by default.

    Returns:
        The model.

    Raises:
        IncompatiblePair: for a ``nonzero`` below 1 or a ``scale`` that is not finite or negative; nothing is changed.
    """
    check_arguments({"nonzero": nonzero, "scale": scale})
    generator = generator if generator is not None else fresh_generator()
    spread = nonzero**-0.5
    recurrent = any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules())
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        inside = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                noise = _normal(parameter, generator) * (spread if recurrent else 0.0)
                parameter.copy_(_once(noise, name, module) if inside else noise)
            elif parameter.dim() >= 2:
                size = scale if not recurrent or (inside and name.startswith("weight_ih_l0")) else spread
                if isinstance(module, nn.RNNCellBase) and name == "weight_ih":
                    size = scale
                groups = module.groups if isinstance(module, _ConvNd) else 1
                turned = isinstance(module, _ConvTransposeNd)
                parameter.copy_(_sparse(parameter, nonzero, size, generator, groups if turned else 0))
    return model


@torch.no_grad()
def glorot_init_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    """Glorot initialisation in place: weights uniform in ``±gain √(6 / (fan_in + fan_out))``, biases 0.

    The same generator seed gives the same start to every optimiser (Botev 2020, 4.5). The fans of a convolution are
    its channels (of a group) times the size of its kernel; those of a recurrent layer's gates are those of one gate.
    Embeddings, and parameters with fewer than two axes that are no biases, are left alone.

    Args:
        model: the module whose weights are overwritten.
        gain: factor on the range.
        generator: random numbers; a fresh private one by default.

    Returns:
        The model.

    Raises:
        IncompatiblePair: for a ``gain`` that is not finite or negative; nothing is changed.
    """
    check_arguments({"scale": gain})
    generator = generator if generator is not None else fresh_generator()
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name:
                parameter.zero_()
            elif parameter.dim() >= 2:
                kernel = parameter[0, 0].numel()
                first, second = parameter.shape[0] * kernel, parameter.shape[1] * kernel
                if isinstance(module, _ConvNd):
                    first //= module.groups
                elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not name.startswith("weight_hr"):
                    first = module.hidden_size
                bound = gain * (6 / (first + second)) ** 0.5
                drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_((bound * (2 * drawn - 1)).to(parameter))
    return model


def _once(noise: Tensor, name: str, module: nn.Module) -> Tensor:
    """The second of two biases, which torch adds to the first, without its part in the sum."""
    if name.startswith("bias_hh"):
        own = len(noise) * 2 // 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else len(noise)
        noise[:own] = 0
    return noise


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _sparse(like: Tensor, nonzero: int, scale: float, generator: torch.Generator, groups: int) -> Tensor:
    """Weights of the shape of ``like``; with ``groups`` of a transposed convolution ``(I, O/groups, ...)``, else 0."""
    shape = like.shape
    if groups:  # (groups, I/groups, O/groups, ...) -> a row for every output channel
        wide = like.new_empty(groups, shape[0] // groups, *shape[1:]).transpose(1, 2)
        units = wide.shape
        rows = torch.zeros(units[0] * units[1], wide[0, 0].numel())
    else:
        rows = torch.zeros(shape[0], like[0].numel())
    for row in rows:
        chosen = torch.randperm(len(row), generator=generator, device=generator.device)[:nonzero]
        row[chosen.to(row.device)] = (
            torch.randn(len(chosen), generator=generator, device=generator.device).to(row.device) * scale
        )
    if groups:
        return rows.reshape(units).transpose(1, 2).reshape(shape).to(like)
    return rows.reshape(shape).to(like)
