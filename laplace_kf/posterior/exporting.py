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

from laplace_kf.batches import Forward, run
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, ShapeMismatch, UnsupportedLayer
from laplace_kf.linalg import cholesky
from laplace_kf.models import preserved
from laplace_kf.operators import Blockwise, LowRank, Spectral
from laplace_kf.predictive.calls import require_movable
from laplace_kf.predictive.linearized import Stand
from laplace_kf.tape import Block

__all__ = ["exported"]

LARGEST = 4096  # parameters of a block up to which its inverse is kept dense
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107)
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
    count = inputs[0].shape[0]
    if not count or any(part.shape[0] != count for part in inputs):
        raise ShapeMismatch(f"example inputs have {[part.shape[0] for part in inputs]} examples; they need one number")
    if dynamic:  # sizes that are equal by chance are taken for one: a number of examples that is no other size
        taken = {size for part in (*inputs, *model.parameters(), *model.buffers()) for size in part.shape}
        rows = torch.arange(next((k for k in PRIMES if k not in taken), count), device=inputs[0].device) % count
        inputs = tuple(part[rows] for part in inputs)
    inverse = _Inverse(precision)
    leaves = {name: value.detach().clone() for name, value in mean.items()}

    def outputs(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return run(model, given[0] if len(given) == 1 else given, Stand(model, forward, weights))[0]

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        def single(*one: Tensor) -> dict[str, Tensor]:
            """The derivatives of every output ``(C, *shape)``: ``jacrev`` writes into a diagonal, which no ONNX has."""
            run = torch.func.vjp(lambda weights: outputs(weights, *(part[None] for part in one))[0], leaves)
            found, pulled = run[0], run[1]
            count = found.numel()
            each = torch.eye(count, dtype=found.dtype, device=found.device).reshape(count, *found.shape)
            rows: dict[str, Tensor] = torch.func.vmap(lambda one: pulled(one)[0])(each)
            return rows

        found = outputs(leaves, *given)
        with _PlainNormalisation():
            rows = torch.func.vmap(single)(*given)
        return found, inverse.variances(rows, found)

    def last(*given: Tensor) -> tuple[Tensor, Tensor]:
        """As well where the weights are those of the linear layer that gives the outputs: nothing is differentiated."""
        assert linear is not None
        seen: list[Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))
        try:
            found = outputs(leaves, *given)
        finally:
            handle.remove()
        eye = torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
        rows = {
            name: eye.expand(found.shape[0], -1, -1) if value.dim() == 1 else torch.einsum("ck,ni->ncki", eye, seen[-1])
            for name, value in leaves.items()
        }
        return found, inverse.variances(rows, found)

    require_movable(model, forward, mean, x)
    with preserved(model), torch.no_grad():
        try:
            wanted = both(*inputs)
            linear = _linear(model, leaves)
            made = both
            if linear is not None and wanted[0].shape[1:] == (linear.out_features,) and _agree(last(*inputs), wanted):
                made = last
            graph = make_fx(made, tracing_mode="symbolic" if dynamic else "real", _allow_non_fake_inputs=True)(*inputs)
            found = [(graph(*inputs), wanted)]
            if dynamic:
                some = tuple(part[:3] for part in inputs)
                found.append((graph(*some), both(*some)))
        except LaplaceKFError:
            raise
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            way = ", or export(x, dynamic=False) for this number of examples alone" if dynamic else ""
            raise UnsupportedLayer(
                f"{type(model).__name__} cannot be traced through its per-example derivatives "
                f'({type(error).__name__}: {said}). Fit the last layer alone (parameters="last_layer"), which needs '
                f"none{way}"
            ) from error
    if not all(_agree(mine, theirs) for mine, theirs in found):
        raise UnsupportedLayer(f"the traced graph of {type(model).__name__} gives other values than the network")
    graph.eval()
    return graph


def _agree(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def _linear(model: nn.Module, names: Mapping[str, Tensor]) -> nn.Linear | None:
    """The linear layer whose parameters these are, all of them."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Linear) and {prefix + n for n, _ in module.named_parameters()} == set(names):
            return module
    return None


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
