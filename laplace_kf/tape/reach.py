"""Which positions of a layer count: those from which a counted output can be reached.

A target that is not ignored makes its output position count. Going back from there, an input position (a row) of a
layer counts if a counted output of the network is a function of it. One backward pass with random numbers at the
counted outputs tells: a row's gradient is zero exactly where every path to a counted output is cut, by an index, by a
mask, by an attention weight of 0, by the end of a recurrence. Which rows count must not depend on where the weights
happen to have switched a unit off, nor on the estimator. So paths that are only *flat* at the present weights are kept
open in this pass: elementwise activations hand on what they would multiply by 0, a maximum hands on to all it looked
at, and an attention weight of 1 (a single visible key) hands on to its query and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["reached"]

Gradients = Sequence["Tensor | None"]
Patch = Callable[[Any, Gradients, Gradients], "list[Tensor | None]"]


def reached(
    outputs: Tensor, edges: Sequence[GradientEdge], counted: Tensor | None = None, flat: Sequence[Any] = ()
) -> list[Tensor | None]:
    """Numbers at places of the autograd graph that are zero where no counted output can be reached.

    Args:
        outputs: the network's outputs ``(N, ...)``.
        edges: the places.
        counted: which outputs count, bool of their shape; ``None`` for all of them.
        flat: further autograd nodes that act elementwise (in-place activations on views, which hide their name).

    Returns:
        For every edge a tensor of the shape of what stands there; ``None`` where nothing is reached.
    """
    generator = torch.Generator().manual_seed(2)
    seed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    if counted is not None:
        seed = torch.where(counted, seed, torch.zeros((), dtype=seed.dtype, device=seed.device))
    with _opened(outputs, flat):
        return list(torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True))


@contextmanager
def _opened(outputs: Tensor, flat: Sequence[Any]) -> Iterator[None]:
    """Nodes behind the outputs that can be flat hand gradients on all the same meanwhile."""
    handles: list[Any] = []
    stack: list[Any] = [outputs.grad_fn]
    seen: set[Any] = {None, outputs.grad_fn}
    inplace = set(flat)
    try:
        while stack:
            node = stack.pop()
            if node is None:
                continue
            patch = _elementwise if node in inplace else _patch_of(node.name())
            if patch is not None:
                handles.append(node.register_hook(_hook(patch, node)))
            for following, _ in node.next_functions:
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(patch: Patch, node: Any) -> Callable[[Gradients, Gradients], tuple[Tensor | None, ...]]:
    return lambda inputs, outputs: tuple(patch(node, inputs, outputs))


def _patch_of(name: str) -> Patch | None:
    stem = name.partition("Backward")[0]
    if stem.startswith("ScaledDotProduct"):
        return _fused_attention
    return PATCHES.get(stem)


def _filled(gradient: Tensor | None, other: Tensor) -> Tensor | None:
    """A gradient with the entries of ``other`` (broadcastable to its shape) where it is 0."""
    return None if gradient is None else torch.where(gradient == 0, other.to(gradient), gradient)


def _elementwise(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    found = list(inputs)
    if outputs[0] is not None and found[0] is not None and found[0].shape == outputs[0].shape:
        found[0] = _filled(found[0], outputs[0])
    return found


def _maximum(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """A maximum over some axes, or over all of them."""
    (mine, *rest), given = inputs, outputs[0]
    if mine is None or given is None:
        return list(inputs)
    dims = getattr(node, "_saved_dim", ())
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if given.dim() < mine.dim() and dims:
        for dim in sorted(_index(d, mine.dim()) for d in dims):
            given = given.unsqueeze(dim)
    return [_filled(mine, given), *rest]


def _index(dim: int, dims: int) -> int:
    """An axis as a number that is not negative; autograd saves negative ones as unsigned."""
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim % dims


def _either(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """The larger or smaller of two tensors, which have the shape of the result here."""
    given = outputs[0]
    return [one if one is None or given is None else _filled(one, given) for one in inputs]


def _scattered(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """Everything of which a maximum or minimum was scattered (the largest node of a graph)."""
    found, given = list(inputs), outputs[0]
    if given is None or not str(getattr(node, "_saved_reduce", "")).startswith(("amax", "amin")):
        return found
    index, dim = node._saved_index, _index(node._saved_dim, given.dim())
    into, source = (*found, None, None)[:2]
    if into is not None:
        found[0] = _filled(into, given)
    if source is not None and index.dim() == 1 and source.shape[dim : dim + 1] == index.shape:
        found[1] = _filled(source, given.index_select(dim, index))
    elif source is not None and source.shape == index.shape:
        found[1] = _filled(source, given.gather(dim, index))
    return found


def _max_pool(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """Every place of a window that the pooling looked at."""
    (mine, *rest), given = inputs, outputs[0]
    if mine is None or given is None:
        return list(inputs)
    dims = len(node._saved_kernel_size)
    kernel, padding, dilation = node._saved_kernel_size, node._saved_padding, node._saved_dilation
    stride = node._saved_stride or kernel
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    everywhere = bool(given.all())  # then the windows are the same for every example and channel
    one = given.new_ones(1, 1, *given.shape[-dims:])
    channel = one if everywhere else given.abs().flatten(0, -dims - 1)[:, None]
    spread = transposed(channel, given.new_ones(1, 1, *kernel), stride=stride, dilation=dilation)
    room: list[int] = []
    for axis in reversed(range(dims)):  # F.pad lists the last axis first, and cuts where it is negative
        before = padding[axis]
        room += [-before, mine.shape[axis - dims] - (spread.shape[axis - dims] - before)]
    spread = F.pad(spread, room)
    if not everywhere:
        return [_filled(mine, spread.reshape(mine.shape)), *rest]
    # equal numbers could cancel in the layers before: each channel and place has its own
    rng = torch.Generator().manual_seed(3)
    numbers = torch.randn(mine.shape[-dims - 1 :], generator=rng, dtype=torch.float64).to(spread)
    return [_filled(mine, numbers * (spread[0] != 0)), *rest]


def _adaptive_max_pool(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    (mine, *rest), given = inputs, outputs[0]
    if mine is None or given is None:
        return list(inputs)
    dims = 3 if "3" in node.name() else 2
    pool = F.adaptive_avg_pool3d if dims == 3 else F.adaptive_avg_pool2d
    with torch.enable_grad():
        leaf = torch.zeros_like(mine, requires_grad=True)
        (spread,) = torch.autograd.grad(pool(leaf, given.shape[-dims:]), leaf, given.abs())  # type: ignore[arg-type]
    return [_filled(mine, spread), *rest]


def _softmax(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """Every entry with a weight; a weight of exactly 0 (a masked key) stays cut."""
    (mine, *rest), given = inputs, outputs[0]
    if mine is None or given is None:
        return list(inputs)
    dim = _index(node._saved_dim, given.dim())
    asked = (given != 0).any(dim, keepdim=True)
    return [_filled(mine, node._saved_result * asked), *rest]


def _fused_attention(node: Any, inputs: Gradients, outputs: Gradients) -> list[Tensor | None]:
    """A query is reached where its output is, a key where its value is."""
    found = list(inputs)
    given = outputs[0]
    if len(found) < 3 or given is None:
        return found
    for k, other in ((0, given), (1, found[2])):
        mine = found[k]
        if mine is not None and other is not None and mine.shape[:-1] == other.shape[:-1]:
            found[k] = _filled(mine, (other != 0).any(-1, keepdim=True) & (mine == 0).all(-1, keepdim=True))
    return found


_ACTIVATIONS = (
    "Relu Threshold LeakyRelu Hardtanh Hardswish Hardsigmoid Tanh Sigmoid Gelu Silu Mish Elu Softplus Softshrink "
    "Hardshrink Clamp ClampMin ClampMax Abs LogSigmoid PreluKernel RreluWithNoise Pow Sqrt Erf Exp Sin Cos Celu"
)
PATCHES: dict[str, Patch] = {
    **dict.fromkeys(_ACTIVATIONS.split(), _elementwise),
    **dict.fromkeys(("Max", "Min", "Amax", "Amin"), _maximum),
    **dict.fromkeys(("Maximum", "Minimum"), _either),
    **dict.fromkeys(("MaxPool2DWithIndices", "MaxPool3DWithIndices"), _max_pool),
    **dict.fromkeys(("AdaptiveMaxPool2D", "AdaptiveMaxPool3D"), _adaptive_max_pool),
    **dict.fromkeys(("ScatterReduce", "IndexReduce"), _scattered),
    **dict.fromkeys(("Softmax", "SafeSoftmax"), _softmax),
}
