"""What it costs the posterior to do without a weight, or a group of weights, given what is held at zero already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair
from laplace_kf.linalg import cholesky
from laplace_kf.operators import DenseBlock, LowRank, Matrix, Spectral, by_rows, free_block, row_block
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.registry import Registry
from laplace_kf.tape import Block
from laplace_kf.tape.blocks import merged

__all__ = ["SCORES", "Groups", "Held"]

SMALL = 1024  # free entries up to which a block's conditional variances come from a dense inverse
JOINT = 4096  # weights of a group up to which its joint saliency is made

Groups = Mapping[str, Tensor]
Held = dict[str, Tensor]


class _ByPosterior:
    """Saliencies given what is held."""

    def __call__(self, posterior: LaplacePosterior, held: Held) -> dict[str, Tensor]:
        parts = []
        for block, matrix, free, weights in _blocks(posterior, held):
            mean, variance = _conditional(matrix, free, weights)
            score = torch.where(variance > 0, mean.square() / (2 * variance), torch.zeros_like(mean))
            parts.append(block.unpack(score.reshape(1, *block.shape)))
        return {name: part[0] for name, part in merged(parts).items()}

    def groups(self, posterior: LaplacePosterior, held: Held, groups: Groups, ids: Tensor) -> Tensor:
        """Joint saliencies ``(G,)``; those of several blocks are added."""
        total = torch.zeros(len(ids), dtype=torch.float64)
        for block, matrix, free, weights in _blocks(posterior, held):
            whole = {
                name: groups[name][None] if name in groups else torch.full((1, *shape), -1)
                for name, shape in zip(block.parameters, block.shapes, strict=True)
            }
            if all(int(part.max()) < 0 for part in whole.values()):
                continue
            numbers = block.pack(whole).reshape(-1)
            part, mean, place = _remaining(matrix, free, weights)
            left = numbers[place.cpu()]
            for number in left[left >= 0].unique().tolist():
                index = (left == number).nonzero()[:, 0].to(mean.device)
                some = mean[index]
                if len(index) > JOINT:
                    raise IncompatiblePair(
                        f"group {number} has {len(index)} weights in block {block.name!r}; joint saliencies go up to "
                        f"{JOINT}: give smaller groups"
                    )
                covariance = _joint(part, index)
                energy = some @ torch.cholesky_solve(some[:, None], cholesky(covariance, block.name))[:, 0]
                total[int(torch.searchsorted(ids, number))] += float(energy) / 2
        return total


class _ByMagnitude:
    """``|w|`` of the trained network, and its squared norm for groups."""

    def __call__(self, posterior: LaplacePosterior, held: Held) -> dict[str, Tensor]:
        return {name: value.abs() for name, value in posterior.mean.items()}

    def groups(self, posterior: LaplacePosterior, held: Held, groups: Groups, ids: Tensor) -> Tensor:
        """Squared norms ``(G,)``."""
        total = torch.zeros(len(ids), dtype=torch.float64)
        mean = posterior.mean
        for name, numbers in groups.items():
            on = numbers >= 0
            total.index_add_(0, torch.searchsorted(ids, numbers[on]), mean[name].cpu().double().square()[on])
        return total


SCORES: Registry[Any] = Registry("score")
SCORES.register("posterior")(_ByPosterior())
SCORES.register("magnitude")(_ByMagnitude())


def _blocks(posterior: LaplacePosterior, held: Held) -> list[tuple[Block, Matrix, Tensor, Tensor]]:
    """Every block with its precision, which of its entries are free, and its mean, both ``(R, O, I)``."""
    precision = posterior.precision
    mean = precision.layout.split(posterior.gaussian.mean[None])
    found = []
    for block, matrix in precision.entries:
        known = {
            name: held[name][None] if name in held else torch.zeros(1, *shape, dtype=torch.bool)
            for name, shape in zip(block.parameters, block.shapes, strict=True)
        }
        like = matrix.diag()
        free = ~_packed(posterior, block, known)
        found.append((block, matrix, free.to(like.device), _packed(posterior, block, mean).to(like)))
    return found


def _packed(posterior: LaplacePosterior, block: Block, parts: dict[str, Tensor]) -> Tensor:
    return block.pack({name: parts[name] for name in block.parameters})[0]


def _conditional(matrix: Matrix, free: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variances ``(R, O, I)`` of a block whose held entries are zero; 0 where held."""
    index = free.reshape(-1).nonzero()[:, 0]
    if not len(index):
        return torch.zeros_like(weights), torch.zeros_like(weights)
    if isinstance(matrix, Spectral) and min(matrix.shape[1:]) > 1 and SMALL < len(index) < free.numel():
        turned, mask = by_rows(matrix, free)
        if turned is matrix:
            return _given_other_rows(matrix, free, weights)
        mean, variances = _given_other_rows(turned, mask, weights.mT)
        return mean.mT, variances.mT
    part, mean, place = _remaining(matrix, free, weights)
    out, variances = torch.zeros_like(weights).reshape(-1), torch.zeros_like(weights).reshape(-1)
    out[place], variances[place] = mean, _variances(part)
    return out.reshape(free.shape), variances.reshape(free.shape)


def _remaining(matrix: Matrix, free: Tensor, weights: Tensor) -> tuple[Matrix, Tensor, Tensor]:
    """The precision of the free entries where there is one in closed form, their mean, and where they stand ``(F,)``.

    Where there is none the matrix is that of the whole block; then the mean is ``(P_b,)`` too.
    """
    flat = weights.reshape(-1)
    index = free.reshape(-1).nonzero()[:, 0]
    if len(index) == len(flat):
        return matrix, flat, index
    own = free_block(matrix, free)
    change = torch.where(free.reshape(-1), torch.zeros_like(flat), -flat)
    mean = flat + change - own.solve(matrix.matvec(change)[:, None])[:, 0]
    part = own.remaining()
    if part is not None:
        return part, mean[index], index
    return matrix, mean, torch.arange(len(flat), device=flat.device)


def _given_other_rows(matrix: Spectral, free: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean, variances = torch.zeros_like(weights), torch.zeros_like(weights)
    for group, mask in enumerate(free):
        for row, kept in enumerate(mask):
            if not bool(kept.any()):
                continue
            factor = cholesky(row_block(matrix, group, row, kept), matrix.label)
            own = weights[group, row]
            between = row_block(matrix, group, row, kept, own.masked_fill(kept, 0))
            mean[group, row, kept] = own[kept] + torch.cholesky_solve(between[:, None], factor)[:, 0]
            variances[group, row, kept] = torch.cholesky_inverse(factor).diagonal()
    return mean, variances


def _variances(matrix: Matrix) -> Tensor:
    """The diagonal of the inverse, ``(P_b,)``."""
    if isinstance(matrix, Spectral):
        matrix.require_positive()
        inverse = 1 / matrix.grid
        if matrix.outputs.dual is not None:
            inverse = torch.matmul(matrix.outputs.dual.square(), inverse)
        if matrix.inputs.dual is not None:
            inverse = torch.matmul(inverse, matrix.inputs.dual.square().mT)
        return inverse.reshape(-1)
    if isinstance(matrix, LowRank):
        return matrix.variances()
    if matrix.size <= SMALL or isinstance(matrix, DenseBlock):
        return torch.cholesky_inverse(cholesky(matrix.dense(), matrix.label)).diagonal()
    return 1 / matrix.diag()  # given all others: a lower bound


def _joint(matrix: Matrix, index: Tensor) -> Tensor:
    """The covariance of some entries, ``(k, k)``."""
    if isinstance(matrix, Spectral):
        _, out, inp = matrix.shape
        row, column = index // inp, index % inp
        if bool((row == row[0]).all()):
            group, o = divmod(int(row[0]), out)
            inverse = 1 / matrix.grid[group]
            values = inverse[o] if matrix.outputs.dual is None else matrix.outputs.dual[group, o].square() @ inverse
            if matrix.inputs.dual is None:
                return torch.diag(values[column])
            basis = matrix.inputs.dual[group][column]
            return (basis * values) @ basis.T
    like, parts = matrix.diag(), []
    for some in index.split(256):
        columns = like.new_zeros(matrix.size, len(some))
        columns[some, torch.arange(len(some), device=some.device)] = 1
        parts.append(matrix.solve(columns)[index])
    found = torch.cat(parts, 1)
    return (found + found.T) / 2
