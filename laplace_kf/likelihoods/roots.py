"""A root of the output curvature whose columns are made on demand.

A softmax over C classes has C−1 root columns with C entries for every position: written out, ``(C−1, N, T, C)``, they
are far larger than the outputs. Estimators need a few columns at a time, or only their norms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["DenseRoot", "DiagonalRoot", "Root", "ScaledRoot", "SoftmaxRoot"]


class Root(ABC):
    """Columns ``r_k`` with ``Σ_k r_k r_kᵀ`` the curvature of every position.

    Attributes:
        count: number of columns K of a position.
        shape: ``(N, T, C)``.
    """

    count: int
    shape: tuple[int, int, int]

    @abstractmethod
    def entries(self, kind: Tensor, example: Tensor, position: Tensor) -> Tensor:
        """Columns ``kind`` of positions ``(example, position)``: indices of one common shape S; ``(S, C)``."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Squared norms of all columns, ``(N, T, K)`` in float64."""

    def norms_through(self, gram: Tensor) -> Tensor:
        """``r_kᵀ M r_k`` of all columns for a symmetric ``M (C, C)``, ``(N, T, K)`` in float64.

        With ``M = W Wᵀ`` these are the squared norms ``‖Wᵀ r_k‖²`` after a last layer of weights ``W (C, I)``.
        """
        gram, (count, positions, _) = gram.double(), self.shape
        example = torch.arange(count, device=self.device)[:, None].expand(count, positions)
        position = torch.arange(positions, device=self.device).expand(count, positions)
        found = []
        for kind in range(self.count):
            column = self.entries(torch.full_like(example, kind), example, position).double()
            found.append(((column @ gram) * column).sum(-1))
        return torch.stack(found, -1) if found else gram.new_zeros(count, positions, 0)

    def places(self) -> Tensor:
        """The positions of every example that have curvature, ``(N, L)``; L of the example that has most of them.

        Where an example has fewer, positions without curvature follow.
        """
        if self.shape[1] == 1:
            return torch.zeros(self.shape[0], 1, dtype=torch.int64, device=self.device)
        live = (self.norms() > 0).any(-1)
        most = max(1, int(live.sum(1).max())) if live.numel() else 1
        return (~live).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]

    def columns(self, start: int, stop: int, places: Tensor | None = None) -> Tensor:
        """Columns of shape ``(V, N, T, C)``, V = stop − start of ``count · L``, that touch one position of an example.

        Two positions in one column would be correlated. With one position these are the columns of the root.

        Args:
            start, stop: which.
            places: of :meth:`places`, ``(N, L)``: column ``k · L + l`` is the k-th one at every example's l-th place.
                All positions by default.
        """
        count, positions, width = self.shape
        if positions == 1:
            return self.alone(start, min(stop, self.count))[:, :, None]
        if places is None:
            places = torch.arange(positions, device=self.device).expand(count, positions)
        index = torch.arange(start, min(stop, self.count * places.shape[1]), device=self.device)
        kind, position = index // places.shape[1], places.T[index % places.shape[1]]  # (V,), (V, N)
        example = torch.arange(count, device=self.device)
        found = self.entries(kind[:, None].expand_as(position), example.expand_as(position), position)  # (V, N, C)
        out = found.new_zeros(len(index), count, positions, width)
        out.scatter_(2, position[..., None, None].expand(-1, -1, 1, width), found[:, :, None])
        return out

    def alone(self, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of all examples, ``(V, N, C)``, where each has one position."""
        kind = torch.arange(start, stop, device=self.device)[:, None].expand(-1, self.shape[0])
        example = torch.arange(self.shape[0], device=self.device).expand_as(kind)
        return self.entries(kind, example, torch.zeros_like(kind))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the columns (of any shape) are made."""


class DenseRoot(Root):
    """A root that is written out, ``(K, N, T, C)``."""

    def __init__(self, root: Tensor) -> None:
        self.root = root
        self.count, self.shape = root.shape[0], (root.shape[1], root.shape[2], root.shape[3])

    @property
    def device(self) -> torch.device:
        return self.root.device

    def entries(self, kind: Tensor, example: Tensor, position: Tensor) -> Tensor:
        return self.root[kind, example, position]

    def alone(self, start: int, stop: int) -> Tensor:
        return self.root[start:stop, :, 0]

    def norms(self) -> Tensor:
        return self.root.double().square().sum(-1).permute(1, 2, 0)


class DiagonalRoot(Root):
    """The root ``diag(d)`` with ``d (N, T, C)``: column k is ``d_k e_k``."""

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self.count, self.shape = diagonal.shape[2], (diagonal.shape[0], diagonal.shape[1], diagonal.shape[2])

    @property
    def device(self) -> torch.device:
        return self.diagonal.device

    def entries(self, kind: Tensor, example: Tensor, position: Tensor) -> Tensor:
        value = self.diagonal[example, position, kind][..., None]
        column = value.new_zeros(*value.shape[:-1], self.count)
        return column.scatter_(-1, kind.expand(value.shape[:-1])[..., None], value)

    def alone(self, start: int, stop: int) -> Tensor:
        own = self.diagonal[:, 0, start:stop]  # (N, V)
        columns = own.new_zeros(stop - start, self.shape[0], self.count)
        columns.diagonal(start, 0, 2).copy_(own)
        return columns

    def norms(self) -> Tensor:
        return self.diagonal.double().square()

    def norms_through(self, gram: Tensor) -> Tensor:
        return self.diagonal.double().square() * gram.double().diagonal()


class SoftmaxRoot(Root):
    """Columns of the Cholesky factor of ``diag(p) - p pᵀ`` without the zero last one.

    Tanabe & Sagae (1992), "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
    matrix of the multinomial distribution": with the tails ``q_k = Σ_{i>k} p_i`` (``q_{-1} = 1``)
    ``L_kk = √(p_k q_k / q_{k-1})`` and ``L_jk = -(p_j / q_k) L_kk`` below, where 0/0 counts as 0.
    Only sums and products of non-negative numbers appear, so every entry keeps its relative accuracy.

    Args:
        p: probabilities ``(N, T, C)``.
        keep: ``(N, T, 1)``, False where a position contributes nothing; ``None`` keeps all.
    """

    def __init__(self, p: Tensor, keep: Tensor | None = None) -> None:
        self.p = p
        self.count, self.shape = p.shape[2] - 1, (p.shape[0], p.shape[1], p.shape[2])
        tails = torch.cumsum(p.flip(-1), -1).flip(-1)  # tails[k] = q_{k-1}
        self.tails = tails[..., 1:]
        before = torch.cat([torch.ones_like(p[..., :1]), self.tails[..., :-1]], -1)
        one = torch.ones((), dtype=p.dtype, device=p.device)
        diagonal = p[..., :-1].sqrt() * (self.tails / torch.where(before > 0, before, one)).sqrt()
        self.diagonal = diagonal if keep is None else torch.where(keep, diagonal, torch.zeros_like(one))
        self.weights = self.diagonal / torch.where(self.tails > 0, self.tails, one)

    @property
    def device(self) -> torch.device:
        return self.p.device

    def entries(self, kind: Tensor, example: Tensor, position: Tensor) -> Tensor:
        place = (example, position, kind)
        below = torch.arange(self.p.shape[-1], device=self.device) > kind[..., None]
        scaled = -(self.p[example, position] * self.weights[place][..., None])
        lower = torch.where(below, scaled, torch.zeros((), dtype=self.p.dtype, device=self.device))
        on = self.diagonal[place][..., None]
        return lower.scatter_(-1, kind.expand(on.shape[:-1])[..., None], on)

    def alone(self, start: int, stop: int) -> Tensor:
        columns = -(self.weights[:, 0, start:stop].T[:, :, None] * self.p[:, 0])  # (V, N, C)
        kind = torch.arange(start, stop, device=self.device)[:, None, None]
        columns.masked_fill_(torch.arange(self.p.shape[2], device=self.device) <= kind, 0.0)
        columns.diagonal(start, 0, 2).copy_(self.diagonal[:, 0, start:stop])
        return columns

    def norms(self) -> Tensor:
        p, tails = self.p.double(), self.tails.double()
        squares = torch.cumsum(p.square().flip(-1), -1).flip(-1)[..., 1:]  # Σ_{j>k} p_j²
        shares = squares / torch.where(tails > 0, tails, torch.ones_like(tails)).square()
        return self.diagonal.double().square() * (1 + torch.nan_to_num(shares, 0.0, 0.0, 0.0))

    def norms_through(self, gram: Tensor) -> Tensor:
        p, tails, gram = self.p.double(), self.tails.double(), gram.double()
        beyond = p @ gram.triu(1).T  # Σ_{j>k} M_kj p_j
        own = gram.diagonal()
        pairs = p.square() * own + 2 * p * beyond  # what k adds to Σ_{i,j≥k} p_i p_j M_ij
        both = torch.cumsum(pairs.flip(-1), -1).flip(-1)[..., 1:]
        inverse = torch.where(tails > 0, tails, torch.ones_like(tails)).reciprocal()
        found = own[:-1] - 2 * beyond[..., :-1] * inverse + both * inverse.square()
        return self.diagonal.double().square() * torch.nan_to_num(found, 0.0, 0.0, 0.0).clamp_min(0)


class ScaledRoot(Root):
    """Columns of another root times a number ``scale (N, T, 1)``, or ``(N, 1, 1)``, for every position."""

    def __init__(self, root: Root, scale: Tensor) -> None:
        self.root, self.count, self.shape = root, root.count, root.shape
        self.scale = scale[..., 0].expand(root.shape[:2])

    @property
    def device(self) -> torch.device:
        return self.root.device

    def entries(self, kind: Tensor, example: Tensor, position: Tensor) -> Tensor:
        return self.root.entries(kind, example, position) * self.scale[example, position][..., None]

    def alone(self, start: int, stop: int) -> Tensor:
        return self.root.alone(start, stop) * self.scale[:, 0, None]

    def norms(self) -> Tensor:
        return self.root.norms() * self.scale.double().square()[..., None]

    def norms_through(self, gram: Tensor) -> Tensor:
        return self.root.norms_through(gram) * self.scale.double().square()[..., None]
