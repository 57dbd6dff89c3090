"""Stepping in where a model uses sampled parameters, and running a model for several draws at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_kf.batches import Forward, predicted, tensors_of
from laplace_kf.errors import IncompatiblePair, LaplaceKFError, ShapeMismatch
from laplace_kf.layers.base import RULES, BoundCall, LayerRule
from laplace_kf.models import autocasting, parameters_of, preserved
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.replica import Shared, original
from laplace_kf.substitution import reached, substituted
from laplace_kf.tape.chance import require_a_function

__all__ = ["Uses", "outputs_at", "over_draws", "require_movable"]

Handler = Callable[[LayerRule, BoundCall, Mapping[str, str], Callable[[], Tensor]], Tensor]
_VECTORISES: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@contextmanager
def _without_advice() -> Iterator[None]:
    with warnings.catch_warnings():  # an operation without a batching rule is slower, not wrong
        warnings.filterwarnings("ignore", message=".*batching rule.*", category=UserWarning)
        yield


QUIET = Shared(_without_advice)
"""No advice about batching rules, for the whole process: the filters of warnings are."""


def outputs_at(model: nn.Module, forward: Forward | None, weights: Mapping[str, Tensor] | None, inputs: Any) -> Tensor:
    """Network outputs ``(N, ...)`` with some parameters replaced; the model itself is not touched.

    Args:
        model: the module, in the mode it is to run in (see :func:`laplace_kf.models.preserved`).
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        weights: replacements by parameter name, ``None`` for the model's own.
        inputs: what the model takes: a tensor, a tuple, or a mapping of keyword arguments.

    Raises:
        ShapeMismatch: if the outputs have no example and output axes.
    """
    track = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(inputs))
    with torch.set_grad_enabled(track):
        if weights:
            parameters_of(model, list(weights), [tuple(value.shape) for value in weights.values()], "the posterior")
        outputs = substituted(model, weights or {}, lambda: predicted(model, inputs, forward))
    if outputs.dim() < 2:
        raise ShapeMismatch(
            f"the model's outputs must be (N, C), (N, T, C) or (N, C, H, W), got {tuple(outputs.shape)}; one example "
            "is a batch of one, x[None]"
        )
    return outputs


def require_movable(model: nn.Module, forward: Forward | None, names: Collection[str], inputs: Any) -> None:
    """Refuses parameters in whose place no draw can be put; asked once for a model and its parameters.

    Args:
        model: the module; left as it was.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        names: parameters that will be replaced.
        inputs: what the model takes, on its device.

    Raises:
        UnsupportedLayer: if the forward pass reaches one in another way; names it.
    """
    if not reached(model, forward, names):
        with preserved(model):
            require_a_function(model, forward, names, lambda other: predicted(model, other, forward), inputs)


class Uses(TorchFunctionMode):
    """Hands every use of some parameters to a function; surround one forward pass with it.

    Args:
        tracked: ``id(parameter tensor)`` to parameter name.
        handle: called with the layer rule, the bound arguments, role (``"weight"``, ``"bias"``) to parameter name, and
            the call itself; returns what the call is to give.

    Raises:
        IncompatiblePair: on a use by a function that has no layer rule, on one through a view of a parameter, and on
            one in place (whose result the caller may not read).
    """

    def __init__(self, tracked: Mapping[int, str], handle: Handler) -> None:
        super().__init__()
        self.tracked, self.handle = tracked, handle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = {id(t): self.tracked[id(t)] for t in tensors_of([*args, *kwargs.values()]) if id(t) in self.tracked}
        if not used:
            return func(*args, **kwargs)
        name = str(getattr(func, "__name__", func))
        rule = RULES.get(func)
        if rule is None:
            result = func(*args, **kwargs)
            made = [t for t in tensors_of(result) if t.is_floating_point() and id(t) not in self.tracked]
            if made:  # anything else is a look (its shape, its type), not a use
                raise IncompatiblePair(_refusal(used, name))
            return result
        bound = rule.bind(args, kwargs, used)
        names = {role: used[id(bound.values[role])] for role in rule.roles if id(bound.values.get(role)) in used}
        if set(names.values()) != set(used.values()) or name.startswith("__i") or name.rstrip("_") + "_" == name:
            raise IncompatiblePair(_refusal(used, name))
        return self.handle(rule, bound, names, lambda: func(*args, **kwargs))


def _refusal(used: Mapping[int, str], function: str) -> str:
    return (
        f'space="activations" cannot be used here: {function!r} reads parameter {", ".join(used.values())} in a way '
        'that no rule covers; use space="weights" (or "auto")'
    )


def over_draws(
    model: nn.Module, run: Callable[[dict[str, Tensor]], Tensor], stacked: Mapping[str, Tensor], kind: str = "outputs"
) -> Tensor:
    """Outputs ``(K, N, ...)`` of K draws, vectorised over them where the model allows it.

    What does not depend on a draw is computed once. The first time a model is vectorised, its first and last draw are
    checked by hand; a model without batching rules (data-dependent control flow, own random numbers) runs draw by draw.

    Args:
        model: whose forward pass ``run`` makes; remembered with the answer.
        run: outputs ``(N, ...)`` of one draw.
        stacked: what a draw consists of, every tensor with a leading axis of K draws.
        kind: what ``run`` does with the model; the answer is remembered for each.
    """

    def one(k: int) -> Tensor:
        return run({name: value[k] for name, value in stacked.items()})

    known = _VECTORISES.setdefault(original(model), {})
    count = next(iter(stacked.values())).shape[0]
    if count > 1 and not autocasting() and known.get(kind, True):  # autocast does not reach into vmap
        try:
            with QUIET():
                together: Tensor | None = torch.func.vmap(run, randomness="different")(dict(stacked))
        except IncompatiblePair:
            raise
        except (LaplaceKFError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
            together = None
        if together is not None and kind in known:
            return together
        first = one(0)
        if together is not None and same_outputs(together[0].detach(), first.detach()):
            known[kind] = same_outputs(together[-1].detach(), one(count - 1).detach())
            if known[kind]:
                return together
        known[kind] = False
        return torch.stack([first, *(one(k) for k in range(1, count))])
    return torch.stack([one(k) for k in range(count)])
