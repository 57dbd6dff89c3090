"""A posterior's predictions as a graph of torch's own operations, for servers that have neither this package nor data.

What is traced is the network at the posterior mean and ``diag(J Λ⁻¹ Jᵀ)`` of its linearisation: the forward pass, the
derivatives to the covered weights, and the solve. Weights and precision are constants of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, ShapeMismatch, UnsupportedLayer
from laplace_kf.linalg import cholesky
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise, LowRank, Spectral
from laplace_kf.predictive.linearized import Stand
from laplace_kf.tape import Block

__all__ = ["exported"]

LARGEST = 4096  # parameters of a block up to which its inverse is kept dense
AGREEMENT = 1e-3  # of the graph with what is traced, relative to the largest variance


def exported(
    model: nn.Module,
    forward: Forward | None,
    mean: Mapping[str, Tensor],
    precision: Blockwise,
    x: Any,
    dynamic: bool,
) -> nn.Module:
    """The graph; arguments as of ``LaplacePosterior.export``, ``x (N, ...)``."""
    inputs = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not inputs or not all(isinstance(part, Tensor) and part.dim() for part in inputs):
        raise ShapeMismatch(f"export needs example inputs as a tensor or a tuple of tensors, got {type(x).__name__}")
    inverse = _Inverse(precision)
    leaves = {name: value.detach().clone() for name, value in mean.items()}

    def outputs(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return Stand(model, forward, weights)(model, given[0] if len(given) == 1 else given)[0]

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        def single(weights: dict[str, Tensor], *one: Tensor) -> Tensor:
            return outputs(weights, *(part[None] for part in one))[0]

        found = outputs(leaves, *given)
        with _PlainNormalisation():
            rows = torch.func.vmap(torch.func.jacrev(single), (None, *(0 for _ in given)))(leaves, *given)
        return found, inverse.variances(rows, found)

    with preserved(model), torch.no_grad():
        try:
            wanted = both(*inputs)
            graph = make_fx(both, tracing_mode="symbolic" if dynamic else "real", _allow_non_fake_inputs=True)(*inputs)
            got = graph(*inputs)
        except LaplaceKFError:
            raise
        except Exception as error:
            way = "; export(x, dynamic=False) traces it for this number of examples alone" if dynamic else ""
            raise UnsupportedLayer(
                f"{type(model).__name__} cannot be traced through its per-example derivatives "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}){way}. A posterior of "
                'the last layer alone (parameters="last_layer") needs the least of it'
            ) from error
    for mine, theirs in zip(got, wanted, strict=True):
        if not bool((mine - theirs).abs().max() <= AGREEMENT * theirs.abs().max().clamp_min(1e-12)):
            raise UnsupportedLayer(f"the traced graph of {type(model).__name__} gives other values than the network")
    graph.eval()
    return graph


class _PlainNormalisation(TorchFunctionMode):
    """Batch normalisation by running statistics as arithmetic: torch cannot trace a batch of it otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.nn.functional.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        elif func is torch.batch_norm:
            names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        else:
            return func(*args, **given)
        found = {**dict(zip(names, args, strict=False)), **given}
        x, mean, variance = found["input"], found["running_mean"], found["running_var"]
        if found.get("training") or mean is None:
            return func(*args, **given)
        weight, bias, eps = found.get("weight"), found.get("bias"), found.get("eps", 1e-5)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
        out = (x - mean.reshape(shape)) * scale.reshape(shape)
        return out if bias is None else out + bias.reshape(shape)


class _Inverse:
    """Variances of rows under ``Λ⁻¹``, by blocks; what does not depend on the rows is made beforehand."""

    def __init__(self, precision: Blockwise) -> None:
        self.layout = precision.layout
        self.entries: list[tuple[Block, Callable[[Tensor], Tensor]]] = []
        for block, matrix in precision.entries:
            if isinstance(matrix, Spectral):
                matrix.require_positive()
                self.entries.append((block, partial(_whitened, matrix)))
            elif isinstance(matrix, LowRank):
                diagonal = matrix.prior.expand(matrix.size)
                half = (matrix.vectors * matrix.values.sqrt()).T / diagonal
                low = torch.linalg.solve_triangular(matrix.inner_factor(), half, upper=False)
                self.entries.append((block, partial(_low_rank, diagonal.clone(), low)))
            elif matrix.size <= LARGEST:
                dense = torch.cholesky_inverse(cholesky(matrix.dense(), block.name))
                self.entries.append((block, partial(_dense, dense)))
            else:
                raise IncompatiblePair(
                    f"block {block.name!r} of {matrix.size} parameters has no closed form to export (several kept "
                    "terms, or a prior for each parameter): give one prior_precision, chain with terms='project', or "
                    "fit the last layer alone (parameters='last_layer')"
                )

    def variances(self, rows: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Of rows ``(N, *outputs, *shape)`` by parameter name, in the shape of ``like``."""
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        flat = self.layout.join({name: part.reshape(-1, *shapes[name]) for name, part in rows.items()})
        parts = self.layout.split(flat)
        total = flat.new_zeros(())
        for block, quadratic in self.entries:
            own = block.pack({name: parts[name] for name in block.parameters}).reshape(flat.shape[0], block.size)
            total = total + quadratic(own.T)
        return total.reshape(like.shape)


def _whitened(matrix: Spectral, v: Tensor) -> Tensor:
    return matrix.whiten(v.to(matrix.like)).square().sum(0)


def _dense(inverse: Tensor, v: Tensor) -> Tensor:
    rows = v.to(inverse)
    return (rows * (inverse @ rows)).sum(0)


def _low_rank(diagonal: Tensor, low: Tensor, v: Tensor) -> Tensor:
    rows = v.to(low)
    return (rows.square() / diagonal[:, None]).sum(0) - (low @ rows).square().sum(0)
