"""Where the channel of the outputs stands: ``likelihood.with_layout("channels_first")``, or decided by the targets.

Outputs of three dimensions are read ``(N, T, C)``, of four and more ``(N, C, H, W)``. An arranged likelihood reads them
otherwise: it brings outputs and targets into one of these two forms, and what it returns back. Nothing here knows what
a likelihood computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import LaplaceKFError, ShapeMismatch, UnknownName
from laplace_kf.outputs.weighted import bare

__all__ = ["CHANNELS_FIRST", "CHANNELS_LAST", "arranged", "decided"]

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"


def _other(layout: str, dims: int) -> bool:
    """Whether outputs of so many dimensions are read otherwise than by their number of dimensions."""
    return dims == 3 if layout == CHANNELS_FIRST else dims > 3


def _mapped(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Targets of any kind with their tensors changed."""
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_mapped(part, change) for part in structure))
    if isinstance(structure, (tuple, list)):
        return type(structure)(_mapped(part, change) for part in structure)
    if isinstance(structure, Mapping):
        return {name: _mapped(part, change) for name, part in structure.items()}
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        fields = {f.name: _mapped(getattr(structure, f.name), change) for f in dataclasses.fields(structure) if f.init}
        return dataclasses.replace(structure, **fields)
    return structure


def _inward(layout: str, x: Tensor, lead: int = 0) -> Tensor:
    """Outputs with ``lead`` axes before them in the form that is read by its number of dimensions."""
    if not _other(layout, x.ndim - lead):
        return x
    return x.unsqueeze(-2) if layout == CHANNELS_FIRST else x.flatten(lead + 1, -2)


def _target_inward(layout: str, shape: Sequence[int], target: Tensor) -> Tensor:
    """A target (a number, or a vector, per position) of outputs of this shape in that form; others as they are."""
    dims = len(shape)
    if not _other(layout, dims) or target.ndim not in (dims - 1, dims):
        return target
    if layout == CHANNELS_FIRST:
        return target.unsqueeze(-2)
    if target.shape[:-1] != tuple(shape[:-1]) if target.ndim == dims else target.shape != tuple(shape[:-1]):
        raise ShapeMismatch(
            f"targets of shape {tuple(target.shape)} do not fit outputs of shape {tuple(shape)} with the channel last; "
            f"expected {tuple(shape[:-1])}, or {(*shape[:-1], 'E')}"
        )
    return target.flatten(1, dims - 2)


def _outward(layout: str, shape: Sequence[int], scalar: bool, x: Tensor) -> Tensor:
    """Back: a number (``scalar``) or a vector per position of outputs of this shape, with any axes before them."""
    if not _other(layout, len(shape)):
        return x
    if layout == CHANNELS_FIRST:
        return x.squeeze(-2)
    end = x.ndim - 1 if scalar else x.ndim - 2
    return x.reshape(*x.shape[:end], *shape[1:-1], *x.shape[end + 1 :])


def _density(density: Callable[[Any], Tensor], layout: str, shape: Sequence[int], targets: Any) -> Tensor:
    return density(_mapped(targets, partial(_target_inward, layout, shape)))


def _entropies(
    entropies: Callable[[], tuple[Tensor, Tensor | None]], layout: str, shape: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    total, conditional = entropies()
    back = partial(_outward, layout, shape, True)
    return back(total), None if conditional is None else back(conditional)


class _Arranged:
    """Before a likelihood's class: every method that takes outputs takes them in :attr:`layout`."""

    layout: str

    def _in(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Any]:
        return _inward(self.layout, outputs), _mapped(targets, partial(_target_inward, self.layout, outputs.shape))

    def _back(self, outputs: Tensor, result: Any, scalar: bool = False) -> Any:
        return None if result is None else _outward(self.layout, outputs.shape, scalar, result)

    def to_positions(self, outputs: Tensor) -> Tensor:
        return super().to_positions(_inward(self.layout, outputs))  # type: ignore[misc]

    def from_positions(self, x: Tensor, like: Tensor | Sequence[int]) -> Tensor:
        shape = tuple(like.shape) if isinstance(like, Tensor) else tuple(like)
        inside = _inward(self.layout, torch.empty(shape, device="meta"))
        return _outward(self.layout, shape, False, super().from_positions(x, inside))  # type: ignore[misc]

    def root_width(self, outputs: Tensor, targets: Any = None) -> int:
        return super().root_width(*self._in(outputs, targets))  # type: ignore[misc]

    def curvature_rows(self, output: int, outputs: Tensor, targets: Any = None) -> Tensor:
        return super().curvature_rows(output, *self._in(outputs, targets))  # type: ignore[misc]

    def drawn_score(self, outputs: Tensor, targets: Any, generator: torch.Generator) -> Tensor:
        return self._back(outputs, super().drawn_score(*self._in(outputs, targets), generator))  # type: ignore[misc]

    def root_product(self, outputs: Tensor, v: Tensor, targets: Any = None) -> Tensor:
        inside, y = self._in(outputs, targets)
        return self._back(outputs, super().root_product(inside, v, y))  # type: ignore[misc]

    def curvature_product(self, outputs: Tensor, v: Tensor, targets: Any = None) -> Tensor:
        if v.shape[1:] != outputs.shape:
            return super().curvature_product(outputs, v, targets)  # type: ignore[misc]  # refused there
        inside, y = self._in(outputs, targets)
        found = super().curvature_product(inside, _inward(self.layout, v, 1), y)  # type: ignore[misc]
        return self._back(outputs, found)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        inside = _inward(self.layout, outputs)
        drawn: Tensor = super().sample(inside, generator)  # type: ignore[misc]
        return self._back(outputs, drawn, scalar=drawn.ndim == inside.ndim - 1)

    def predict(self, outputs: Tensor, keep_samples: bool = False) -> Any:
        found = super().predict(_inward(self.layout, outputs, 1), keep_samples)  # type: ignore[misc]
        return self._prediction(outputs.shape[1:], found)

    def predict_gaussian(self, outputs: Tensor, variance: Tensor, *args: Any, **kwargs: Any) -> Any:
        inside, spread = _inward(self.layout, outputs), _inward(self.layout, variance)
        return self._prediction(outputs.shape, super().predict_gaussian(inside, spread, *args, **kwargs))  # type: ignore[misc]

    def _prediction(self, shape: Sequence[int], found: Any) -> Any:
        if not _other(self.layout, len(shape)):
            return found
        return dataclasses.replace(
            found,
            values={name: _outward(self.layout, shape, False, value) for name, value in found.values.items()},
            density=partial(_density, found.density, self.layout, tuple(shape)),
            entropies=partial(_entropies, found.entropies, self.layout, tuple(shape)),
            channel=1 if self.layout == CHANNELS_FIRST else -1,
        )

    def to_config(self) -> dict[str, Any]:
        return {**_plain(self).to_config(), "layout": self.layout}

    def __reduce__(self) -> tuple[Any, ...]:
        return arranged, (_plain(self), self.layout)

    def __repr__(self) -> str:
        return f"{_plain(self)!r}.with_layout({self.layout!r})"


def _takes(name: str, like_outputs: bool) -> Callable[..., Any]:
    """A method ``(outputs, targets, ...)`` whose result has the layout of the outputs, or none."""

    def method(self: Any, outputs: Tensor, targets: Any = None, *further: Any) -> Any:
        found = getattr(super(_Arranged, self), name)(*self._in(outputs, targets), *further)
        return self._back(outputs, found) if like_outputs else found

    method.__name__ = name
    return method


for _name in ("counted", "score", "root_score", "hessian_root"):
    setattr(_Arranged, _name, _takes(_name, True))
for _name in (
    "check", "counted_positions", "counted_examples", "log_prob", "hessian", "curvature", "position_root", "root",
    "curvature_diagonal", "summed_curvature", "moments",
):  # fmt: skip
    setattr(_Arranged, _name, _takes(_name, False))

_CLASSES: dict[type, type] = {}


def _plain(likelihood: Any) -> Any:
    """A copy of the likelihood without a layout of its own."""
    if not isinstance(likelihood, _Arranged):
        return likelihood
    plain: Any = object.__new__(type(likelihood).__mro__[2])  # after its own class and _Arranged
    plain.__dict__.update({name: value for name, value in vars(likelihood).items() if name != "layout"})
    return plain


def arranged(likelihood: Any, layout: str) -> Any:
    """A copy of the likelihood that reads all outputs in one layout.

    Args:
        likelihood: any likelihood.
        layout: ``"channels_first"`` (``(N, C, T)``, ``(N, C, H, W)``, ...: torch's own) or ``"channels_last"``
            (``(N, T, C)``, ``(N, H, W, C)``, ...). Outputs ``(N, C)`` are the same in both.

    Raises:
        UnknownName: for another layout.
    """
    if layout not in (CHANNELS_FIRST, CHANNELS_LAST):
        raise UnknownName("layout", layout, (CHANNELS_FIRST, CHANNELS_LAST))
    plain = _plain(likelihood)
    kind = type(plain)
    if kind not in _CLASSES:
        _CLASSES[kind] = type(
            kind.__name__, (_Arranged, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__}
        )
    made: Any = object.__new__(_CLASSES[kind])
    made.__dict__.update(vars(plain), layout=layout)
    return made


def _fits(likelihood: Any, outputs: Tensor, targets: Any, numbers: bool = False) -> bool:
    """Whether the shapes fit; what the numbers are is asked only if so said."""
    try:
        likelihood.check(outputs, targets)
    except ShapeMismatch:
        return False
    except (LaplaceKFError, ValueError, RuntimeError, IndexError, TypeError):  # some of them of a user's own loss
        return not numbers
    return True


def decided(likelihood: Any, outputs: Tensor, targets: Any, rows: bool = False) -> Any:
    """The likelihood with the layout that the targets of outputs ``(N, A, B)`` show; others as they are.

    Targets in the shape of the outputs themselves show nothing, and every output is a variable of its own then: they
    are read ``(N, T, C)``, as documented, unless a layout was given. Class probabilities show along which axis they add
    up to 1, and a noise scale for each of C outputs along which they lie.

    Args:
        likelihood: any likelihood.
        outputs: ``(N, A, B)``; others are not looked at.
        targets: of any form.
        rows: whether the outputs are known to be ``(N, T, C)``, as those of graphs are.

    Raises:
        ShapeMismatch: if the targets fit both layouts (A = B), with the line to paste.
    """
    if outputs.ndim != 3 or isinstance(likelihood, _Arranged):
        return likelihood
    targets = bare(targets)
    same = [t.shape == outputs.shape for t in _tensors(targets)]
    by_output = getattr(likelihood, "differs_by_output", False)
    if same and all(same) and not by_output and not getattr(likelihood, "simplex_targets", False):
        return likelihood
    if same and same[0] and isinstance(targets, (tuple, list)) and all(t.ndim != 2 for t in targets[1:]):
        return likelihood  # known noise of the whole outputs, or of examples
    first, last = arranged(likelihood, CHANNELS_FIRST), arranged(likelihood, CHANNELS_LAST)
    outputs = outputs.detach()
    numbers = bool(same and same[0] and isinstance(targets, Tensor))  # class probabilities: along what they add up to 1
    one, two = _fits(first, outputs, targets, numbers), _fits(last, outputs, targets, numbers)
    if one and two and rows:
        return last
    if one and two:
        shapes = [tuple(t.shape) for t in _tensors(targets)]
        raise ShapeMismatch(
            f"outputs {tuple(outputs.shape)} and targets {', '.join(map(str, shapes))} fit two layouts: (N, C, T), as "
            "of nn.Conv1d and torch's own losses, and (N, T, C), as of sequence models. Say which: likelihood="
            f'{likelihood!r} becomes lk.likelihoods.{likelihood!r}.with_layout("channels_first") for (N, C, T), or '
            f'.with_layout("channels_last") for (N, T, C); LaplacePosterior and lk.curvature.estimate take layout='
            '"channels_first" as well'
        )
    return first if one else last if two else likelihood


def _tensors(structure: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(structure, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found
