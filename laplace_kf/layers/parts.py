"""Fused functions that are made of functions with rules: what the tape runs in their place.

Attention (``F.multi_head_attention_forward``) runs as its own Python body, whose projections are ``F.linear`` calls on
rows of the packed weight. Recurrent layers (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``) run cell by cell, so that a weight is
one Kronecker block whose positions are the time steps (methods 4.5: sum in A, mean in G). Both give the fused
function's values; packed sequences keep the fused function, and with it per-example gradients. Bags of embeddings run
as lookups and a sum, mean or maximum (:mod:`laplace_kf.lookups`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_kf.lookups import plain

__all__ = ["PARTS"]

Body = Callable[..., Any]
Parts = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], "Body | None"]

PARTS: dict[Callable[..., Any], Parts] = {}


def _attention(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Body | None:
    """The function's own body, without its first line, which would hand the call back to the tape."""
    code = getattr(function, "__code__", None)
    if code is None or "has_torch_function" not in code.co_names:
        return None
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _rnn(x: Tensor, h: Tensor, w: Sequence[Tensor | None], squash: Callable[[Tensor], Tensor]) -> Tensor:
    return squash(x + F.linear(h, *w[2:]))  # type: ignore[arg-type]


def _gru(x: Tensor, h: Tensor, w: Sequence[Tensor | None]) -> Tensor:
    (r, z, n), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, *w[2:]).chunk(3, -1)  # type: ignore[arg-type]
    update = torch.sigmoid(z + hz)
    return (1 - update) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + update * h


def _direction(
    steps: Tensor, weights: Sequence[Tensor | None], step: Callable[[Tensor, Any, Sequence[Tensor | None]], Any],
    state: Any, backwards: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """One layer in one direction: ``steps (T, N, I)`` to outputs ``(T, N, H)`` and the last state."""
    projected = F.linear(steps, weights[0], weights[1])  # type: ignore[arg-type]
    order = range(projected.shape[0])[::-1] if backwards else range(projected.shape[0])
    outputs: dict[int, Tensor] = {}
    for t in order:
        state = step(projected[t], state, weights)
        outputs[t] = state[0] if isinstance(state, tuple) else state
    return torch.stack([outputs[t] for t in sorted(outputs)]), state


def _layers(
    steps: Tensor, states: Sequence[Any], weights: Sequence[Tensor], biases: bool, directions: int, step: Any, each: int
) -> tuple[Tensor, list[Any]]:
    """All layers: ``steps (T, N, I)``, one state and ``each`` weights for every layer and direction."""
    last = []
    for layer in range(len(states) // directions):
        found = []
        for direction in range(directions):
            k = layer * directions + direction
            own: list[Tensor | None] = list(weights[k * each : (k + 1) * each])
            if biases:
                own = [own[0], own[2], own[1], own[3], *own[4:]]
            else:
                own = [own[0], None, own[1], None, *own[2:]]
            outputs, state = _direction(steps, own, step, states[k], direction == 1)
            found.append(outputs)
            last.append(state)
        steps = torch.cat(found, -1) if directions == 2 else found[0]
    return steps, last


_ARGUMENTS = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _recurrent(cell: Callable[[Tensor, Any, Sequence[Tensor | None]], Any], states: int) -> Parts:
    """Parts of a recurrent function with ``states`` state tensors and the given cell."""

    def parts(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Body | None:
        call = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        whole = set(call) == set(_ARGUMENTS) and isinstance(call["has_biases"], bool)
        if not whole or call["input"].dim() != 3 or (call["dropout"] and call["train"]):
            return None  # a packed sequence, or dropout between layers

        def body(*_: Any, **__: Any) -> Any:
            steps = call["input"].transpose(0, 1) if call["batch_first"] else call["input"]
            start: Any = call["hx"] if states == 2 else (call["hx"],)
            if states == 2:
                initial: list[Any] = list(zip(start[0].unbind(0), start[1].unbind(0), strict=True))
            else:
                initial = list(start[0].unbind(0))
            each = len(call["params"]) // len(initial)
            directions = 2 if call["bidirectional"] else 1
            outputs, last = _layers(steps, initial, call["params"], call["has_biases"], directions, cell, each)
            outputs = outputs.transpose(0, 1) if call["batch_first"] else outputs
            if states == 2:
                return outputs, torch.stack([s[0] for s in last]), torch.stack([s[1] for s in last])
            return outputs, torch.stack(last)

        return body

    return parts


def _lstm(x: Tensor, state: tuple[Tensor, Tensor], w: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x + F.linear(h, w[2], w[3])).chunk(4, -1)  # type: ignore[arg-type]
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (F.linear(h, w[4]) if len(w) > 4 else h), c  # type: ignore[arg-type]


def _lookup(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Body | None:
    """A lookup as the function that it is, where autograd is told something else of it."""
    instead = plain(function, args, kwargs)
    return None if instead is None else lambda *_, **__: instead()


PARTS[F.embedding] = PARTS[F.embedding_bag] = _lookup
PARTS[F.multi_head_attention_forward] = _attention
PARTS[torch.lstm] = _recurrent(_lstm, 2)
PARTS[torch.gru] = _recurrent(_gru, 1)
PARTS[torch.rnn_tanh] = _recurrent(lambda x, h, w: _rnn(x, h, w, torch.tanh), 1)
PARTS[torch.rnn_relu] = _recurrent(lambda x, h, w: _rnn(x, h, w, torch.relu), 1)


def _single(cell: Callable[[Tensor, Any, Sequence[Tensor | None]], Any]) -> Parts:
    """Parts of a recurrent cell: ``(input (N, I), state, w_ih, w_hh, b_ih, b_hh)``."""

    def parts(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Body | None:
        if len(args) != 6 or kwargs or args[0].dim() != 2:
            return None

        def body(x: Tensor, state: Any, w: Tensor, recurrent: Tensor, b: Tensor | None, c: Tensor | None) -> Any:
            state = tuple(state) if isinstance(state, (list, tuple)) else state
            return cell(F.linear(x, w, b), state, [w, b, recurrent, c])

        return body

    return parts


PARTS[torch.lstm_cell] = _single(_lstm)
PARTS[torch.gru_cell] = _single(_gru)
PARTS[torch.rnn_tanh_cell] = _single(lambda x, h, w: _rnn(x, h, w, torch.tanh))
PARTS[torch.rnn_relu_cell] = _single(lambda x, h, w: _rnn(x, h, w, torch.relu))
