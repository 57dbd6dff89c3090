"""Plain float64 references for everything the package computes faster.

Nothing of ``laplace_kf`` is imported here. Every function follows its definition literally: one example at a time
(batch size 1), one output at a time, one position at a time. Letters: N examples, T positions that share a weight,
I in (with the appended 1 of a bias), O out, C all outputs of one example flattened, P selected parameters.

Curvature is always that of the *sum* over an example's outputs, averaged over examples, with the model in eval mode.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100

Nll = Callable[[Tensor, Tensor], Tensor]
"""``nll(z (1, ...), y (1, ...)) -> 0-dim``: minus log density of one example, all constants included."""

OutputMatrix = Callable[[Tensor, Tensor], Tensor]
"""``matrix(z (1, ...), y (1, ...)) -> (C, C)`` of the flattened outputs of one example."""


# ------------------------------------------------------------------------------------------------ calling models


def call(model: nn.Module, x: Any) -> Tensor:
    """Model outputs for a tensor, a tuple of positional inputs or a mapping of keyword inputs."""
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, tuple):
        return model(*x)
    return model(x)


def take(x: Any, index: Any) -> Any:
    """Select examples from every input tensor."""
    if isinstance(x, Mapping):
        return {key: value[index] for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(value[index] for value in x)
    return x[index]


def count(y: Tensor) -> int:
    """Number of examples."""
    return y.shape[0]


def all_names(model: nn.Module) -> list[str]:
    """Names of the parameters with ``requires_grad``, in ``named_parameters`` order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def private(model: nn.Module, names: Sequence[str] | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in eval mode in which exactly the selected parameters require gradients."""
    names = all_names(model) if names is None else list(names)
    model = copy.deepcopy(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    parameters = dict(model.named_parameters())
    return model, {name: parameters[name] for name in parameters if name in names}


def flat_parameters(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """The selected parameters as one vector ``(P,)``."""
    names = all_names(model) if names is None else names
    return torch.cat([p.detach().reshape(-1) for name, p in model.named_parameters() if name in names])


def flat_index(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Position of every entry of every selected parameter in the flat vector, each of the parameter's shape."""
    names = all_names(model) if names is None else names
    index, start = {}, 0
    for name, parameter in model.named_parameters():
        if name in names:
            index[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
            start += parameter.numel()
    return index


def _rows(scalars: Sequence[Tensor], wrt: Sequence[Tensor]) -> Tensor:
    """Gradients of each scalar with respect to all tensors, flattened and joined: (len(scalars), numel)."""
    rows = []
    for scalar in scalars:
        if not scalar.requires_grad:
            rows.append(torch.cat([torch.zeros_like(w).reshape(-1) for w in wrt]))
            continue
        grads = torch.autograd.grad(scalar, wrt, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wrt, strict=True)]
        rows.append(torch.cat([part.detach().reshape(-1) for part in parts]))
    return torch.stack(rows)


@torch.enable_grad()
def jacobian(model: nn.Module, x: Any, n: int, names: Sequence[str] | None = None) -> Tensor:
    """Derivative of the flattened outputs of each of the n examples with respect to the parameters: (N, C, P)."""
    model, parameters = private(model, names)
    out = []
    for i in range(n):
        z = call(model, take(x, slice(i, i + 1)))
        out.append(_rows(list(z.reshape(-1)), list(parameters.values())))
    return torch.stack(out)


def outputs(model: nn.Module, x: Any, n: int) -> list[Tensor]:
    """Eval-mode outputs, one tensor (1, ...) per example."""
    model, _ = private(model, [])
    with torch.no_grad():
        return [call(model, take(x, slice(i, i + 1))).clone() for i in range(n)]


# ------------------------------------------------------------------------------------------------ minus log densities


def _channel_last(z: Tensor) -> Tensor:
    """(1, C), (1, T, C) or (1, C, H, W) -> (positions, C)."""
    if z.ndim == 4:
        z = z.permute(0, 2, 3, 1)
    return z.reshape(-1, z.shape[-1])


def categorical_nll(z: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y summed over the positions whose target is not -100."""
    total = 0.0 * z.sum()
    for row, label in zip(_channel_last(z), y.reshape(-1).tolist(), strict=True):
        if label != IGNORE:
            total = total + torch.log(torch.exp(row - row.detach().max()).sum()) + row.detach().max() - row[label]
    return total


def bernoulli_nll(z: Tensor, y: Tensor) -> Tensor:
    """-Σ y log σ(z) + (1 - y) log(1 - σ(z))."""
    return (torch.logaddexp(z, torch.zeros_like(z)) - y * z).sum()


def gaussian_nll(scale: float) -> Nll:
    """-log N(y; z, scale² I)."""

    def nll(z: Tensor, y: Tensor) -> Tensor:
        return (0.5 * math.log(2 * math.pi) + math.log(scale) + (z - y) ** 2 / (2 * scale**2)).sum()

    return nll


def poisson_nll(z: Tensor, y: Tensor) -> Tensor:
    """Log-rate z: Σ e^z - y z + log y!."""
    return (torch.exp(z) - y * z + torch.lgamma(y + 1)).sum()


def heteroscedastic_nll(z: Tensor, y: Tensor) -> Tensor:
    """z = (mean, log variance)."""
    mean, log_variance = z[:, 0], z[:, 1]
    return (0.5 * (math.log(2 * math.pi) + log_variance + (y[:, 0] - mean) ** 2 * torch.exp(-log_variance))).sum()


def mixture_nll(z: Tensor, y: Tensor) -> Tensor:
    """z = (gate, first, second): p(y) = π q₂ + (1 - π) q₃ (S3 eq. 4.28)."""
    gate, s2, s3 = (torch.sigmoid(z[:, i]) for i in range(3))
    t = y.reshape(-1)
    q2, q3 = torch.where(t > 0.5, s2, 1 - s2), torch.where(t > 0.5, s3, 1 - s3)
    return -torch.log(gate * q2 + (1 - gate) * q3).sum()


# ------------------------------------------------------------------------------------------------ output curvature


def output_hessian(nll: Nll) -> OutputMatrix:
    """Hessian of -log p with respect to the flattened outputs, by autograd; kept, as several references ask for it."""
    known: dict[tuple[Any, ...], Tensor] = {}

    @torch.enable_grad()
    def matrix(z: Tensor, y: Tensor) -> Tensor:
        key = tuple(part for t in (z, y) for part in (t.shape, t.dtype, t.detach().numpy().tobytes()))
        if key not in known:
            flat = z.detach().reshape(-1)
            known[key] = torch.autograd.functional.hessian(lambda v: nll(v.view(z.shape), y), flat)
        return known[key].clone()

    return matrix


def output_score(nll: Nll) -> OutputMatrix:
    """Outer product of the score at the given target (the empirical Fisher's inner matrix)."""

    @torch.enable_grad()
    def matrix(z: Tensor, y: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(nll(z, y), z)
        return torch.outer(g.reshape(-1), g.reshape(-1))

    return matrix


def heteroscedastic_fisher(z: Tensor, y: Tensor) -> Tensor:
    """E[(y-m)²] = v turns the Hessian into diag(1/v, 1/2)."""
    return torch.diag(torch.stack([torch.exp(-z[0, 1]), torch.full_like(z[0, 1], 0.5)]))


def mixture_fisher(z: Tensor, y: Tensor) -> Tensor:
    """Σ_y p(y) score scoreᵀ over both labels."""
    total = torch.zeros(3, 3, dtype=z.dtype)
    for label in (0.0, 1.0):
        target = torch.full_like(y, label)
        total += torch.exp(-mixture_nll(z, target)) * output_score(mixture_nll)(z, target)
    return total


def mixture_curvature(mode: str) -> OutputMatrix:
    """The four positive semi-definite readings of the indefinite Hessian (methods 3.1)."""

    def matrix(z: Tensor, y: Tensor) -> Tensor:
        if mode == "fisher":
            return mixture_fisher(z, y)
        if mode == "em":
            gate, s2, s3 = torch.sigmoid(z[0])
            t = y.reshape(-1)[0]
            q2, q3 = (s2, s3) if t > 0.5 else (1 - s2, 1 - s3)
            r = gate * q2 / (gate * q2 + (1 - gate) * q3)
            return torch.diag(torch.stack([gate * (1 - gate), r * s2 * (1 - s2), (1 - r) * s3 * (1 - s3)]))
        values, vectors = torch.linalg.eigh(output_hessian(mixture_nll)(z, y))
        values = values.abs() if mode == "abs" else values.clamp(min=0)
        return vectors @ torch.diag(values) @ vectors.T

    return matrix


# ------------------------------------------------------------------------------------------------ dense curvature

Passes = tuple[Tensor, list[Tensor]]
"""What :func:`jacobian` and :func:`outputs` found, for references that several times need them."""


def passes(model: nn.Module, x: Any, n: int, names: Sequence[str] | None = None) -> Passes:
    """Every example run by itself: the Jacobian (N, C, P) and the outputs."""
    return jacobian(model, x, n, names), outputs(model, x, n)


def dense_ggn(
    model: nn.Module,
    x: Any,
    y: Tensor,
    nll: Nll,
    names: Sequence[str] | None = None,
    curvature: OutputMatrix | None = None,
    seen: Passes | None = None,
) -> Tensor:
    """Mean over examples of JᵀHJ: (P, P). H is the autograd Hessian of ``nll`` unless ``curvature`` is given."""
    curvature = output_hessian(nll) if curvature is None else curvature
    n = count(y)
    total = 0.0
    for i, (jac, z) in enumerate(zip(*(seen or passes(model, x, n, names)), strict=True)):
        total = total + jac.T @ curvature(z, y[i : i + 1]) @ jac
    return total / n


def diag_ggn(
    model: nn.Module,
    x: Any,
    y: Tensor,
    nll: Nll,
    names: Sequence[str] | None = None,
    curvature: OutputMatrix | None = None,
    seen: Passes | None = None,
) -> Tensor:
    """Diagonal of the GGN, entry by entry: (P,)."""
    curvature = output_hessian(nll) if curvature is None else curvature
    n = count(y)
    total = 0.0
    for i, (jac, z) in enumerate(zip(*(seen or passes(model, x, n, names)), strict=True)):
        h = curvature(z, y[i : i + 1])
        total = total + ((jac.T @ h) * jac.T).sum(1)
    return total / n


@torch.enable_grad()
def empirical_fisher(model: nn.Module, x: Any, y: Tensor, nll: Nll, names: Sequence[str] | None = None) -> Tensor:
    """Mean over examples of the outer product of the per-example gradient at the given target: (P, P)."""
    model, parameters = private(model, names)
    total = 0.0
    for i in range(count(y)):
        loss = nll(call(model, take(x, slice(i, i + 1))), y[i : i + 1])
        grad = _rows([loss], list(parameters.values()))[0]
        total = total + torch.outer(grad, grad)
    return total / count(y)


@torch.enable_grad()
def dense_hessian(model: nn.Module, x: Any, y: Tensor, nll: Nll, names: Sequence[str] | None = None) -> Tensor:
    """Hessian of the mean over examples of -log p: (P, P)."""
    model, parameters = private(model, names)
    wrt = list(parameters.values())
    total = 0.0
    for i in range(count(y)):
        loss = nll(call(model, take(x, slice(i, i + 1))), y[i : i + 1])
        grads = torch.autograd.grad(loss, wrt, create_graph=True, allow_unused=True)
        flat = torch.cat(
            [torch.zeros_like(w).reshape(-1) if g is None else g.reshape(-1) for g, w in zip(grads, wrt, strict=True)]
        )
        total = total + _rows(list(flat), wrt)
    return total / count(y)


def log_likelihood(model: nn.Module, x: Any, y: Tensor, nll: Nll) -> float:
    """Sum over examples of log p at the model's parameters."""
    return -sum(float(nll(z, y[i : i + 1])) for i, z in enumerate(outputs(model, x, count(y))))


# ------------------------------------------------------------------------------------------------ Kronecker factors


@dataclass
class Block:
    """One diagonal block of the structured curvature.

    ``index (O, I)`` gives the flat position of every entry of the canonical matrix [W|b]; its row-major vector has
    curvature ``kron(G, A)``. A block without factors is ``diagonal``: then ``index (n,)`` and ``values (n,)``.
    """

    names: tuple[str, ...]
    index: Tensor
    A: Tensor | None = None
    G: Tensor | None = None
    values: Tensor | None = None
    positions: float = 1.0  # how many rows of a Kronecker block count

    def dense(self) -> Tensor:
        """The block in its own order."""
        return torch.diag(self.values) if self.values is not None else torch.kron(self.G, self.A)


def assemble(blocks: Sequence[Block], size: int, dense: Callable[[Block], Tensor] = Block.dense) -> Tensor:
    """Place every block at its flat positions: (P, P)."""
    out = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        index = block.index.reshape(-1)
        out[index[:, None], index[None, :]] = dense(block)
    return out


@torch.enable_grad()
def eigenvalue_corrected(
    model: nn.Module,
    x: Any,
    y: Tensor,
    curvature: OutputMatrix,
    blocks: Sequence[Block],
    names: Sequence[str],
    seen: Passes | None = None,
) -> Tensor:
    """Every factorised block with its eigenvalues replaced by mean squares of rotated per-example gradients: (P, P).

    One example, one column of the output root and one block at a time (George et al. 2018, section 3.1). A lookup
    table keeps its one-hot basis: its input factor is diagonal.
    """
    index, modules = flat_index(model, names), dict(model.named_modules())
    n = count(y)
    rows, z = seen or passes(model, x, n, names)
    roots = [torch.linalg.eigh(curvature(z[i], y[i : i + 1])) for i in range(n)]
    out = torch.zeros(sum(i.numel() for i in index.values()), sum(i.numel() for i in index.values())).double()
    for block in blocks:
        flat = block.index.reshape(-1)
        where = (flat[:, None], flat[None, :])
        if block.values is not None:
            out[where] = torch.diag(block.values)
            continue
        lookup = isinstance(modules.get(block.names[0].rpartition(".")[0]), nn.Embedding)
        of_a = torch.eye(block.A.shape[0]).double() if lookup else torch.linalg.eigh(block.A)[1]
        of_g = torch.linalg.eigh(block.G)[1]
        squares = torch.zeros(block.index.shape, dtype=torch.float64)
        for i in range(n):
            values, vectors = roots[i]
            for value, vector in zip(values.clamp(min=0), vectors.T, strict=True):
                gradient = (value.sqrt() * vector @ rows[i])[flat].view(block.index.shape)
                squares += (of_g.T @ gradient @ of_a) ** 2 / n
        basis = torch.kron(of_g.contiguous(), of_a.contiguous())
        out[where] = basis @ torch.diag(squares.reshape(-1)) @ basis.T
    return out


def low_rank_plus_diagonal(ggn: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors and what they leave of the diagonal: (P, P)."""
    values, vectors = torch.linalg.eigh(ggn)
    low = vectors[:, -rank:] @ torch.diag(values[-rank:]) @ vectors[:, -rank:].T
    return low + torch.diag((ggn - low).diagonal().clamp(min=0))


def layer_blocks(ggn: Tensor, index: Mapping[str, Tensor]) -> Tensor:
    """The blocks of a dense matrix that belong to one module, zero elsewhere: (P, P)."""
    out = torch.zeros_like(ggn)
    for module in {name.rpartition(".")[0] for name in index}:
        mine = torch.cat([where.reshape(-1) for name, where in index.items() if name.rpartition(".")[0] == module])
        where = (mine[:, None], mine[None, :])
        out[where] = ggn[where]
    return out


CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def canonical(module: nn.Module, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """[W|b] as (O, I), one matrix per group: weight[o] flattened row-major, then the bias."""
    if isinstance(module, nn.Linear):
        parts = [weight]
    elif isinstance(module, nn.Embedding):
        parts = [weight.T]
    elif isinstance(module, CONV):
        parts = [w.reshape(w.shape[0], -1) for w in weight.chunk(module.groups, 0)]
    elif isinstance(module, TRANSPOSED):
        parts = [w.transpose(0, 1).reshape(w.shape[1], -1) for w in weight.chunk(module.groups, 0)]
    else:
        raise TypeError(type(module))
    if bias is None:
        return parts
    return [torch.cat([w, b[:, None]], 1) for w, b in zip(parts, bias.chunk(len(parts), 0), strict=True)]


def _source(position: int, size: int, mode: str) -> int | None:
    """Index of the entry that padding puts at ``position``; None for a zero."""
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return 0 if position < 0 else size - 1
    if mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    raise ValueError(mode)


def _conv_patches(module: Any, x: Tensor) -> list[Tensor]:
    """Input patches of a convolution, x (C, *size): one (T, C/groups * k) per group."""
    sizes, kernel = x.shape[1:], module.kernel_size
    reach = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)]
    if module.padding == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    elif module.padding == "valid":
        pads = [(0, 0) for _ in reach]
    else:
        pads = [(p, p) for p in module.padding]
    counts = [
        (s + lo + hi - r - 1) // st + 1 for s, (lo, hi), r, st in zip(sizes, pads, reach, module.stride, strict=True)
    ]
    per_group = x.shape[0] // module.groups
    groups = []
    for group in range(module.groups):
        rows = []
        for t in itertools.product(*map(range, counts)):
            row = []
            for channel in range(group * per_group, (group + 1) * per_group):
                for k in itertools.product(*map(range, kernel)):
                    at = [
                        _source(ti * st + ki * d - lo, s, module.padding_mode)
                        for ti, st, ki, d, (lo, _), s in zip(
                            t, module.stride, k, module.dilation, pads, sizes, strict=True
                        )
                    ]
                    row.append(x.new_zeros(()) if None in at else x[(channel, *at)])
            rows.append(torch.stack(row))
        groups.append(torch.stack(rows))
    return groups


def _transposed_patches(module: Any, x: Tensor, out_sizes: Sequence[int]) -> list[Tensor]:
    """Gather form of a transposed convolution: output position p sees input q when p = q stride + k dilation - pad."""
    sizes = x.shape[1:]
    per_group = x.shape[0] // module.groups
    groups = []
    for group in range(module.groups):
        rows = []
        for p in itertools.product(*map(range, out_sizes)):
            row = []
            for channel in range(group * per_group, (group + 1) * per_group):
                for k in itertools.product(*map(range, module.kernel_size)):
                    at: list[int] = []
                    for pi, ki, d, pad, st, s in zip(
                        p, k, module.dilation, module.padding, module.stride, sizes, strict=True
                    ):
                        q, rest = divmod(pi + pad - ki * d, st)
                        if rest == 0 and 0 <= q < s:
                            at.append(q)
                    row.append(x[(channel, *at)] if len(at) == len(sizes) else x.new_zeros(()))
            rows.append(torch.stack(row))
        groups.append(torch.stack(rows))
    return groups


def layer_inputs(module: nn.Module, x: Tensor, out: Tensor, bias: bool) -> list[Tensor]:
    """Inputs of one call for one example: (T, I) per group, a 1 appended for the bias."""
    if isinstance(module, nn.Linear):
        groups = [x.reshape(-1, x.shape[-1])]
    elif isinstance(module, nn.Embedding):
        rows = []
        for token in x.reshape(-1).tolist():
            row = torch.zeros(module.num_embeddings, dtype=out.dtype)
            if token != module.padding_idx:  # the padding row never receives a gradient
                row[token] = 1.0
            rows.append(row)
        groups = [torch.stack(rows)]
    elif isinstance(module, CONV):
        groups = _conv_patches(module, x[0])
    elif isinstance(module, TRANSPOSED):
        groups = _transposed_patches(module, x[0], out.shape[2:])
    else:
        raise TypeError(type(module))
    if bias:
        groups = [torch.cat([a, a.new_ones(a.shape[0], 1)], 1) for a in groups]
    return groups


def layer_outputs(module: nn.Module, out: Tensor, lead: int = 0) -> list[Tensor]:
    """Outputs (or gradients) of one call for one example: (*lead, T, O) per group; ``lead`` extra axes in front."""
    head = out.shape[:lead]
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return [out.reshape(*head, -1, out.shape[-1])]
    flat = out.reshape(*head, out.shape[lead + 1], -1)  # drops the batch axis of size 1
    return [part.transpose(-1, -2) for part in flat.chunk(module.groups, lead)]  # type: ignore[arg-type]


def kron_modules(model: nn.Module, names: Sequence[str]) -> dict[tuple[str, ...], list[nn.Module]]:
    """Modules with a Kronecker block, by the (weight, bias) names; tied modules share one entry."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[str, ...], list[nn.Module]] = {}
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding, *CONV, *TRANSPOSED)):
            continue
        own = [module._parameters.get(key) for key in ("weight", "bias")]
        if own[0] is None or by_id[id(own[0])] not in names:
            continue
        key = tuple(by_id[id(p)] for p in own if p is not None and by_id[id(p)] in names)
        found.setdefault(key, []).append(module)
    # An embedding tied to a Linear uses the weight in both orientations: no common factors.
    return {key: members for key, members in found.items() if len({type(m) for m in members}) == 1}


@torch.enable_grad()
def kron_blocks(
    model: nn.Module,
    x: Any,
    y: Tensor,
    curvature: OutputMatrix,
    names: Sequence[str] | None = None,
    seen: Passes | None = None,
) -> list[Block]:
    """Kronecker factors of every Linear, convolution and Embedding, the exact diagonal of everything else.

    A = mean_n Σ_t â âᵀ and G = mean_nt Σ_v g gᵀ, where t runs over the positions of all calls of the block
    (calls of a re-used module or of tied modules are further positions) that reach an output with curvature (a target
    that is not ignored), and Σ_v g gᵀ = (∂z/∂h_t)ᵀ H (∂z/∂h_t). An example without such an output is left out.
    """
    names = all_names(model) if names is None else list(names)
    index = flat_index(model, names)
    given = model
    model, _ = private(model, names)
    modules = kron_modules(model, names)
    parameters = dict(model.named_parameters())
    calls: list[tuple[tuple[str, ...], nn.Module, Tensor, Tensor]] = []

    def listen(key: tuple[str, ...]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:
                out.requires_grad_()
            calls.append((key, module, args[0].detach().clone(), out))
            return out.clone()  # whatever happens in place afterwards happens to the clone

        return hook

    for key, members in modules.items():
        for module in members:
            module.register_forward_hook(listen(key))

    n = count(y)
    # A unit that is off has no gradient although its position reaches the outputs. Positions are hidden by ignored
    # targets or by a mask among keyword inputs; no case with those has units that can be off.
    switched = not (isinstance(x, Mapping) or bool((y == IGNORE).any()))
    sums: dict[tuple[tuple[str, ...], int], list[Tensor]] = {}
    for i in range(n):
        calls.clear()
        z = call(model, take(x, slice(i, i + 1)))
        h = curvature(z.detach(), y[i : i + 1])
        heard = h.abs().sum(0) > 0
        if not bool(heard.any()):
            n -= 1
            continue
        jac = _rows(list(z.reshape(-1)), [out for *_, out in calls])
        inputs: dict[tuple[tuple[str, ...], int], list[Tensor]] = {}
        gradients: dict[tuple[tuple[str, ...], int], list[Tensor]] = {}
        start = 0
        for key, module, argument, out in calls:
            has_bias = len(key) == 2
            grad = jac[:, start : start + out.numel()].view(-1, *out.shape)
            start += out.numel()
            pairs = zip(
                layer_inputs(module, argument, out.detach(), has_bias), layer_outputs(module, grad, 1), strict=True
            )
            for group, (a, g) in enumerate(pairs):
                reaching = [t for t in range(a.shape[0]) if switched or bool(g[heard, t].any())]
                if isinstance(module, nn.Embedding):  # the padding row takes no gradient: its tokens are no positions
                    reaching = [t for t in reaching if bool(a[t].any())]
                for t in reaching:
                    inputs.setdefault((key, group), []).append(torch.outer(a[t], a[t]))
                    gradients.setdefault((key, group), []).append(g[:, t].T @ h @ g[:, t])
        for where in inputs:
            a_sum = torch.stack(inputs[where]).sum(0)
            g_sum, positions = torch.stack(gradients[where]).sum(0), torch.tensor(float(len(gradients[where])))
            new = [a_sum, g_sum, positions]
            sums[where] = [old + more for old, more in zip(sums[where], new, strict=True)] if where in sums else new

    blocks, covered = [], set()
    for key, members in modules.items():
        if (key, 0) not in sums:
            continue  # a weight that is used without calling its module: no factors, its exact diagonal below
        weight = index[key[0]]
        bias = index[key[1]] if len(key) == 2 else None
        for group, part in enumerate(canonical(members[0], weight, bias)):
            a_sum, g_sum, positions = sums[key, group]
            blocks.append(Block(key, part, A=a_sum / n, G=g_sum / positions, positions=float(positions)))
        covered.update(key)
    rest = [name for name in index if name not in covered and name in parameters]
    if rest:
        diagonal = diag_ggn(given, x, y, lambda z, t: z.sum(), names, curvature, seen)
        for name in rest:
            where = index[name].reshape(-1)
            blocks.append(Block((name,), where, values=diagonal[where]))
    return blocks


@torch.enable_grad()
def kfra_factors(model: nn.Sequential, x: Tensor, y: Tensor, curvature: OutputMatrix) -> list[Block]:
    """KFRA for a chain of Linear and elementwise layers: the *averaged* matrix is passed back (methods 4.2).

    Ĝ_L = mean_n H_n; through a Linear: W̄ᵀ Ĝ W̄; through an activation: mean_n B_n Ĝ B_n with B_n = diag φ'(h_n).
    """
    index = flat_index(model)
    model, _ = private(model, None)
    n = count(y)
    inputs: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_children()}
    slopes: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_children()}
    back = torch.zeros(())
    for i in range(n):
        value = x[i : i + 1]
        for name, layer in model.named_children():
            value = value.detach().clone().requires_grad_()
            inputs[name].append(value.detach().clone()[0])
            out = layer(value.clone())
            if not isinstance(layer, nn.Linear):
                (slope,) = torch.autograd.grad(out.sum(), value)
                slopes[name].append(slope[0])
            value = out
        back = back + curvature(value.detach(), y[i : i + 1]) / n
    blocks = []
    for name, layer in reversed(list(model.named_children())):
        if isinstance(layer, nn.Linear):
            bias = layer.bias is not None
            rows = [torch.cat([a, a.new_ones(1)]) if bias else a for a in inputs[name]]
            mean_a = torch.stack([torch.outer(a, a) for a in rows]).mean(0)
            keys = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)
            (part,) = canonical(layer, index[keys[0]], index[keys[1]] if bias else None)
            blocks.append(Block(keys, part, A=mean_a, G=back))
            weight = layer.weight.detach()
            back = weight.T @ back @ weight
        else:
            back = torch.stack([torch.diag(b) @ back @ torch.diag(b) for b in slopes[name]]).mean(0)
    return blocks


# ------------------------------------------------------------------------------------------------ Laplace


def balance(block: Block) -> float:
    """ω of methods 5.2, trace norm; 1 where a factor vanishes."""
    a, g = float(torch.trace(block.A)) / block.A.shape[0], float(torch.trace(block.G)) / block.G.shape[0]
    return math.sqrt(a / g) if a > 0 and g > 0 else 1.0


def kron_precision(blocks: Sequence[Block], n: float, prior: Tensor, damping: str = "exact") -> Tensor:
    """Λ of a Kronecker posterior: (P, P).

    ``exact``: N G⊗A + λI. ``factored`` (S3 eq. 5.14): (√N G + √λ I)⊗(√N A + √λ I). ``balanced``: the damping of A
    times ω, that of G divided by it. Blocks without factors always have N d + λ. ``prior`` is (P,).
    """

    def dense(block: Block) -> Tensor:
        lam = prior[block.index.reshape(-1)]
        if damping == "exact" or block.values is not None:
            return n * block.dense() + torch.diag(lam)
        assert bool((lam == lam[0]).all()), "factored damping knows one λ per block"
        omega = balance(block) if damping == "balanced" else 1.0
        root = math.sqrt(float(lam[0]))
        eye_g = torch.eye(block.G.shape[0], dtype=torch.float64)
        eye_a = torch.eye(block.A.shape[0], dtype=torch.float64)
        return torch.kron(math.sqrt(n) * block.G + root / omega * eye_g, math.sqrt(n) * block.A + root * omega * eye_a)

    return assemble(blocks, prior.numel(), dense)


def dense_precision(curvature: Tensor, n: float, prior: Tensor) -> Tensor:
    """N C̄ + diag(λ), for a full or a diagonal C̄ (P, P)."""
    return n * curvature + torch.diag(prior)


def log_evidence(precision: Tensor, prior: Tensor, theta: Tensor, log_lik: float) -> float:
    """log p(D|θ) + log N(θ; 0, diag(1/λ)) + P/2 log 2π - ½ log|Λ|; the powers of 2π cancel."""
    value = log_lik + 0.5 * torch.log(prior).sum() - 0.5 * (prior * theta**2).sum() - 0.5 * torch.logdet(precision)
    return float(value)


def penalty(precision: Tensor, theta: Tensor, mean: Tensor) -> Tensor:
    """½ (θ-μ)ᵀ Λ (θ-μ)."""
    delta = theta - mean
    return 0.5 * delta @ precision @ delta


@dataclass
class LinearRegression:
    """Exact posterior of y = X w + noise, w ~ N(0, I/λ), noise ~ N(0, σ²): one output."""

    mean: Tensor
    precision: Tensor
    log_evidence: float
    design: Tensor
    scale: float

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictive mean and epistemic variance at rows ``x`` (the 1 of the bias included)."""
        return x @ self.mean, (x @ torch.linalg.inv(self.precision) * x).sum(1)


def linear_regression(x: Tensor, y: Tensor, scale: float, prior: float) -> LinearRegression:
    """Closed form for design ``x (N, P)`` and targets ``y (N,)``; evidence from the marginal N(0, σ²I + XXᵀ/λ)."""
    precision = x.T @ x / scale**2 + prior * torch.eye(x.shape[1], dtype=x.dtype)
    mean = torch.linalg.solve(precision, x.T @ y / scale**2)
    marginal = scale**2 * torch.eye(x.shape[0], dtype=x.dtype) + x @ x.T / prior
    evidence = -0.5 * (
        x.shape[0] * math.log(2 * math.pi) + torch.logdet(marginal) + y @ torch.linalg.solve(marginal, y)
    )
    return LinearRegression(mean, precision, float(evidence), x, scale)
