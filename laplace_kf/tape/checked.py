"""The check of layer rules against autograd: what signals say must be what one ordinary backward pass gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from laplace_kf.models import coarsest
from laplace_kf.outputs.checks import COARSE, allowed
from laplace_kf.substitution import leaves_of
from laplace_kf.tape.blocks import Block
from laplace_kf.tape.observation import Observation

__all__ = ["count_uses", "disagreeing"]


def disagreeing(
    observation: Observation, blocks: Sequence[Block], unseen: Sequence[str], named: Mapping[str, Tensor]
) -> tuple[list[Block], set[str], bool]:
    """The blocks whose signals imply other gradients than autograd gives, and the parameters that only autograd met.

    The gradients must agree in one random direction. They do not if a rule is wrong, or if a parameter also acts where
    no tape sees it: inside a custom ``autograd.Function``, or through a gradient taken in the forward pass.

    Args:
        observation: one minibatch.
        blocks: what is checked.
        unseen: parameters that no call used.
        named: parameters by name, each in its own shape.

    Returns:
        Those two, and whether the gradient of every block showed anything: one that is zero, or nothing but rounding
        (of a bias that a normalisation takes out again), agrees with any rule.
    """
    outputs = observation.outputs
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    names = [*(name for block in blocks for name in block.parameters), *unseen]
    weights = [named[name] for name in names]
    grads = torch.autograd.grad(outputs, weights, seed, retain_graph=True, allow_unused=True)
    true = _dense(names, weights, grads)
    noise: dict[str, Tensor] | None = None
    with torch.no_grad():
        checked = {block.name for block in blocks}
        # columns are wide: small entries of narrow ones would be left out
        columns = seed[None].to(torch.promote_types(seed.dtype, torch.float32))
        implied = {n: s.total() for n, s in observation.ruled_signals(columns).items() if n in checked}
    failed, shown = [], True
    for block in blocks:
        expected = block.pack(true)[0]
        found = implied.get(block.name, torch.zeros_like(expected))
        rounding = torch.finfo(coarsest(expected.dtype)).eps
        size = _largest if rounding < COARSE else _norm
        gap, scale = size(found - expected), torch.maximum(size(expected), size(found))
        shown = shown and bool(scale > 0)
        if bool(gap > allowed(rounding) * scale):
            if noise is None:
                noise = _rounding(outputs, seed, names, weights, true)
            shown = False
            if bool(gap > (100 if rounding < COARSE else 10 + 100 / found.numel()) * size(block.pack(noise))):
                failed.append(block)
    met = {name for name, grad in zip(names, grads, strict=True) if name in unseen and grad is not None}
    return failed, met, shown


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _norm(values: Tensor) -> Tensor:
    """In half precision single entries tell little: a rule that is wrong may miss the largest one by half of it."""
    return values.float().norm()


def _dense(names: Sequence[str], weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Gradients by name, ``(1, *shape)``."""
    return {
        name: (torch.zeros_like(weight) if grad is None else grad.to_dense())[None]
        for name, weight, grad in zip(names, weights, grads, strict=True)
    }


def _rounding(
    outputs: Tensor, seed: Tensor, names: Sequence[str], weights: Sequence[Tensor], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By how much gradients miss the sum of those of two parts of the seed: what is no larger is rounding."""
    generator = torch.Generator().manual_seed(2)
    part = torch.randn(seed.shape, generator=generator, dtype=torch.float64).to(seed)
    one, two = (
        _dense(names, weights, torch.autograd.grad(outputs, weights, s, retain_graph=True, allow_unused=True))
        for s in (part, seed - part)
    )
    return {name: whole[name] - one[name] - two[name] for name in names}


def count_uses(outputs: Tensor, names: Mapping[int, str]) -> dict[str, int]:
    """How often each parameter (name by id) enters the autograd graph of ``outputs (N, ...)``."""
    found: dict[str, int] = {}
    for leaf in leaves_of(outputs):
        name = names.get(id(leaf))
        if name is not None:
            found[name] = found.get(name, 0) + 1
    return found
