"""Which example every row of a layer's output belongs to, from gradients of the examples' outputs.

Back-propagation is linear in its seed, and a power of two changes no digit of a floating-point number. So one backward
pass from all examples, and one for every digit of their numbers (to base 32) with the outputs of every example times 2
to its digit, name the example of a row that belongs to one alone: its gradient is multiplied by exactly that power.
Rows for which that does not hold belong to several examples, or numbers ran out of their range: then the examples whose
binary digit is 1 are asked apart from those whose digit is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_kf.layers.base import flatten_rows
from laplace_kf.tape.backward import backward
from laplace_kf.tape.tape import Call

__all__ = ["Owners", "asked", "copies", "lead", "measured", "sizes"]

BASE = 32  # powers of two from 2^-16 to 2^15, far from the ends of float32 and bfloat16
WORKING = 2**23  # entries of gradients that may exist at once

#: Gradients of calls, ``(D, ...)`` each, for sets of examples ``(D, N)`` or factors of their outputs.
Gradients = Callable[[Sequence[Call], Tensor], "list[Tensor | None]"]


@dataclass(frozen=True)
class Owners:
    """Which example every row of a call belongs to.

    Attributes:
        example: ``(B,)``.
        known: which of them are known, ``(B,)``; no gradient came to the others.
        several: whether some row belongs to several examples.
    """

    example: Tensor
    known: Tensor
    several: bool


def lead(call: Call) -> tuple[int, ...]:
    """The axes of a call's output that enumerate rows; of copies those along which they can differ."""
    if call.source is None:
        return tuple(call.shape[: call.leading])
    return tuple(size for size, own in zip(call.shape, call.aligned, strict=True) if own == 1)


def copies(gradients: Tensor, call: Call) -> Tensor:
    """Gradients ``(V, *shape)`` of the copies of a shared tensor as ``(V, B, entries of the tensor)``: a row a copy."""
    apart = [1 + k for k, own in enumerate(call.aligned) if own == 1]  # none: one copy for all
    moved = gradients.movedim(apart, list(range(1, 1 + len(apart))))
    return moved.reshape(len(gradients), math.prod(lead(call)), -1)


def sizes(grad: Tensor, call: Call, device: torch.device) -> Tensor:
    """Sum of the absolute entries of every row ``(B,)`` of a gradient in the shape of a call's output.

    Zero exactly where no entry is touched. The layer may lie on another device than the outputs.
    """
    grad = grad.reshape(call.shape)
    if call.source is None:
        rows = flatten_rows(grad, call.leading)
    else:
        rows = copies(grad[None], call)[0]
    return (rows.flatten(1).abs().sum(1) if rows.dim() > 1 else rows.abs()).to(device)


def measured(calls: Sequence[Call], outputs: Tensor) -> list[Owners]:
    """Who owns the rows of calls, from ordinary backward passes of the outputs ``(N, ...)``."""
    if not calls:
        return []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape[1:], generator=generator, dtype=torch.float64).to(outputs)
    # examples with the same gradients must not add up to a power of two of them either
    own = (1 + torch.rand(len(outputs), generator=generator, dtype=torch.float64)).to(outputs)

    def gradients(calls: Sequence[Call], factors: Tensor) -> list[Tensor | None]:
        seeds = (factors * own).reshape(*factors.shape, *[1] * (outputs.dim() - 1)) * noise
        return backward(outputs, [call.edge for call in calls], [call.shape.numel() for call in calls], seeds)

    count, device = len(outputs), outputs.device
    number = torch.arange(count, device=device)
    places = max(1, math.ceil(math.log(count, BASE) - 1e-9))
    digits = torch.stack([number // BASE**place % BASE for place in range(places)])
    factors = torch.cat([outputs.new_ones(1, count), _powers(outputs)[digits]])
    found: list[Owners | None] = []
    wholes: list[Tensor | None] = []
    for call, rows in zip(calls, _passed_back(calls, outputs, gradients, factors), strict=True):
        wholes.append(None if rows is None else rows[0])
        found.append(_named(call, rows, count, device))
    unsure = [k for k, each in enumerate(found) if each is None]
    again = asked([calls[k] for k in unsure], outputs, gradients, [wholes[k] for k in unsure])
    for k, each in zip(unsure, again, strict=True):
        found[k] = each
    return [each for each in found if each is not None]


def _named(call: Call, rows: Tensor | None, count: int, device: torch.device) -> Owners | None:
    """The owners of rows of sizes ``(1 + D, B)``, if every row is that of one example times a power of two."""
    if rows is None:
        nobody = torch.zeros(math.prod(lead(call)), dtype=torch.long, device=device)
        return Owners(nobody, nobody > 0, False)
    whole, scaled = rows[0], rows[1:]
    known = whole != 0
    digit = torch.where(known, scaled / whole, torch.ones_like(whole)).log2().round() + BASE // 2
    inside = (digit >= 0) & (digit < BASE)  # not NaN or infinite ones
    digit = torch.where(inside, digit, torch.zeros_like(digit)).long()
    exact = inside & (_powers(whole)[digit] * whole == scaled)
    example = (digit * BASE ** torch.arange(len(digit), device=device)[:, None]).sum(0)
    if not bool(torch.where(known, exact.all(0) & (example < count), (scaled == 0).all(0)).all()):
        return None
    return Owners(torch.where(known, example, torch.zeros_like(example)), known, False)


def _powers(like: Tensor) -> Tensor:
    """The powers of two that stand for the digits, exactly."""
    return torch.tensor([2.0**k for k in range(-BASE // 2, BASE // 2)], dtype=like.dtype, device=like.device)


def asked(
    calls: Sequence[Call], outputs: Tensor, gradients: Gradients, wholes: Sequence[Tensor | None] = ()
) -> list[Owners]:
    """Who owns the rows of calls, asked for every binary digit of the examples' numbers.

    A row belongs to examples whose digit is 1 if both they and all examples give it the same gradient, and to several
    if it has another one from those whose digit is 0, which is then asked for. It ends early where every call has rows
    of several.

    Args:
        calls: which.
        outputs: of the network, ``(N, ...)``.
        gradients: as :data:`Gradients`, of sets of examples.
        wholes: the sizes ``(B,)`` of the rows' gradients from all examples, where known.
    """
    if not calls:
        return []
    count, device = outputs.shape[0], outputs.device
    number = torch.arange(count, device=device)
    totals = [math.prod(lead(call)) for call in calls]
    example = [torch.zeros(total, dtype=torch.long, device=device) for total in totals]
    several = [False] * len(calls)

    def passed_back(examples: Tensor) -> list[Tensor | None]:
        found = _passed_back(calls, outputs, gradients, examples[None].to(outputs.dtype))
        return [None if rows is None else rows[0] for rows in found]

    every = wholes or passed_back(number >= 0)
    known = [
        torch.zeros(total, dtype=torch.bool, device=device) if rows is None else rows != 0
        for total, rows in zip(totals, every, strict=True)
    ]
    for digit in range(max(1, (count - 1).bit_length())):
        if all(several):
            break
        ones = (number >> digit) % 2 == 1
        others: list[Tensor | None] | None = None
        for k, (rows, whole) in enumerate(zip(passed_back(ones), every, strict=True)):
            if rows is None or whole is None:
                continue
            one = rows != 0
            if bool((one & (rows != whole)).any()):
                others = passed_back(~ones) if others is None else others
                zero = others[k]
                several[k] = several[k] or zero is None or bool((one & (zero != 0)).any())
            example[k] += one.long() << digit
            known[k] |= one
    return [Owners(*each) for each in zip(example, known, several, strict=True)]


def _passed_back(calls: Sequence[Call], outputs: Tensor, gradients: Gradients, factors: Tensor) -> list[Tensor | None]:
    """Sizes of the rows ``(D, B)`` of every call for factors ``(D, N)``; ``None`` where nothing arrived."""
    found: list[list[Tensor]] = [[] for _ in calls]
    met = [False] * len(calls)
    for some in factors.split(max(1, WORKING // sum(call.shape.numel() for call in calls))):
        for k, (grads, call) in enumerate(zip(gradients(calls, some), calls, strict=True)):
            met[k] |= grads is not None
            none = outputs.new_zeros(math.prod(lead(call)))
            found[k] += [none] * len(some) if grads is None else [sizes(grad, call, outputs.device) for grad in grads]
    return [torch.stack(rows) if there else None for rows, there in zip(found, met, strict=True)]
