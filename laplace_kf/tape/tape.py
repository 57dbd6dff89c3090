"""The tape: which function consumed which parameter, with which input and output.

``torch.overrides.TorchFunctionMode`` shows every torch function call, so the tape needs no hooks on the user's
modules and sees parameters wherever they are used: in ``nn.Linear``, in a custom layer that calls ``F.linear``, in a
re-used or tied module, in an elementwise scale. An output is remembered by its *gradient edge* (its place in the
autograd graph), not as a tensor, so an in-place activation after a layer cannot falsify what is read later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from laplace_kf.errors import UnsupportedLayer
from laplace_kf.layers.base import RULES, BoundCall, LayerRule

__all__ = ["Call", "Step", "Tape"]


@dataclass
class Call:
    """One use of parameters by a function that has a rule.

    Attributes:
        rule: the layer rule.
        bound: the call's arguments by name.
        names: role (``"weight"``, ``"bias"``) to parameter name, tracked parameters only.
        edge: where the output stands in the autograd graph.
        shape: shape of the output.
        leading: how many leading output axes enumerate rows.
        version: version counter of the input when it was consumed.
    """

    rule: LayerRule
    bound: BoundCall
    names: dict[str, str]
    edge: GradientEdge
    shape: torch.Size
    leading: int
    version: int

    @property
    def key(self) -> tuple[str, ...]:
        """The parameter names, in role order."""
        return tuple(self.names.values())

    def input(self) -> Tensor:
        """The input as it was consumed, in its own shape.

        Raises:
            UnsupportedLayer: if it was changed in place since.
        """
        value: Tensor = self.bound["input"]
        if _version(value) != self.version:
            raise UnsupportedLayer(
                f"the input of the layer with parameters {', '.join(self.key)} was changed in place after the layer "
                "read it; make that operation out of place"
            )
        return value.detach()


@dataclass
class Step:
    """One function call of the forward pass, for analyses that need the whole chain of functions.

    A tensor (of any shape) at one moment is known by ``(id, version)``, which tells in-place activations apart.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    source: Tensor | None
    source_key: tuple[int, int]
    output: Tensor
    output_key: tuple[int, int]
    call: Call | None
    before: Tensor | None


class Tape(TorchFunctionMode):
    """Records the calls that consume tracked parameters, whatever the shapes; surround one forward pass with it.

    Args:
        tracked: ``id(parameter)`` to parameter name.
        on_step: called before every function with (function, args, kwargs); its return value is kept in the step.
        record_steps: also keep every call on tensors (:attr:`steps`).

    After the pass, :attr:`calls` lists the uses that have a rule, in order; :attr:`opaque` the names consumed by
    anything else (with the name of the function); :attr:`order` all uses in order.
    """

    def __init__(
        self,
        tracked: Mapping[int, str],
        record_steps: bool = False,
        on_step: Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.tracked = tracked
        self.record_steps = record_steps
        self.on_step = on_step
        self.calls: list[Call] = []
        self.opaque: dict[str, str] = {}
        self.order: list[str] = []
        self.steps: list[Step] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = {id(t): self.tracked[id(t)] for t in _tensors((args, kwargs)) if id(t) in self.tracked}
        source, source_key, before = None, (0, 0), None
        if self.record_steps:
            source = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
            if isinstance(source, Tensor):
                source_key = (id(source), _version(source))
                before = self.on_step(func, args, kwargs) if self.on_step is not None else None
        rule = RULES.get(func) if used else None
        bound = rule.bind(args, kwargs) if rule is not None else None
        version = _version(bound["input"]) if bound is not None else 0
        output = func(*args, **kwargs)
        call = None
        # a result that is the parameter itself (``weight.to(dtype)``) is a look, not a use
        if used and any(t.requires_grad and id(t) not in self.tracked for t in _tensors(output)):
            self.order.extend(used.values())
            call = self._record(func, rule, bound, used, output, version)
        if self.record_steps and isinstance(output, Tensor):
            # the tensors are kept alive so that their ids stay theirs
            key = (id(output), _version(output))
            self.steps.append(Step(func, args, kwargs, source, source_key, output, key, call, before))
        return output

    def _record(
        self,
        func: Callable[..., Any],
        rule: LayerRule | None,
        bound: BoundCall | None,
        used: Mapping[int, str],
        output: Any,
        version: int,
    ) -> Call | None:
        names: dict[str, str] = {}
        reason: str | None = None
        if rule is not None and bound is not None:
            reason = rule.refuses(bound)
            if reason is None:
                names = {r: used[id(bound.values.get(r))] for r in rule.roles if id(bound.values.get(r)) in used}
            others = set(used.values()) - set(names.values())
        else:
            others = set(used.values())
        for name in others:
            self.opaque.setdefault(name, reason if reason is not None else str(getattr(func, "__name__", func)))
        if not names or rule is None or bound is None:
            return None
        call = Call(rule, bound, names, get_gradient_edge(output), output.shape, rule.leading(bound, output), version)
        self.calls.append(call)
        return call


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)  # inference tensors do not count


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from _tensors(value)
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _tensors(value)
