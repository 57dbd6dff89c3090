"""Calls as the functions that they are, tables looked up by tokens above all: autograd is not always told that.

``F.embedding(scale_grad_by_freq=True)`` divides gradients by token counts, ``max_norm=`` rewrites rows of the weight in
the forward pass without telling autograd, ``sparse=True`` gives gradients that cannot be differentiated again, and
``F.embedding_bag`` has neither a second derivative nor a batching rule. :func:`plain` is the same function of weight
and tokens made of ordinary operations, so that derivatives are those of the function, and nothing is written anywhere.
``Tensor.register_hook`` makes something else of a gradient: it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from laplace_kf.replica import original

__all__ = ["NoHook", "Plainly", "as_functions", "leaves_hooks_out", "lookup", "note_plain", "padding_rows", "plain"]

TINY = 1e-7  # what torch adds to the norm of a row before it divides by it
_PLAINLY: WeakSet[nn.Module] = WeakSet()  # models met with such a call that none of their modules tells of
_HOOKED: WeakSet[nn.Module] = WeakSet()  # those whose forward pass puts hooks on tensors
_WATCHED: WeakSet[nn.Module] = WeakSet()  # models whose first pass was watched for one


def lookup(tokens: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of ``weight (V, D)`` at ``tokens (...)``, as ``(..., D)``; zeros where a token is negative (none).

    Args:
        tokens: whole numbers; the padding token stands as −1.
        weight: the table.
        padding_idx: the row that is a constant, if there is one; only noted.
    """
    if has_torch_function_variadic(tokens, weight):
        found: Tensor = handle_torch_function(lookup, (tokens, weight), tokens, weight, padding_idx=padding_idx)
        return found
    rows = F.embedding(tokens.clamp_min(0), weight)
    return rows.masked_fill((tokens < 0)[..., None], 0.0)


def plain(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What a call is as a function of its tensors, of any shape, to be called in its place, or ``None``."""
    if func is F.embedding:
        return _plain_embedding(_EMBEDDING, args, kwargs)
    if func is F.embedding_bag:
        return _plain_bag(_BAG, args, kwargs)
    return NoHook if func is Tensor.register_hook else None


class NoHook:
    """The handle of a hook on a tensor (of any shape) that was left out."""

    def remove(self) -> None:
        """Nothing is there."""

    def __enter__(self) -> NoHook:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_BAG = (
    "input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
    "per_sample_weights", "include_last_offset", "padding_idx",
)  # fmt: skip


def _plain_embedding(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Callable[[], Tensor] | None:
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    limit = call.get("max_norm")
    if limit is None and not call.get("scale_grad_by_freq") and not call.get("sparse"):
        return None

    def run() -> Tensor:
        rows = F.embedding(call["input"], call["weight"], call.get("padding_idx"))
        return rows if limit is None else _within(rows, limit, call.get("norm_type", 2.0))

    return run


def _within(rows: Tensor, limit: float, kind: float) -> Tensor:
    """Rows ``(..., D)`` scaled down to a norm of ``limit`` where theirs is larger, as ``max_norm=`` does."""
    norms = torch.linalg.vector_norm(rows, kind, -1, keepdim=True)
    return torch.where(norms > limit, rows * (limit / (norms + TINY)), rows)


def _plain_bag(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Tensor] | None:
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    mode, offsets, each = call.get("mode", "mean"), call.get("offsets"), call.get("per_sample_weights")
    tokens = call["input"]
    fits = tokens.dim() == (1 if offsets is not None else 2) and mode in ("sum", "mean", "max")
    if not fits or (each is not None and mode != "sum"):
        return None  # torch refuses these itself

    def run() -> Tensor:
        found, shares, weight, padding = tokens, each, call["weight"], call.get("padding_idx")
        if offsets is not None:
            place, inside = _bags(offsets, len(tokens), bool(call.get("include_last_offset")))
            padded = tokens if len(tokens) else tokens.new_zeros(1)
            found = torch.where(inside, padded[place], -1)
            shares = None if each is None else (each if len(tokens) else each.new_zeros(1))[place]
        if padding is not None:
            padding = padding % weight.shape[0]
            found = torch.where(found == padding, -1, found)
        rows = lookup(found, weight, padding)
        if call.get("max_norm") is not None:
            rows = _within(rows, call["max_norm"], call.get("norm_type", 2.0))
        if shares is not None:
            rows = rows * shares[..., None]
        there = (found >= 0)[..., None]
        if mode == "max":
            if not rows.shape[1]:
                return rows.sum(1)
            return torch.where(there.any(1), rows.masked_fill(~there, -torch.inf).max(1).values, 0.0)
        total = rows.sum(1)
        return total if mode == "sum" else total / there.sum(1).clamp_min(1)

    return run


def _bags(offsets: Tensor, count: int, closed: bool) -> tuple[Tensor, Tensor]:
    """Where the tokens of every bag stand among ``count``, ``(N, T)``, and which of these places are the bag's.

    ``closed``: the last offset is the end of the last bag.
    """
    offsets = offsets if closed else torch.cat([offsets, offsets.new_full((1,), count)])
    starts, ends = offsets[:-1], offsets[1:]
    longest = int((ends - starts).max()) if len(starts) else 0
    place = starts[:, None] + torch.arange(longest, device=starts.device)
    return place.clamp_max(max(0, count - 1)), place < ends[:, None]


class Plainly(TorchFunctionMode):
    """Runs every lookup as the function that it is, and leaves hooks on tensors out.

    Attributes:
        found: whether there was such a call.
        hooks: whether one of them was for a hook.
    """

    found, hooks = False, False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        instead = plain(func, args, kwargs or {})
        if instead is None:
            return func(*args, **(kwargs or {}))
        self.found, self.hooks = True, self.hooks or instead is NoHook
        return instead()


def note_plain(model: nn.Module) -> None:
    """From now on such calls of this model run as :func:`plain` ones, although none of its modules tells of them."""
    _PLAINLY.add(original(model))


@contextmanager
def as_functions(model: nn.Module) -> Iterator[None]:
    """Inside, the model's calls are the functions that they are; costs nothing for a model that has none others."""
    known = original(model)
    told = known in _PLAINLY or any(map(_tells, model.modules()))
    if not told and known in _WATCHED:
        yield
        return
    with Plainly() as mode:
        yield
    if not told:
        (_PLAINLY if mode.found else _WATCHED).add(known)
    if mode.hooks:
        _HOOKED.add(known)


def leaves_hooks_out(model: nn.Module) -> bool:
    """Whether a pass of the model inside of :func:`as_functions` would have put hooks on tensors."""
    return original(model) in _HOOKED


def padding_rows(model: nn.Module) -> dict[str, int]:
    """By parameter name, the row that all modules with this parameter take for the constant row of ``padding_idx``."""
    rows: dict[int, int | None] = {}
    for module in model.modules():
        table = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            row: Any = module.padding_idx if table and key == "weight" else None
            if rows.setdefault(id(parameter), row) != row:
                rows[id(parameter)] = None
    return {n: row for n, p in model.named_parameters() if (row := rows.get(id(p))) is not None}


def _tells(module: nn.Module) -> bool:
    if isinstance(module, nn.EmbeddingBag):
        return True
    return isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    )
