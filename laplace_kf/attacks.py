"""Gradient attacks on predictive distributions (methods 10.3; Ritter et al. in Botev 2020, 5.2.3).

An attack looks at the prediction that is attacked, so gradients flow through the average over weights: ``predict`` is
any callable ``x -> Prediction`` that is differentiable in ``x``: ``posterior.predict`` with any method,
:func:`laplace_kf.predictive.mc_dropout`, a mixture of posteriors, or a function of one's own. A predictive that draws
anew in every call should be given its random numbers (``generator=`` made inside), so that steps see one function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Prediction

__all__ = ["fgsm", "targeted"]

Predict = Callable[[Tensor], Prediction]


@explained
def fgsm(
    predict: Predict,
    x: Tensor,
    epsilon: float,
    ranges: float | Tensor | None = None,
    clip: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """One step away from the predicted class (untargeted fast gradient sign method; methods 10.3).

    ``x − ε · ranges · sign(∇_x max_y log p(y | x))``: the true label is not used.

    Args:
        predict: ``x -> Prediction`` with class probabilities, differentiable in ``x``.
        x: inputs ``(N, ...)``, floating.
        epsilon: size of the step, in units of ``ranges``.
        ranges: max − min of every input dimension over the data, a number or broadcastable to ``x``; default 1. A
            dimension that is constant (range 0) is not changed.
        clip: ``(low, high)``, numbers or broadcastable to ``x``; default: no bounds.

    Returns:
        ``(N, ...)``: the attacked inputs.

    Raises:
        IncompatiblePair: if the prediction is not one of classes, or carries no gradient to ``x``.
        ShapeMismatch: for inputs that are not floating, or ranges and bounds that do not fit them.
    """
    scale, low, high = _settings(x, ranges, clip)
    _require_number("epsilon", epsilon)
    gradient = _gradient(predict, x, lambda probs: probs.amax(-1))
    return _clipped(x.detach() - epsilon * scale * gradient.sign(), low, high)


@explained
def targeted(
    predict: Predict,
    x: Tensor,
    target: int | Tensor,
    step: float,
    steps: int,
    ranges: float | Tensor | None = None,
    clip: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """Several steps towards a fixed class (targeted iterative attack; methods 10.3).

    ``x ← x + step · ranges · sign(∇_x log p(target | x))``, ``steps`` times. Inputs of the target class are to be left
    out by the caller.

    Args:
        predict, x, ranges, clip: as for :func:`fgsm`.
        target: the class to be reached, one for all or ``(N,)``.
        step: size of a step, in units of ``ranges``.
        steps: how many.

    Returns:
        ``(N, ...)``: the inputs after the last step.

    Raises:
        IncompatiblePair: as for :func:`fgsm`; for a ``steps`` that is no whole number, or a negative one.
        ShapeMismatch: as for :func:`fgsm`; for a target that does not exist.
    """
    scale, low, high = _settings(x, ranges, clip)
    _require_number("step", step)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise IncompatiblePair(f"steps must be a whole number of at least 0, got {steps!r}")
    wanted = torch.as_tensor(target, device=x.device)
    if wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.shape not in ((), x.shape[:1]):
        raise ShapeMismatch(
            f"target must be a class, an integer or integers of shape ({len(x)},), got {tuple(wanted.shape)} of "
            f"{wanted.dtype}"
        )
    wanted = wanted.long().expand(len(x))

    def chosen(probs: Tensor) -> Tensor:
        classes = probs.shape[-1]
        if bool(((wanted < 0) | (wanted >= classes)).any()):
            raise ShapeMismatch(
                f"target {wanted.unique().tolist()} must be a class of the prediction, 0 to {classes - 1}"
            )
        index = wanted.to(probs.device).reshape(-1, *[1] * (probs.dim() - 1))
        return probs.gather(-1, index.expand(*probs.shape[:-1], 1))[..., 0]

    attacked = x.detach().clone()
    for _ in range(steps):
        attacked = _clipped(attacked + step * scale * _gradient(predict, attacked, chosen).sign(), low, high)
    return attacked


def _gradient(predict: Predict, x: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """``∇_x log pick(p)`` of every example, of the shape of ``x (N, ...)``; positions of an example are added up."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        prediction = predict(leaf)
        probs = prediction.channel_last(_probabilities(prediction))
        if probs.shape[0] != x.shape[0]:
            raise ShapeMismatch(
                f"predict gave {probs.shape[0]} predictions for {x.shape[0]} inputs; it has to return one for every "
                "row of x"
            )
        if not probs.requires_grad:
            raise IncompatiblePair(
                "the prediction carries no gradient to its input: predict must be differentiable in x (no no_grad, "
                "detach or numpy inside)"
            )
        if probs.shape[-1] == 1:  # the probability of 1 alone
            probs = torch.cat([1 - probs, probs], -1)
        elif bool(((probs.detach().sum(-1) - 1).abs() > 1e-3).any()):
            raise IncompatiblePair(
                f"the {probs.shape[-1]} probabilities of an input do not sum to 1: they are of independent binary "
                "outputs, which have no predicted class; attack one of them with a predict that returns its "
                "probability alone, (N, 1)"
            )
        chosen = pick(probs).clamp_min(torch.finfo(probs.dtype).tiny).log()
        (gradient,) = torch.autograd.grad(chosen.sum(), leaf, allow_unused=True)
    if gradient is None:
        raise IncompatiblePair("the prediction does not depend on its input, so there is nothing to attack")
    return gradient.detach()


def _probabilities(prediction: Any) -> Tensor:
    probs = getattr(prediction, "probs", None)
    if not isinstance(probs, Tensor):
        raise IncompatiblePair(
            f"predict must return a Prediction of classes, with probs (N, C), got {type(prediction).__name__} "
            "without: regressions have no predicted class"
        )
    return probs


def _require_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 <= float(value) < float("inf"):
        raise IncompatiblePair(f"{name} must be finite and not negative, got {value!r}")


def _settings(
    x: Tensor, ranges: float | Tensor | None, clip: tuple[float | Tensor, float | Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ShapeMismatch(
            f"x must be a floating tensor (N, ...), got {what}; attack the embeddings of tokens instead"
        )
    scale = _fitting("ranges", x, 1.0 if ranges is None else ranges)
    if not bool(((scale >= 0) & torch.isfinite(scale)).all()):
        raise IncompatiblePair("ranges (max − min of every input dimension) must be finite and not negative")
    if clip is None:
        return scale, None, None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ShapeMismatch("clip must be a pair (low, high)")
    low, high = _fitting("clip", x, clip[0]), _fitting("clip", x, clip[1])
    if bool((low > high).any()):
        raise IncompatiblePair("clip=(low, high) needs low <= high")
    return scale, low, high


def _fitting(name: str, x: Tensor, value: float | Tensor) -> Tensor:
    found = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    try:
        fits = torch.broadcast_shapes(found.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeMismatch(
            f"{name} of shape {tuple(found.shape)} cannot be broadcast to x of shape {tuple(x.shape)}; give a "
            "number, or one per example or entry"
        )
    return found


def _clipped(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    if low is None or high is None:
        return x
    return torch.minimum(torch.maximum(x, low), high)
