"""Influence of training examples: ``g_q^T Λ⁻¹ g_i`` between gradients of queries and of training examples.

To first order, taking example ``i`` out of the data of a posterior ``N(θ*, Λ⁻¹)`` moves its mean by ``Λ⁻¹ g_i``, with
``g_i`` the gradient of the example's negative log-likelihood; a value ``v`` of a query then changes by
``∇v^T Λ⁻¹ g_i`` (influence functions: Koh and Liang 2017, section 2; with Kronecker factors: Grosse et al. 2023).
Nothing of size examples x parameters is built: queries are solved once, and training examples stay signals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from laplace_kf.attribution.gradients import Gradients, at_mean, batches_of
from laplace_kf.attribution.pairs import Queries
from laplace_kf.attribution.values import Value
from laplace_kf.errors import IncompatiblePair, InvalidArgument, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.linalg import typed
from laplace_kf.models import lasting
from laplace_kf.operators import Blockwise
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import PriorPrecision, checked_prior
from laplace_kf.predictive.covariance_shares import Piece, like_of, shares_of
from laplace_kf.registry import Registry

__all__ = ["TOKENS", "group_influence", "influence", "self_influence"]

QUERY_BYTES = 512 * 2**20  # solved queries that are kept at a time; more take another pass over the training data

TOKENS: Registry[tuple[bool, bool]] = Registry("side of tokens=")  # (of the queries, of the training examples)
TOKENS.register("queries")((True, False))
TOKENS.register("train")((False, True))


@typed
@explained
def influence(
    posterior: LaplacePosterior,
    train: Any,
    queries: Any,
    of: str | Value = "loss",
    *,
    damping: PriorPrecision | None = None,
    tokens: str | None = None,
    accuracy: float | None = None,
) -> Tensor:
    """Influence of every training example on every query.

    Args:
        posterior: fitted; its precision is the curvature, at its ``n_data`` and ``prior_precision``.
        train: N training examples as ``fit`` takes them, in order (a loader that shuffles is refused).
        queries: Q examples with targets, in the same form.
        of: ``"loss"``: ``g_q^T Λ⁻¹ g_i``, positive = helpful: leaving the example out raises the loss of the query.
            ``"margin"`` (``log p/(1-p)`` of the query's label) or a function ``outputs (Q, ...), targets -> (Q,)``:
            ``-∇v_q^T Λ⁻¹ g_i``, positive = the example raises the value.
        damping: λ in place of the posterior's ``prior_precision``.
        tokens: for outputs with positions: ``"queries"`` splits every query's value over its T positions, ``"train"``
            every training example's loss; the positions add up to the whole. Needs a value that is a sum over
            positions.
        accuracy: relative error (root mean square) that Kronecker blocks may make for speed, such as ``1e-2``;
            ``None``: none beyond rounding.

    Returns:
        ``(Q, N)``; with ``tokens="queries"`` ``(Q, T, N)``, with ``"train"`` ``(Q, N, T)`` (0 behind shorter ones).

    Raises:
        NotFitted: before ``fit``.
        UnknownName: for another value or side.
        IncompatiblePair: for a loader that shuffles, a value that the likelihood does not have, or data that can be
            gone through only once where the queries need several passes.
        ShapeMismatch: for empty data, or a function that gives something else than one number a query.
        NonFinite: for NaN or infinity.
        ValueError: for an ``accuracy`` that is not between 0 and 1.
    """
    by_query, by_train = (False, False) if tokens is None else TOKENS[tokens]
    rows: list[Tensor] = []
    with _ready(posterior, damping) as (gradients, precision):
        for many in _chunks(gradients, precision, batches_of(queries, posterior, "query"), of, by_query, accuracy):
            data = _once_more(batches_of(train, posterior, "training"), len(rows))
            parts = [
                [_arranged(q.scores(piece), q_shape, piece) for q, q_shape in many]
                for piece in gradients.pieces(data, "loss", by_train, None, "the training batch")
            ]
            for k in range(len(many)):
                rows.append(_joined([part[k] for part in parts], 2))  # (T, q, N, T')
    found = _joined(rows, 1)
    if tokens is None:
        return found[0, :, :, 0]
    return found[..., 0].transpose(0, 1).contiguous() if by_query else found[0]


@typed
def group_influence(
    posterior: LaplacePosterior,
    train: Any,
    queries: Any,
    groups: Tensor | Sequence[int],
    of: str | Value = "loss",
    *,
    damping: PriorPrecision | None = None,
    accuracy: float | None = None,
) -> Tensor:
    """Influence of groups of training examples, to first order the sums of their members' (:func:`influence`).

    Args:
        posterior, train, queries, of, damping, accuracy: as of :func:`influence`; N training examples, Q queries.
        groups: the group ``(N,)`` of every training example, 0 ... G-1; negative for none.

    Returns:
        ``(Q, G)``; no ``(Q, N)`` is kept.

    Raises:
        ShapeMismatch: if there is not one group for every example; otherwise as :func:`influence`.
    """
    of_example = torch.as_tensor(groups)
    if of_example.dim() != 1 or of_example.is_floating_point() or of_example.dtype == torch.bool:
        raise ShapeMismatch(
            f"groups must be integers (N,), one for every training example, got {tuple(of_example.shape)} of "
            f"{of_example.dtype}"
        )
    count = int(of_example.max()) + 1 if len(of_example) else 0
    if count < 1:
        raise ShapeMismatch("not one training example belongs to a group: all groups are negative")
    rows: list[Tensor] = []
    with _ready(posterior, damping) as (gradients, precision):
        for many in _chunks(gradients, precision, batches_of(queries, posterior, "query"), of, False, accuracy):
            data = _once_more(batches_of(train, posterior, "training"), len(rows))
            totals = [q.like.new_zeros(q.rows, count + 1) for q, _ in many]
            start = 0
            for piece in gradients.pieces(data, "loss", False, None, "the training batch"):
                mine = of_example[start : start + piece.count]
                start += piece.count
                if len(mine) < piece.count:
                    raise ShapeMismatch(
                        f"there are {len(of_example)} groups, but more training examples than that; give one group "
                        "number for each"
                    )
                place = torch.where(mine < 0, count, mine).long()
                for (q, _), total in zip(many, totals, strict=True):
                    total.index_add_(1, place.to(total.device), q.scores(piece))
            if start != len(of_example):
                raise ShapeMismatch(
                    f"there are {len(of_example)} groups for {start} training examples; give one group number for each"
                )
            rows += [total[:, :count] for total in totals]
    return torch.cat(rows)


@typed
@explained
def self_influence(posterior: LaplacePosterior, train: Any, *, damping: PriorPrecision | None = None) -> Tensor:
    """``g_i^T Λ⁻¹ g_i`` of every training example, the diagonal of :func:`influence` on the loss: ``(N,)``, ≥ 0.

    How much an example's own loss rises without it: large for what was learnt from no other example.

    Args:
        posterior, train, damping: as of :func:`influence`.

    Raises:
        as :func:`influence`.
    """
    parts = []
    with _ready(posterior, damping) as (gradients, precision):
        shares = shares_of([precision])
        data = batches_of(train, posterior, "training")
        for piece in gradients.pieces(data, "loss", False, None, "the training batch"):
            total = like_of(precision).new_zeros(piece.count)
            for share in shares:
                found = share.covariance(piece, 1)
                if found is not None:
                    total += found[0, 0, :, 0, 0]
            parts.append(total.clamp_min(0))
    return torch.cat(parts)


@contextmanager
def _ready(posterior: LaplacePosterior, damping: PriorPrecision | None) -> Iterator[tuple[Gradients, Blockwise]]:
    """Gradients at the mean, and the precision at the damping asked for; nothing has a graph inside."""
    with lasting(), torch.no_grad():
        own = posterior.precision
        precision = own if damping is None else posterior.precision_at(posterior.n_data, checked_prior(damping))
        with at_mean(posterior) as gradients:
            yield gradients, precision


Shape = tuple[int, int]


def _chunks(
    gradients: Gradients,
    precision: Blockwise,
    batches: Any,
    of: str | Value,
    tokens: bool,
    accuracy: float | None,
) -> Iterator[list[tuple[Queries, Shape]]]:
    """Solved queries with their columns and examples, as many at a time as fit."""
    if accuracy is not None and not 0 < accuracy < 1:
        raise InvalidArgument(f"accuracy is a relative error between 0 and 1, such as 1e-2, got {accuracy}")
    each = precision.size * like_of(precision).element_size()
    room = max(1, QUERY_BYTES // each)
    kept: list[tuple[Queries, Shape]] = []
    used = 0
    for piece in gradients.pieces(batches, of, tokens, room, "the query batch"):
        rows = piece.width * piece.count
        if kept and used + rows > room:
            yield kept
            kept, used = [], 0
        kept.append((Queries(piece, precision, accuracy), (piece.width, piece.count)))
        used += rows
    if kept:
        yield kept


def _once_more(data: Any, before: int) -> Any:
    if isinstance(data, Iterator) and before:
        raise IncompatiblePair(
            "so many queries take several passes over the training data, which can be gone through only once; give a "
            "loader, a list of batches or a pair of tensors, or fewer queries"
        )
    return data


def _arranged(scores: Tensor, shape: Shape, piece: Piece) -> Tensor:
    """``(V·q, V'·n)`` as ``(V, q, n, V')``."""
    return scores.reshape(*shape, piece.width, piece.count).transpose(2, 3)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Parts ``(T, q, n, T')`` side by side along an axis, shorter sequences filled up with 0."""
    first, last = max(p.shape[0] for p in parts), max(p.shape[3] for p in parts)
    sizes = [(0, last - p.shape[3], 0, 0, 0, 0, 0, first - p.shape[0]) for p in parts]
    padded = [torch.nn.functional.pad(p, size) if any(size) else p for p, size in zip(parts, sizes, strict=True)]
    return torch.cat(padded, axis) if len(padded) > 1 else padded[0]
