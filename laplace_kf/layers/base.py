"""What the engine has to know about a torch function that consumes parameters.

The tape (:mod:`laplace_kf.tape.tape`) sees *function* calls (``F.linear``, ``F.conv2d``, ...), not modules, so one rule
serves ``nn.Linear``, a custom layer that calls ``F.linear``, and a re-used module alike. A rule is one of two kinds:

* :class:`MatrixRule`: the weight acts as matrices ``W (R, O, I)`` on inputs ``a`` at ``T`` positions. ``R`` counts the
  groups of a grouped convolution and is 1 otherwise. Its curvature block factorises over ``a`` and ``g``.
* :class:`AffineRule`: an elementwise scale and shift of a normalised input. Its block is diagonal or small and dense.

A function without a rule is not an error: its parameters go through per-example gradients (the fallback).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = [
    "RULES",
    "AffineRule",
    "BoundCall",
    "Example",
    "LayerRule",
    "MatrixRule",
    "MatrixView",
    "WithParameter",
    "register",
    "rule_names",
]


@dataclass(frozen=True)
class MatrixView:
    """How a weight tensor reads as matrices ``(R, O, I)``: reshape to ``split``, permute, reshape.

    Kept as plain integers so that a saved posterior can rebuild it.
    """

    split: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, int, int]

    def transposed(self) -> MatrixView:
        """The reading of a matrix whose memory holds columns where this one expects rows (one group only)."""
        groups, rows, columns = self.split
        exchanged = tuple({1: 2, 2: 1}.get(p, p) for p in self.permutation)
        return MatrixView((groups, columns, rows), exchanged, self.shape)

    def turned(self) -> MatrixView:
        """The reading of the same memory as ``Wᵀ`` (one group only)."""
        groups, out, inp = self.shape
        first, second, third = self.permutation
        return MatrixView(self.split, (first, third, second), (groups, inp, out))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``(K, *weight shape)`` to ``(K, R, O, I)``."""
        split = weight.reshape(weight.shape[0], *self.split)
        return split.permute(0, *(1 + p for p in self.permutation)).reshape(weight.shape[0], *self.shape)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """``(K, R, O, I)`` back to ``(K, *shape)``."""
        permuted = matrix.reshape(matrix.shape[0], *(self.split[p] for p in self.permutation))
        inverse = [self.permutation.index(i) for i in range(len(self.permutation))]
        return permuted.permute(0, *(1 + p for p in inverse)).reshape(matrix.shape[0], *shape)


@dataclass
class BoundCall:
    """The arguments of one recorded call by name, in the order of ``LayerRule.arguments``."""

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


Example = Callable[[], tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class LayerRule(ABC):
    """A torch function family that consumes a ``weight`` and perhaps a ``bias``.

    Attributes:
        name: name of the family in the support table.
        functions: the torch functions it covers.
        modules: names of the ``torch.nn`` modules that call them.
        arguments: positional argument names with their defaults, in order (builtins have no signature).
        roles: the arguments that can be parameters.
        examples: small layers that use the rule, each made together with an input ``(N, ...)``: what the contract
            tests run it on, and what shows a reader how it is used.
    """

    name: str
    functions: tuple[Callable[..., Any], ...]
    modules: tuple[str, ...]
    arguments: Mapping[str, Any] = field(hash=False, default_factory=dict)
    examples: tuple[Example, ...] = field(default=(), compare=False)
    roles: ClassVar[tuple[str, ...]] = ("weight", "bias")
    one_hot: ClassVar[bool] = False
    keeps_memory: ClassVar[bool] = False  # the result may share its memory with the parameter (``expand``)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: Collection[int] = ()) -> BoundCall:
        """Names the arguments of a call and fills in the defaults.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            parameters: ids of the tensors among them that are parameters, for rules that cannot tell by position.
        """
        values = dict(self.arguments)
        values.update(zip(self.arguments, args, strict=False))
        values.update(kwargs)
        return BoundCall(values)

    @abstractmethod
    def leading(self, call: BoundCall, output: Tensor) -> int:
        """How many leading axes of the output's shape enumerate rows (examples, positions), not features."""

    def refuses(self, call: BoundCall, output: Tensor) -> str | None:
        """A reason why this call (``output`` of any shape) must go through the per-example fallback, or ``None``."""
        return None

    def constant_row(self, call: BoundCall) -> int | None:
        """The row of the weight that this call takes for a constant (a padding row), or ``None``."""
        return None


class MatrixRule(LayerRule):
    """A weight that multiplies inputs: ``h = W [a; 1]`` at every position (methods 1.1, 4.5)."""

    @abstractmethod
    def view(self, weight: Tensor, call: BoundCall) -> MatrixView:
        """The ``(R, O, I)`` reading of ``weight`` in this call."""

    @abstractmethod
    def inputs(self, rows: Tensor, call: BoundCall, kernel: Sequence[int]) -> Tensor:
        """Input rows ``(B, ...)`` to what the weight multiplies: ``(B, T, R, I)``, or tokens ``(B, T)`` if one-hot."""

    @abstractmethod
    def outputs(self, rows: Tensor, call: BoundCall, groups: int) -> Tensor:
        """Output rows ``(..., B, *features)`` to ``(..., B, T, R, O)``."""


class AffineRule(LayerRule):
    """``h = weight ∘ x̂ + bias`` with ``x̂`` free of parameters (normalisation layers, methods 4.6)."""

    @abstractmethod
    def normalised(self, rows: Tensor, call: BoundCall) -> Tensor:
        """Input rows to ``x̂``, as ``(B, F, T)`` with ``F`` entries of the weight and ``T`` positions each."""

    @abstractmethod
    def outputs(self, rows: Tensor, call: BoundCall) -> Tensor:
        """Output rows ``(..., B, *features)`` to ``(..., B, F, T)``."""


class WithParameter(nn.Module):
    """``function(x, w)`` with a parameter ``w`` of a shape: the example of a rule for which there is no module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """``function(x, w)`` for ``x (N, ...)``."""
        return self.function(x, self.w)


RULES: dict[Callable[..., Any], LayerRule] = {}


def register(rule: LayerRule) -> LayerRule:
    """Adds a rule to the table the tape looks up; returns it unchanged.

    Raises:
        ValueError: if one of its functions already has a rule.
    """
    for function in rule.functions:
        if function in RULES:
            raise ValueError(f"{function} has a rule already, only one is allowed: {RULES[function].name}")
        RULES[function] = rule
    return rule


def rule_names() -> dict[str, LayerRule]:
    """The registered rules by name, each once."""
    return {rule.name: rule for rule in RULES.values()}


def as_tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """An int or a sequence as a tuple of ``length`` ints (the way convolution arguments are broadcast)."""
    values = (int(value),) * length if isinstance(value, int) else tuple(int(v) for v in value)
    return values * length if len(values) == 1 and length > 1 else values


def flatten_rows(tensor: Tensor, leading: int) -> Tensor:
    """Merges the first ``leading`` axes: ``(d0, ..., dk, *rest)`` to ``(B, *rest)``."""
    return tensor.reshape(math.prod(tensor.shape[:leading]), *tensor.shape[leading:])


def functions_of(*candidates: tuple[Any, str]) -> tuple[Callable[..., Any], ...]:
    """The functions ``getattr(owner, name)`` that exist in this torch version, each once."""
    found: list[Callable[..., Any]] = []
    for owner, name in candidates:
        function = getattr(owner, name, None)
        if function is not None and all(function is not f for f in found):
            found.append(function)
    return tuple(found)
