"""What of a network a posterior does not hold, and whether it is still what the fit saw.

A posterior keeps the mean of its own parameters. Those that it leaves out (a backbone, frozen ones) and the buffers
(running statistics) are the model's: where somebody trains on, or loads another state, predictions would be those of a
network that is half the one and half the other. So they would be where a weight of the posterior stood at several
places of the network (tied) and does not any more, or the other way round: then only some of them get its draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.callers import warn_user
from laplace_kf.errors import ShapeMismatch
from laplace_kf.models import named_parameters
from laplace_kf.posterior.conduct import Conduct

__all__ = ["Surroundings", "Ties"]

KEPT = 2**16  # entries of a tensor of which a copy is kept, to be compared at every call: of larger ones every k-th
ROUNDING = 1e-9  # of sums in float64 on another device or with other threads


class _Part:
    """One tensor as it was: its type, its shape, and sums in place of its numbers.

    Args:
        dtype, shape: as text and list.
        sums: of its entries and of their squares.
    """

    def __init__(self, dtype: str, shape: list[int], sums: list[float]) -> None:
        self.dtype, self.shape, self.sums = dtype, shape, sums
        self.seen: tuple[int, int] | None = None  # identity and version of the tensor that was found unchanged last
        self.some: Tensor | None = None  # copies of entries

    @classmethod
    def of(cls, tensor: Tensor) -> _Part:
        """That of a tensor of any shape, as it is now."""
        made = cls(str(tensor.dtype), list(tensor.shape), _sums(tensor))
        made._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        self.seen = id(tensor), tensor._version
        self.some = _some(tensor)

    def stands(self, tensor: Tensor) -> bool:
        """Whether a tensor (of any shape) has these numbers still; in another type that cannot be said, and it has."""
        if str(tensor.dtype) != self.dtype or tensor.is_meta or tensor.is_inference():
            return True
        if list(tensor.shape) != self.shape:
            return False
        # batch normalisation and what writes into .data leave the version as it is: entries are looked at, too
        some, unwritten = _some(tensor), self.seen == (id(tensor), tensor._version)
        whole = some is not None and len(some) == tensor.numel()
        if (whole or unwritten) and _alike(some, self.some):
            return True
        size = math.sqrt(max(1, tensor.numel()) * abs(self.sums[1])) if math.isfinite(self.sums[1]) else 0.0
        limits = (ROUNDING * size, ROUNDING * abs(self.sums[1]) if size else 0.0)
        found = zip(_sums(tensor), self.sums, limits, strict=True)
        if not all(a == b or abs(a - b) <= limit or (math.isnan(a) and math.isnan(b)) for a, b, limit in found):
            return False
        self._note(tensor)
        return True


def _some(tensor: Tensor) -> Tensor | None:
    """Copies of at most :data:`KEPT` entries, all where there are no more; None of what is not stored densely."""
    if tensor.layout is not torch.strided:
        return None
    return tensor.detach().reshape(-1)[:: -(-tensor.numel() // KEPT) or 1].clone()


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and torch.equal(one, other)


def _sums(tensor: Tensor) -> list[float]:
    flat = tensor.detach().to_dense().reshape(-1).double()
    return [float(flat.sum()), float(flat @ flat)]


def _tensors(model: nn.Module, held: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name and tensor of every parameter that is not held, and of every floating buffer.

    Tables that renormalise their rows as they look them up (``max_norm``) are the same function before and after.
    """
    named = {n: p for n, p in named_parameters(model).items() if n not in held}
    own = (m._parameters.values() for m in model.modules() if getattr(m, "max_norm", None) is not None)
    written = {id(p) for values in own for p in values} if named else set()
    yield from (("parameter", n, p) for n, p in named.items() if id(p) not in written)
    yield from (("buffer", n, b) for n, b in model.named_buffers() if b.is_floating_point())


def _stands_at(model: nn.Module, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


class Ties:
    """The further places of a model at which parameters stand whose values are kept under one name.

    Args:
        names: by further name, the one under which it is kept.
        since: when it was so, for the message.
    """

    def __init__(self, names: Mapping[str, str], since: str = "the posterior was fitted") -> None:
        self.names, self.since = dict(names), since

    @classmethod
    def of(cls, model: nn.Module, held: Collection[str], since: str = "the posterior was fitted") -> Ties:
        """Those of the parameters that are held."""
        first: dict[int, str] = {}
        every = model.named_parameters(remove_duplicate=False)
        return cls({n: name for n, p in every if (name := first.setdefault(id(p), n)) != n and name in held}, since)

    def require(self, model: nn.Module) -> None:
        """Refuses a model that has other tensors at those places.

        Raises:
            ShapeMismatch: names the two places, and the line that ties them again.
        """
        for other, name in self.names.items():
            if _stands_at(model, other) is not _stands_at(model, name):
                (path, _, last), (place, _, end) = name.rpartition("."), other.rpartition(".")
                raise ShapeMismatch(
                    f"parameters {name!r} and {other!r} were one tensor when {self.since}, and are two now "
                    "(load_state_dict(assign=True) unties, and so does a layer that is replaced): only one of them "
                    f"would be reached. Tie them again, model.get_submodule({place!r}).{end} = "
                    f"model.get_submodule({path!r}).{last}, or begin anew with the model as it is"
                )


class Surroundings:
    """Left-out parameters and floating buffers of a model, by name, and how its modules are set.

    Args:
        parts: as they were.
        held: names of the parameters that the posterior holds itself.
        ties: where those stand at several places.
        conduct: how its modules were set, where that is known.
    """

    def __init__(
        self, parts: Mapping[str, _Part], held: Collection[str], ties: Ties, conduct: Conduct | None = None
    ) -> None:
        self.parts, self.held, self.ties = dict(parts), frozenset(held), ties
        self.conduct = conduct or Conduct()
        self.told = False

    @classmethod
    def of(cls, model: nn.Module, held: Collection[str]) -> Surroundings:
        """Those of a model as it is now."""
        plain = ((n, t) for _, n, t in _tensors(model, held) if t.is_floating_point() and not t.is_meta)
        parts = {name: _Part.of(tensor) for name, tensor in plain}
        return cls(parts, held, Ties.of(model, held), Conduct.of(model))

    def _refuse_tied(self, model: nn.Module, there: Collection[str]) -> None:
        """Raises where a left-out parameter, not among those that are ``there``, is one of the posterior's now."""
        for name in self.parts:
            if name not in there and (found := _stands_at(model, name)) is not None:
                held = (n for n in self.held if _stands_at(model, n) is found)
                if (same := next(held, None)) is not None:
                    raise ShapeMismatch(
                        f"parameters {same!r} and {name!r} are one tensor, and were two when the posterior was fitted, "
                        f"which keeps {same!r} only: draws would reach both. Untie them, or fit again, "
                        "posterior.fit(train_loader)"
                    )

    def warn(self, model: nn.Module) -> None:
        """Warns, once, where the model has something else now.

        Raises:
            ShapeMismatch: where weights of the posterior are at other places of the model now.
        """
        self.ties.require(model)
        if not self.parts:
            return
        now = list(_tensors(model, self.held))
        self._refuse_tied(model, {name for _, name, _ in now})
        if self.told:
            return
        changed = [
            (kind, name) for kind, name, tensor in now if name in self.parts and not self.parts[name].stands(tensor)
        ]
        if not changed:
            return
        self.told = True
        kind, name = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        path = name.rpartition(".")[0]
        where = f" of module {path!r}" if path else ""
        warn_user(
            f"{kind} {name!r}{where}{more} has other numbers than when the posterior was fitted, and is none of those "
            "that the posterior keeps: predictions are those of a network that is half the one of the fit, half the "
            "one of now. Load the state of the fit, model.load_state_dict(state), or fit again, "
            "posterior.fit(train_loader)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {name: [part.dtype, part.shape, part.sums] for name, part in self.parts.items()}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any] | None, held: Collection[str], ties: Mapping[str, str] | None
    ) -> Surroundings:
        """The inverse of :meth:`to_json`; of files that say nothing of it, nothing is known."""
        return cls({name: _Part(*each) for name, each in (values or {}).items()}, held, Ties(ties or {}))
