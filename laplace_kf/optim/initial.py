"""Start weights: sparse (methods 7.10), and with variances that keep signals level (Glorot and Bengio 2010)."""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from laplace_kf.errors import UnsupportedLayer
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
    ``nn.Bilinear`` an output; of a recurrent layer every gate of a cell; of transformers' ``Conv1D`` (``(I, O)``) a
    column. Of weight normalisation both parts are set, so that the weight itself is the sparse one. Embeddings and
    positions, whose rows are no units with inputs, normalisation layers, and parameters with fewer than two axes that
    are no biases are left alone.

    Args:
        model: the module whose weights are overwritten.
        nonzero: incoming connections per unit.
        scale: standard deviation of feed-forward, or of recurrent networks' input weights.
        generator: random numbers; a fresh private one by default.

    Returns:
        The model.

    Raises:
        IncompatiblePair: for a ``nonzero`` below 1 or a ``scale`` that is not finite or negative; nothing is changed.
        UnsupportedLayer: for layers without weights yet (lazy ones, the meta device), or whose weight is not free to be
            sparse (orthogonal ones); nothing is changed.
    """
    check_arguments({"nonzero": nonzero, "scale": scale})
    generator = generator if generator is not None else fresh_generator()
    spread = nonzero**-0.5
    recurrent = any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules())
    for module, name, parameter in _drawn(model):
        inside = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
        if "bias" in name:
            noise = _normal(parameter, generator) * (spread if recurrent else 0.0)
            _put(module, name, _once(noise, name, module) if inside else noise)
            continue
        size = scale if not recurrent or (inside and name.startswith("weight_ih_l0")) else spread
        if isinstance(module, nn.RNNCellBase) and name == "weight_ih":
            size = scale
        groups = module.groups if isinstance(module, _ConvTransposeNd) else 0
        like = parameter.T if _by_columns(module) else parameter
        found = _sparse(like, nonzero, size, generator, groups)
        _put(module, name, found.T if _by_columns(module) else found)
    return model


@torch.no_grad()
def glorot_init_(model: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    """Glorot initialisation in place: weights uniform in ``±gain √(6 / (fan_in + fan_out))``, biases 0.

    The same generator seed gives the same start to every optimiser (Botev 2020, 4.5). The fans of a convolution are
    its channels (of a group) times the size of its kernel; those of a recurrent layer's gates are those of one gate.
    What :func:`sparse_init_` leaves alone is left alone.

    Args:
        model: the module whose weights are overwritten.
        gain: factor on the range.
        generator: random numbers; a fresh private one by default.

    Returns:
        The model.

    Raises:
        IncompatiblePair: for a ``gain`` that is not finite or negative; nothing is changed.
        UnsupportedLayer: as of :func:`sparse_init_`; nothing is changed.
    """
    check_arguments({"scale": gain})
    generator = generator if generator is not None else fresh_generator()
    for module, name, parameter in _drawn(model):
        if "bias" in name:
            _put(module, name, torch.zeros_like(parameter))
            continue
        kernel = parameter[0, 0].numel()
        first, second = parameter.shape[0] * kernel, parameter.shape[1] * kernel
        if isinstance(module, _ConvNd):
            first //= module.groups
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not name.startswith("weight_hr"):
            first = module.hidden_size
        bound = gain * (6 / (first + second)) ** 0.5
        drawn = torch.rand(parameter.shape, generator=generator, device=generator.device)
        _put(module, name, (bound * (2 * drawn - 1)).to(parameter))
    return model


_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
_LAYERS = (nn.Bilinear, _ConvNd)  # whose weights have more than two axes


def _drawn(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Modules, names and values of all weights and biases that are to be drawn.

    A parametrised weight is one entry, under its own name.

    Raises:
        UnsupportedLayer: if one of them cannot be set.
    """
    found: list[tuple[nn.Module, str, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, (*_LOOKED_UP, *_NORMS, parametrize.ParametrizationList)) or ".parametrizations" in path:
            continue
        entries: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False))
        if any(is_lazy(p) or p.is_meta for _, p in entries):
            raise UnsupportedLayer(
                f"module {path!r} has parameters without numbers (lazy, or on the meta device): run the model once, or "
                "model.to_empty(device=...), and then initialise it"
            )
        if parametrize.is_parametrized(module):
            entries += [(name, getattr(module, name)) for name in module.parametrizations]
        split = {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
        entries = [(n, p) for n, p in entries if n not in {f"{s}{part}" for s in split for part in ("_g", "_v")}]
        entries += [(name, getattr(module, name)) for name in split]
        for name, value in entries:
            if "bias" not in name and (value.dim() < 2 or (value.dim() > 2 and not isinstance(module, _LAYERS))):
                continue
            _require_free(module, path, name, value)
            found.append((module, name, value))
    return found


def _require_free(module: nn.Module, path: str, name: str, value: Tensor) -> None:
    """Refuses a parametrised weight that does not take a sparse value with its zeros where they are."""
    if name in module._parameters or not parametrize.is_parametrized(module, name):
        return
    kept = copy.deepcopy(module)
    inputs = value[0].numel()
    hot = torch.nn.functional.one_hot(torch.arange(len(value), device=value.device) % inputs, inputs)
    wanted = (2 * hot + hot.roll(1, 1)).to(value).reshape(value.shape)  # no identity, which is orthogonal
    with suppress(NotImplementedError, RuntimeError, ValueError):
        setattr(kept, name, wanted)
        if torch.equal(getattr(kept, name) == 0, wanted == 0):
            return
    raise UnsupportedLayer(
        f"the parametrisation of {name!r} of module {path!r} does not let a sparse weight be; initialise the layer "
        "before it is parametrised, or leave it out and draw it by itself"
    )


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Sets a weight: the parameter itself, the parts of a parametrised one, or those of weight normalisation."""
    if name in module._parameters:
        module._parameters[name].copy_(value)  # type: ignore[union-attr]
    elif parametrize.is_parametrized(module, name):
        setattr(module, name, value)
    else:
        hook = next(h for h in module._forward_pre_hooks.values() if isinstance(h, WeightNorm) and h.name == name)
        getattr(module, f"{name}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
        getattr(module, f"{name}_v").copy_(value)
        setattr(module, name, hook.compute_weight(module))


def _by_columns(module: nn.Module) -> bool:
    """Whether a weight is ``(I, O)``, as in transformers' ``Conv1D``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


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
