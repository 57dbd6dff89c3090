"""What the same fits and steps cost when they are written for one network: the bound that the package is held to.

Chains of dense layers are sent back by hand, other networks by autograd with respect to the outputs of their layers;
factors are half Grams, squares are summed before they are multiplied. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import Problem

__all__ = ["ekfac", "fit", "kfac", "kfra", "last_layer"]

LEAF = 256


def _gram(total: Tensor, rows: Tensor) -> None:
    """Adds the lower triangle of ``rowsᵀ rows`` to ``total (d, d)``, by halves."""
    width = rows.shape[1]
    if width <= LEAF:
        total.addmm_(rows.T, rows)
        return
    half = width // 2
    _gram(total[:half, :half], rows[:, :half])
    _gram(total[half:, half:], rows[:, half:])
    total[half:, :half].addmm_(rows[:, half:].T, rows[:, :half])


def _columns(outputs: Tensor, likelihood: str, sampled: bool) -> Tensor:
    """Columns ``(V, N, C)`` of a root of the output curvature."""
    if likelihood == "gaussian":
        count, width = outputs.shape
        return torch.randn(1, count, width) if sampled else torch.eye(width)[:, None].expand(width, count, width)
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return (p - p.bernoulli())[None] if sampled else torch.diag_embed((p * (1 - p)).sqrt()).transpose(0, 1)
    p = outputs.softmax(-1)
    if sampled:
        return (p - F.one_hot(p.multinomial(1)[:, 0], p.shape[1]))[None]
    q = p.flip(1).cumsum(1).flip(1)
    after = torch.cat([q[:, 1:], torch.zeros(len(q), 1)], 1)
    diagonal = (p * after / q).clamp_min(0).sqrt()
    lower = torch.tril(-p[:, :, None] * (diagonal / after.clamp_min(1e-30))[:, None], -1) + torch.diag_embed(diagonal)
    return lower[:, :, :-1].permute(2, 0, 1)


class _Sums:
    def __init__(self, model: nn.Module, diagonal: bool) -> None:
        self.diagonal = diagonal
        self.of: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                out, inp = module.weight.shape[0], module.weight[0].numel()
                sizes = ((out, inp), (out,)) if diagonal else ((inp, inp), (out, out))
                self.of[module] = torch.zeros(sizes[0]), torch.zeros(sizes[1])

    def inputs(self, module: nn.Module, a: Tensor) -> Tensor:
        """Inputs as rows ``(N, T, I)``, their Gram taken."""
        if isinstance(module, nn.Conv2d):
            padding: Any = module.padding
            unfolded = F.unfold(a, module.kernel_size, module.dilation, padding, module.stride)
            a = unfolded.transpose(1, 2)
        if not self.diagonal:
            _gram(self.of[module][0], a.reshape(-1, a.shape[-1]))
        return a

    def columns(self, module: nn.Module, g: Tensor, a: Tensor) -> None:
        """One column ``(N, ..., O)`` or ``(N, O, h, w)``; for a dense layer without positions several."""
        first, second = self.of[module]
        if isinstance(module, nn.Conv2d):
            g = g.flatten(2).transpose(1, 2)
        if not self.diagonal:
            _gram(second, g.reshape(-1, g.shape[-1]))
        elif a.dim() == 2:
            squares = g.square().sum(0)
            first.addmm_(squares.T, a.square())
            second += squares.sum(0)
        else:
            first += torch.bmm(g.transpose(1, 2), a).square_().sum(0)
            second += g.sum(1).square_().sum(0)


Visit = Callable[[nn.Module, Tensor, Tensor], None]


def _chain(model: nn.Sequential, x: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
    """The output, and of every layer what its backward pass needs: a linear map's input, an activation's slope."""
    kept: list[tuple[nn.Module, Tensor]] = []
    for module in model:
        y: Tensor = module(x)
        linear = isinstance(module, nn.Linear)
        kept.append((module, x if linear else 1 - y * y if isinstance(module, nn.Tanh) else (y > 0).to(y.dtype)))
        x = y
    return x, kept


def _back(kept: list[tuple[nn.Module, Tensor]], g: Tensor, visit: Visit) -> None:
    for place in reversed(range(len(kept))):
        module, known = kept[place]
        if isinstance(module, nn.Linear):
            visit(module, known, g)
            if place:
                g = g @ module.weight
        else:
            g = g * known


def _by_autograd(problem: Problem, sums: _Sums, sampled: bool) -> None:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def listen(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append((module, sums.inputs(module, args[0].detach()), output))

    weights = [p for p in problem.model.parameters() if p.requires_grad]
    handles = [module.register_forward_hook(listen) for module in sums.of]
    try:
        for p in weights:
            p.requires_grad_(False)
        for x, _ in problem.batches:
            seen.clear()
            with torch.enable_grad():
                outputs = problem.model(x.detach().requires_grad_())
            columns = _columns(outputs.detach(), problem.likelihood, sampled)
            for k, column in enumerate(columns):
                more = k < len(columns) - 1
                grads = torch.autograd.grad(outputs, [y for _, _, y in seen], column, retain_graph=more)
                for (module, a, _), g in zip(seen, grads, strict=True):
                    sums.columns(module, g[None] if sums.diagonal and a.dim() == 2 else g, a)
    finally:
        for handle in handles:
            handle.remove()
        for p in weights:
            p.requires_grad_(True)


@torch.no_grad()
def fit(problem: Problem, structure: str, sampled: bool) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Factors (``"kron"``) or the diagonal (``"diag"``) over all minibatches, by the exact columns or one draw.

    Returns:
        By layer the lower triangles ``(I, I)`` and ``(O, O)``, or the diagonals ``(O, I)`` and ``(O,)``.
    """
    sums = _Sums(problem.model, structure == "diag")
    dense = isinstance(problem.model, nn.Sequential) and not any(isinstance(m, nn.Conv2d) for m in problem.model)
    if not dense:
        _by_autograd(problem, sums, sampled)
        return sums.of
    assert isinstance(problem.model, nn.Sequential)
    for x, _ in problem.batches:
        outputs, kept = _chain(problem.model, x)
        for module, a in kept:
            if module in sums.of:
                sums.inputs(module, a)
        _back(kept, _columns(outputs, problem.likelihood, sampled), lambda m, a, g: sums.columns(m, g, a))
    return sums.of


def _whole(lower: Tensor) -> Tensor:
    return torch.tril(lower) + torch.tril(lower, -1).T


def _with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, a.new_ones(len(a), 1)], 1)


@torch.no_grad()
def ekfac(problem: Problem) -> dict[nn.Module, Tensor]:
    """Squares along the Kronecker eigenbases, exact columns, of a chain of dense layers: two passes.

    Returns:
        By layer the sums ``(O, I + 1)``.
    """
    model = problem.model
    assert isinstance(model, nn.Sequential)
    dense = [module for module in model if isinstance(module, nn.Linear)]
    factors: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for m in dense:
        factors[m] = torch.zeros(m.in_features + 1, m.in_features + 1), torch.zeros(m.out_features, m.out_features)
    for x, _ in problem.batches:
        outputs, kept = _chain(model, x)

        def grams(m: nn.Module, a: Tensor, g: Tensor) -> None:
            _gram(factors[m][0], _with_ones(a))
            _gram(factors[m][1], g.flatten(0, 1))

        _back(kept, _columns(outputs, problem.likelihood, False), grams)
    bases = {m: [torch.linalg.eigh(_whole(factor))[1] for factor in pair] for m, pair in factors.items()}
    found = {m: torch.zeros(len(g), len(a)) for m, (a, g) in bases.items()}
    for x, _ in problem.batches:
        outputs, kept = _chain(model, x)

        def squares(m: nn.Module, a: Tensor, g: Tensor) -> None:
            turned = (g @ bases[m][1]).square_().sum(0)
            found[m].addmm_(turned.T, (_with_ones(a) @ bases[m][0]).square_())

        _back(kept, _columns(outputs, problem.likelihood, False), squares)
    return found


@torch.no_grad()
def last_layer(problem: Problem) -> Tensor:
    """The whole matrix ``(C (I + 1), C (I + 1))`` of the last dense layer, its lower blocks, by pairs of classes."""
    model = problem.model
    assert isinstance(model, nn.Sequential)
    last = model[-1]
    assert isinstance(last, nn.Linear) and problem.likelihood == "categorical"
    classes, size = last.out_features, last.in_features + 1
    total = torch.zeros(classes * size, classes * size)
    for x, _ in problem.batches:
        a = model[:-1](x)
        p, rows = last(a).softmax(-1), _with_ones(a)
        for c in range(classes):
            for k in range(c + 1):
                weights = p[:, c] * ((1.0 if c == k else 0.0) - p[:, k])
                block = total[c * size : (c + 1) * size, k * size : (k + 1) * size]
                block.addmm_((rows * weights[:, None]).T, rows)
    return total


@torch.no_grad()
def kfra(problem: Problem) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Inputs' factors and the recursive output factors of a chain with Bernoulli outputs, summed over examples.

    Returns:
        By layer ``(I, I)``, its lower triangle, and ``(O, O)``.
    """
    model = problem.model
    assert isinstance(model, nn.Sequential) and problem.likelihood == "bernoulli"
    sums = _Sums(model, False)
    for x, _ in problem.batches:
        outputs, kept = _chain(model, x)
        p = outputs.sigmoid()
        g = torch.diag((p * (1 - p)).mean(0))
        for place in reversed(range(len(kept))):
            module, known = kept[place]
            if isinstance(module, nn.Linear):
                sums.inputs(module, known)
                sums.of[module][1].add_(g, alpha=len(x))
                g = module.weight.T @ g @ module.weight if place else g
            else:
                g = g * (known.T @ known).div_(len(x))
    return sums.of


def kfac(problem: Problem, refresh: int) -> Iterator[None]:
    """K-FAC steps without momentum, step length or checks, one for each ``next``; inverses every ``refresh`` steps."""
    model, likelihood = problem.model, problem.likelihood
    assert isinstance(model, nn.Sequential)
    state: dict[nn.Module, list[Tensor]] = {
        m: [torch.eye(m.in_features + 1), torch.eye(m.out_features)] for m in model if isinstance(m, nn.Linear)
    }
    inverses: dict[nn.Module, list[Tensor]] = {}
    number = 0
    while True:
        x, y = problem.batches[number % len(problem.batches)]
        due = number % refresh == 0
        grads: dict[nn.Module, Tensor] = {}
        with torch.no_grad():
            outputs, kept = _chain(model, x)
            p = outputs.softmax(-1) if likelihood == "categorical" else outputs.sigmoid()
            target = F.one_hot(y, p.shape[1]).to(p) if likelihood == "categorical" else y
            columns = (p - target)[None]
            columns = torch.cat([columns, _columns(outputs, likelihood, True)]) if due else columns
            _back(kept, columns, _taker(state, grads, due))
            for module, gradient in grads.items():
                if due:
                    inverses[module] = [_inverse(factor) for factor in state[module]]
                a, g = inverses[module]
                step = g @ gradient @ a
                assert isinstance(module, nn.Linear)
                module.weight.sub_(step[:, :-1], alpha=1e-4)
                module.bias.sub_(step[:, -1], alpha=1e-4)
        number += 1
        yield


def _taker(state: dict[nn.Module, list[Tensor]], grads: dict[nn.Module, Tensor], due: bool) -> Visit:
    def visit(module: nn.Module, a: Tensor, g: Tensor) -> None:
        ones = torch.cat([a, a.new_ones(len(a), 1)], 1)
        grads[module] = g[0].T @ ones / len(a)
        if due:
            for factor, rows in zip(state[module], (ones, g[1]), strict=True):
                factor.mul_(0.95)
                _gram(factor, rows * (0.05 / len(a)) ** 0.5)

    return visit


def _inverse(factor: Tensor) -> Tensor:
    whole = torch.tril(factor) + torch.tril(factor, -1).T
    whole.diagonal().add_(0.1)
    return torch.cholesky_inverse(torch.linalg.cholesky(whole))
