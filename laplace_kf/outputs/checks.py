"""Refusals of targets and outputs, with what was found and what is allowed; and whether outputs are others again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_kf.errors import InvalidTarget, NonFinite, ShapeMismatch

__all__ = [
    "COARSE",
    "NonFiniteTarget",
    "allowed",
    "known_false",
    "known_finite",
    "known_true",
    "refuse_nonfinite",
    "refuse_nonfinite_parameters",
    "refuse_shape",
    "refuse_values",
    "same_outputs",
]

COARSE = 1e-4  # relative roundings above it are those of half precision


class NonFiniteTarget(NonFinite, ValueError):
    """NaN or infinity among the targets: both a :class:`~laplace_kf.errors.NonFinite` and a ``ValueError``."""


def allowed(rounding: float) -> float:
    """The relative difference that rounding may make of numbers that should agree, given that of their type.

    Half of the digits; those of bfloat16 would let anything agree, so that of half precision it is a few roundings.
    """
    return 10 * rounding**0.5 if rounding < COARSE else 16 * rounding


def same_outputs(found: Tensor, wanted: Tensor) -> bool:
    """Whether a forward pass gave again the outputs ``(N, ...)`` of another one, up to rounding (:func:`allowed`)."""
    if found.shape != wanted.shape:
        return False
    gap = allowed(torch.finfo(wanted.dtype).eps) * wanted.abs().max() if wanted.numel() else 0.0
    return not wanted.numel() or bool((found - wanted).abs().max() <= gap)


def known_true(condition: Tensor) -> bool:
    """Truth of a 0-dim tensor; False where it cannot be known, i.e. inside ``torch.func.vmap``."""
    try:
        return bool(condition)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return False


def known_false(condition: Tensor) -> bool:
    """Whether a 0-dim tensor is known to be False, which it is not inside ``torch.func.vmap``."""
    return known_true(~condition)


def known_finite(tensor: Tensor) -> bool:
    """Whether all entries (of any shape) are finite, by one cheap pass; not whenever they are."""
    try:
        return math.isfinite(tensor.detach().sum())
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return False


def refuse_values(who: str, targets: Tensor, bad: Tensor, allowed: str) -> None:
    """Raises :class:`InvalidTarget` naming the first target where ``bad (of their shape)`` holds, and ``allowed``."""
    if known_true(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise InvalidTarget(f"{who}: target {targets[index].item()} at index {index} is outside {allowed}.")


def refuse_nonfinite(who: str, targets: Tensor) -> None:
    """Raises :class:`NonFiniteTarget` if any target, of whatever shape, is NaN or infinite."""
    if targets.is_floating_point() and not known_finite(targets) and known_true((~torch.isfinite(targets)).any()):
        bad = ~torch.isfinite(targets)
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteTarget(f"{who}: target {targets[index].item()} at index {index} is not finite.")


def refuse_shape(who: str, shape: Sequence[int], targets: Tensor, *expected: Sequence[int]) -> None:
    """Raises :class:`ShapeMismatch` with both shapes unless the targets have one of the ``expected`` shapes.

    And :class:`InvalidTarget` for complex ones.
    """
    if targets.is_complex():
        raise InvalidTarget(
            f"{who}: targets are complex ({targets.dtype}), and likelihoods are of real ones; put the two parts side "
            "by side, torch.view_as_real(targets).flatten(1), and those of the outputs likewise"
        )
    found = tuple(targets.shape)
    if found not in {tuple(e) for e in expected}:
        hint = ""
        if (len(expected[0]) == 2 and expected[0][1] == 1 and found == tuple(expected[0][:1])) or (
            len(expected[0]) > 2 and any(tuple(e) == (*found[:1], 1, *found[1:]) for e in expected)
        ):
            hint = " Use targets[:, None]."
        elif found and found[-1] == 1 and found[:-1] in {tuple(e) for e in expected}:
            hint = " Use targets.squeeze(-1)."
        elif _is_coarser(shape, found):
            hint = (
                " The outputs are coarser than the targets: forward=lambda model, batch: (torch.nn.functional."
                f"interpolate(model(batch[0]), size={found[1:]}, mode='bilinear'), batch[1]) (of a mapping batch, "
                'model(pixel_values=batch["pixel_values"]).logits and batch["labels"]).'
            )
        allowed = " or ".join(str(tuple(e)) for e in expected)
        raise ShapeMismatch(
            f"{who}: targets of shape {found} do not fit outputs of shape {tuple(shape)}; expected {allowed}.{hint}"
        )


def _is_coarser(shape: Sequence[int], found: Sequence[int]) -> bool:
    """Whether targets ``(N, H, W)`` have whole multiples of the sizes of outputs ``(N, C, h, w)``."""
    if len(shape) != 4 or len(found) != 3 or found[0] != shape[0]:
        return False
    return all(fine > coarse and fine % coarse == 0 for fine, coarse in zip(found[1:], shape[2:], strict=True))


def refuse_nonfinite_parameters(who: str, parameter: Tensor) -> None:
    """Raises :class:`NonFinite` for parameters (of any shape) no sample can be drawn from.

    On a GPU they would abort the process.
    """
    if not bool(torch.isfinite(parameter).all()):
        raise NonFinite(f"{who}: the outputs give non-finite distribution parameters; no targets can be drawn.")
