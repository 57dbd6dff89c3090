"""Methods with one learning rate for each weight that came before: baselines for the curvature of this package.

They are ``torch.optim.Optimizer`` s over parameters, as SGD is: call ``loss.backward()``, then ``step()``. Those that
multiply by a curvature matrix take the product with it, on the same minibatch::

    product = partial(lk.curvature.ggn_vector_product, model, "categorical", (x, y))
    optimizer.step(product=product)

R-prop is ``torch.optim.Rprop``; powers of a diagonal curvature are :func:`laplace_kf.optim.diagonal`. Source: Martens
2016, sections 3.3.3 to 3.4.5, and the papers named there (methods 8.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, InvalidType, ShapeMismatch, UnknownName
from laplace_kf.models import lasting

__all__ = ["SGDQN", "AdaptiveRates", "MatrixMomentum", "StochasticMetaDescent"]

Closure = Callable[[], Any]
Product = Callable[[Tensor], Tensor]
RATE_RULES = ("sign", "product")
SECANT_RULES = ("average", "sum")


class Range(NamedTuple):
    """From ``least``, itself allowed or not, to below or at ``most``."""

    least: float
    least_too: bool
    most: float = math.inf
    most_too: bool = False

    def has(self, value: Any) -> bool:
        """Whether a number is inside; what is no number is not."""
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
            return False
        above = value > self.least or (self.least_too and value == self.least)
        return above and (value < self.most or (self.most_too and value == self.most))

    def __str__(self) -> str:
        left, right = "[" if self.least_too else "(", "]" if self.most_too else ")"
        return f"{left}{self.least:g}, {self.most:g}{right}"


ABOVE_ZERO, FROM_ZERO = Range(0, False), Range(0, True)
SHARE, WHOLE_SHARE = Range(0, True, 1), Range(0, True, 1, True)


def _require(**given: tuple[Any, Range]) -> None:
    for name, (value, allowed) in given.items():
        if not allowed.has(value):
            raise IncompatiblePair(f"{name} must be in {allowed}, got {value!r}")


class Rates(torch.optim.Optimizer):
    """What these methods share: a closure that is run with gradients, and weights as one vector ``(P,)``."""

    @lasting()
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update from the gradients in ``.grad``.

        Args:
            closure: evaluates the loss, calls ``backward()`` and returns the loss; ``None`` where that is done.

        Returns:
            The closure's loss, or ``None``.
        """
        loss = self._evaluated(closure)
        for group, p, grad in self._moving():
            self._update(group, p, grad, self.state[p])
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        raise InvalidType(f"{type(self).__name__} has no update of a single parameter")

    @staticmethod
    def _evaluated(closure: Closure | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _moving(self) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and gradient of each parameter that has one."""
        return [(g, p, p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None]

    def _of(self, p: Tensor, name: str, first: float) -> Tensor:
        """What is kept of a parameter, or where it starts; nothing is stored by asking."""
        held = self.state[p].get(name) if p in self.state else None
        return torch.full_like(p, first) if held is None else held

    def _multiplied(self, product: Product, parts: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([part.reshape(-1) for part in parts])
        found = product(flat)
        if not isinstance(found, Tensor) or found.shape != flat.shape:
            raise ShapeMismatch(
                f"the product must return a tensor {tuple(flat.shape)}, one number for each weight of this optimiser "
                f"in its order, got {tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        pieces = found.split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


class AdaptiveRates(Rates):
    """A rate for each weight that grows while its gradient keeps its sign (Martens 2016, 3.3.3, equations 3.1, 3.2).

    ``"sign"`` (Silva and Almeida 1990) multiplies the rate by ``up`` where successive gradients agree in sign and by
    ``down`` elsewhere. ``"product"`` (Almeida et al. 1998) multiplies it by ``1 + α g g₋ / v``, not below a half, where
    ``v`` is a running average of ``g²``; ``g₋`` is the gradient of the step before.

    Args:
        params: parameters or groups of them.
        lr: the first rate of every weight, ``> 0``.
        rule: ``"sign"`` or ``"product"``.
        up: ``> 1``.
        down: in ``(0, 1)``; default ``1 / up``, the only choice whose rates neither die nor explode with gradients of
            minibatches.
        alpha: α of ``"product"``, ``>= 0``.
        decay: of ``v``, in ``[0, 1)``.
        momentum: μ in ``θ ← θ − P g + μ (θ − θ₋)``, in ``[0, 1)``.

    Raises:
        IncompatiblePair: for a number outside its range.
        UnknownName: for another rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rule: str = "sign",
        *,
        up: float = 1.1,
        down: float | None = None,
        alpha: float = 0.1,
        decay: float = 0.95,
        momentum: float = 0.0,
    ) -> None:
        if rule not in RATE_RULES:
            raise UnknownName("rule of adaptive rates", rule, RATE_RULES)
        _require(lr=(lr, ABOVE_ZERO), up=(up, Range(1, False)), alpha=(alpha, FROM_ZERO))
        _require(decay=(decay, SHARE), momentum=(momentum, SHARE))
        down = 1 / up if down is None else down
        _require(down=(down, Range(0, False, 1)))
        super().__init__(
            params,
            {"lr": lr, "rule": rule, "up": up, "down": down, "alpha": alpha, "decay": decay, "momentum": momentum},
        )

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        if not state:
            state.update(rates=torch.full_like(p, group["lr"]), square=grad.square(), moved=torch.zeros_like(p))
        else:
            agreement = grad * state["gradient"]
            state["square"] = state["square"].lerp(grad.square(), 1 - group["decay"])
            if group["rule"] == "sign":
                factor = torch.full_like(p, group["up"]).masked_fill_(agreement < 0, group["down"])
            else:
                ratio = agreement / state["square"].clamp_min(torch.finfo(p.dtype).tiny)
                factor = (1 + group["alpha"] * ratio).clamp_min_(0.5)
            state["rates"] = state["rates"] * factor
        state["gradient"] = grad.clone()
        state["moved"] = group["momentum"] * state["moved"] - state["rates"] * grad
        p += state["moved"]


class MatrixMomentum(Rates):
    """The step itself descends the quadratic model: ``δ ← δ − η (α g + B δ)``, then ``θ ← θ + δ`` (Martens 2016, 3.6).

    Args:
        params: parameters or groups of them.
        lr: η, below 2 over the largest eigenvalue of B; ``> 0``.
        alpha: α, the rate of the Newton step that δ tends to, ``> 0``.

    Raises:
        IncompatiblePair: for a number outside its range, or groups with settings of their own.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, alpha: float = 1.0) -> None:
        _require(lr=(lr, ABOVE_ZERO), alpha=(alpha, ABOVE_ZERO))
        super().__init__(params, {"lr": lr, "alpha": alpha})

    @lasting()
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, product: Product | None = None) -> Any:
        """One update.

        Args:
            closure: as of SGD.
            product: from a vector ``(P,)`` over the weights of this optimiser, in its order, to ``B v (P,)`` at the
                weights as they are.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            IncompatiblePair: without a product.
            ShapeMismatch: if it does not return ``(P,)``.
        """
        asked = _needed(product)
        loss = self._evaluated(closure)
        moving = self._moving()
        if not moving:
            return loss
        steps = [self._of(p, "step", 0.0) for _, p, _ in moving]
        curved = self._multiplied(asked, steps)
        for (group, p, grad), step, bent in zip(moving, steps, curved, strict=True):
            p += step
            self.state[p]["step"] = step - group["lr"] * (group["alpha"] * grad + bent)
        return loss


class StochasticMetaDescent(Rates):
    """Gradient descent on the log of the rates through the whole history of steps (Martens 2016, 3.8 to 3.10).

    With rates ``p`` and the derivative ``v`` of the weights by ``log p``: ``v ← λ v − p (g + λ G v)``,
    ``θ ← θ − p g``; before each step but the first ``p ← p · max(e^{−μ v g}, ½)``.

    Args:
        params: parameters or groups of them.
        lr: first rate of every weight, ``> 0``.
        meta: μ, ``>= 0``.
        forgetting: λ, in ``[0, 1]``; with 0 it looks back one step only and needs no product.

    Raises:
        IncompatiblePair: for a number outside its range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, meta: float = 0.05, forgetting: float = 0.99) -> None:
        _require(lr=(lr, ABOVE_ZERO), meta=(meta, FROM_ZERO), forgetting=(forgetting, WHOLE_SHARE))
        super().__init__(params, {"lr": lr, "meta": meta, "forgetting": forgetting})

    @lasting()
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, product: Product | None = None) -> Any:
        """One update; arguments and errors as of :meth:`MatrixMomentum.step`, ``product`` with G.

        Args:
            closure: as of SGD.
            product: from ``v (P,)`` to ``G v (P,)``; not needed where ``forgetting`` is 0.

        Returns:
            The closure's loss, or ``None``.
        """
        remembering = any(group["forgetting"] > 0 for group in self.param_groups)
        asked = _needed(product) if remembering else None
        loss = self._evaluated(closure)
        moving = self._moving()
        if not moving:
            return loss
        traces = [self._of(p, "trace", 0.0) for _, p, _ in moving]
        curved = traces if asked is None else self._multiplied(asked, traces)
        for (group, p, grad), trace, bent in zip(moving, traces, curved, strict=True):
            state, keep = self.state[p], group["forgetting"]
            rates = self._of(p, "rates", group["lr"])
            state["rates"] = rates * (-group["meta"] * trace * grad).exp().clamp_min(0.5)
            state["trace"] = keep * trace - state["rates"] * (grad + keep * bent)
            p -= state["rates"] * grad
        return loss


class SGDQN(Rates):
    """SGD with a diagonal inverse curvature from secant equations (Bordes et al. 2009, 2010; Martens 2016, 3.4.5).

    After a step ``s`` the gradient is evaluated again; ``y`` is its change. ``"average"`` keeps a running average of
    ``s / y`` with weight ``1 / (k + 2)`` at step k, ``"sum"`` adds ``y / s`` to the inverse of the rates; each
    contribution is clamped into the range that ``bounds`` give the ratio ``s / y``.

    Args:
        params: parameters or groups of them.
        lr: first rate of every weight, ``> 0``.
        rule: ``"average"`` or ``"sum"``.
        bounds: smallest and largest ``s / y``, both ``> 0``; default ``lr / 100`` and ``lr · 100``.

    Raises:
        IncompatiblePair: for a number outside its range.
        UnknownName: for another rule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        rule: str = "average",
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        if rule not in SECANT_RULES:
            raise UnknownName("rule of SGD-QN", rule, SECANT_RULES)
        _require(lr=(lr, ABOVE_ZERO))
        least, most = bounds = (lr / 100, lr * 100) if bounds is None else bounds
        _require(**{"bounds[0]": (least, ABOVE_ZERO), "bounds[1]": (most, Range(least, True))})
        super().__init__(params, {"lr": lr, "rule": rule, "bounds": bounds})

    @lasting()
    @torch.no_grad()
    def step(self, closure: Closure | None = None, *, following: Closure | None = None) -> Any:
        """One update and one of the rates.

        Args:
            closure: evaluates the loss of the minibatch, calls ``backward()`` and returns the loss. It is called before
                and after the step, and so has to clear the gradients.
            following: the same of the next minibatch, for secant equations without bias (Bordes et al. 2010); it is
                called before and after the step in place of the second call of ``closure``.

        Returns:
            The first loss. ``.grad`` holds that of the last call.

        Raises:
            IncompatiblePair: without a closure.
        """
        if closure is None:
            raise IncompatiblePair(
                "SGD-QN evaluates the gradient before and after a step: pass optimizer.step(closure), a function that "
                "calls optimizer.zero_grad(), computes the loss, calls loss.backward() and returns the loss"
            )
        asked = closure if following is None else following
        loss = self._evaluated(closure)
        own = [(group, p, grad.clone()) for group, p, grad in self._moving()]
        before = {p: grad for _, p, grad in own}
        if following is not None:
            self._evaluated(following)
            before = {p: grad.clone() for _, p, grad in self._moving()}
        moved = {}
        for group, p, grad in own:
            rates = self.state[p].setdefault("rates", torch.full_like(p, group["lr"]))
            moved[p] = -rates * grad
            p += moved[p]
        self._evaluated(asked)
        for group, p, grad in self._moving():
            if p in moved and p in before:
                self._learn(group, self.state[p], moved[p], grad - before[p])
        return loss

    @staticmethod
    def _learn(group: dict[str, Any], state: dict[str, Any], step: Tensor, change: Tensor) -> None:
        """Rates from a step and the change of the gradient; a weight that did not move teaches nothing."""
        least, most = group["bounds"]
        curvature = (change / step).nan_to_num(nan=1 / most).clamp(1 / most, 1 / least)
        k = state["count"] = state.get("count", -1) + 1
        if group["rule"] == "average":
            found = state["rates"].lerp(1 / curvature, 1 / (k + 2))
        else:
            found = 1 / (1 / state["rates"] + curvature)
        state["rates"] = torch.where(step == 0, state["rates"], found)


def _needed(product: Product | None) -> Product:
    if product is None:
        raise IncompatiblePair(
            "this method multiplies by a curvature matrix: pass the product, for example "
            'step(product=functools.partial(lk.curvature.ggn_vector_product, model, "categorical", (x, y)))'
        )
    return product
