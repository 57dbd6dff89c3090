"""The gradient of a task's own loss, seen where it is made: before anybody clips, unscales or divides it.

Hooks on the parameters see what every ``backward()`` brings, hooks behind the penalty see its part. What is done to
``.grad`` between that and the optimiser's step is no part of the loss.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, NonFinite

__all__ = ["TaskGradients"]

RECORD = (
    "Record the task's loss, which is exact whatever is done to the gradients: "
    "loss = learner.record(task_loss) + learner.penalty() / N_task"
)
ROUNDING = 64.0  # roundings by which .grad may differ from what was accumulated


class TaskGradients:
    """What the backward passes since the last step brought to some parameters, and what of it is the task's.

    The parameters carry two hooks each for as long as this object lives.

    Args:
        weights: parameters ``(*shape)`` by name.

    Attributes:
        before: the weights at which the gradients of this step were taken, by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self._hooked: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._number = math.nan  # by which losses were divided that were refused
        weakref.finalize(self, _remove, self._handles)
        self.begin(weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskGradients:
        return TaskGradients({name: memo.get(id(weight), weight) for name, weight in self.weights.items()})

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Starts anew at the present weights ``(*shape)`` by name."""
        self.before = {}
        self.follow(weights)
        self.forget()

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Follows these parameters ``(*shape)`` from here on: others than before if some were replaced or frozen."""
        self.weights = dict(weights)
        for name, weight in weights.items():
            if name not in self.before:
                self.before[name] = weight.detach().clone()
        wanted = {name: weight for name, weight in weights.items() if weight.requires_grad}
        if wanted.keys() == self._hooked.keys() and all(self._hooked[n] is w for n, w in wanted.items()):
            return
        _remove(self._handles)
        self._hooked, me = wanted, weakref.ref(self)
        for name, weight in wanted.items():
            self._handles += _watched(weight, name, me)

    def forget(self) -> None:
        """Drops the backward passes seen so far."""
        self._arriving: dict[str, Tensor] = {}
        self._arriving_penalty: dict[str, tuple[int, Tensor]] = {}
        self._ready: dict[str, Tensor] | None = None
        self._touched: set[str] = set()
        self._moved: str | None = None
        self._twice = False
        self._open: tuple[int, Tensor, float] | None = None  # the pass of a recorded loss, its seed and divisor
        self._older, self._latest = _Passes(), _Passes()

    # -- what is seen --------------------------------------------------------------------------------------------------

    def views(self) -> dict[str, Tensor]:
        """The weights ``(*shape)`` behind a view each, whose gradient is the penalty's alone, with whatever factor."""
        found = {}
        for name, weight in self.weights.items():
            view = weight.view_as(weight)
            if view.requires_grad:
                view.register_hook(lambda gradient, name=name: self._from_penalty(name, gradient))
            found[name] = view
        return found

    def record(self, loss: Tensor) -> Tensor:
        """Marks the task's loss, 0-dim, and returns it: gradients count in units of the one that arrives at it."""
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            shape = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise IncompatiblePair(
                f"record(loss) takes the task's loss before backward(), a 0-dim tensor with a gradient; got {shape}"
            )
        divisor = _divisor(loss)
        loss.register_hook(lambda seed: self._from_loss(seed, divisor))
        return loss

    @torch.no_grad()
    def _from_loss(self, seed: Tensor, divisor: float) -> None:
        number = _pass()
        if self._open is not None and self._open[0] == number:
            self._twice = True
        self._open = number, seed.detach().clone(), divisor

        def closed() -> None:
            if self._open is not None and self._open[0] == number:
                self._open = None

        torch.autograd.Variable._execution_engine.queue_callback(closed)

    @torch.no_grad()
    def _from_penalty(self, name: str, gradient: Tensor) -> None:
        number, value = _pass(), gradient.detach()
        held = self._arriving_penalty.get(name)
        self._arriving_penalty[name] = (number, held[1] + value if held is not None and held[0] == number else value)

    def arrives(self, name: str, gradient: Tensor) -> None:
        """A gradient ``(*shape)`` on its way to a parameter, before hooks of others change it."""
        self._arriving[name] = gradient.detach()

    @torch.no_grad()
    def accumulated(self, name: str, weight: Tensor) -> None:
        """It has come into ``.grad (*shape)``; passes of ``torch.autograd.grad`` do not get here."""
        new = self._arriving.pop(name, None)
        if new is None or weight.grad is None:
            return
        new = _dense(new)
        _, part = self._arriving_penalty.pop(name, (0, None))
        if not torch.equal(weight, self.before[name]):
            if name in self._touched:
                self._moved = name
            else:  # changed between steps, by no step
                self.before[name] = weight.detach().clone()
        self._touched.add(name)
        number = _pass() if self._open is None else self._open[0]
        if number != self._latest.number:
            self._older.add(self._latest)
            self._latest = _Passes(number) if self._open is None else _Passes(number, *self._open[1:])
        if (name in self._older.total or name in self._latest.total) and torch.equal(_dense(weight.grad), new):
            self._older = _Passes()  # the gradients were zeroed before this pass
            self._latest.total.pop(name, None)
        self._latest.take(name, new, part)

    # -- what is made of it --------------------------------------------------------------------------------------------

    @property
    def seen(self) -> bool:
        """Whether there was a backward pass since the last step."""
        return bool(self._touched)

    def check(self) -> None:
        """Settles what the gradients are while ``.grad`` still shows it: before something of ours changes it."""
        if self._ready is None and self.seen and not self._by_hand():
            self._ready = self.task()

    @torch.no_grad()
    def task(self) -> dict[str, Tensor]:
        """The gradient ``(*shape)`` of the task's loss by parameter name, of the parameters that have one.

        Raises:
            IncompatiblePair: if it cannot be told from what happened; says what to do.
        """
        if self._ready is not None:
            return self._ready
        if self._moved is not None:
            raise IncompatiblePair(
                f"the weights moved between two backward passes of one step ({self._moved!r}): call after_step() after "
                "every optimizer.step(), and use an optimiser that asks for one gradient a step (LBFGS and other "
                "closures that are called several times have no gradient of the path)"
            )
        self._older.add(self._latest)
        self._latest = _Passes()
        passes = self._older
        if passes.seeds is None:
            return self._unrecorded(passes)
        if self._twice or passes.unrecorded:
            what = "two recorded losses went" if self._twice else "a loss that was not recorded went"
            raise IncompatiblePair(f"{what} into the gradients of this step; record the sum, once a backward pass")
        if not float(passes.seeds):
            raise IncompatiblePair(
                "the recorded loss was multiplied by 0, so that its gradient is not known; leave the factor out"
            )
        self._require_undivided(passes)
        return {name: gradient / passes.seeds.to(gradient) for name, gradient in passes.task.items()}

    def _require_undivided(self, passes: _Passes) -> None:
        """Refuses minibatches whose losses were divided by their number before they were recorded.

        The seeds do not show it, and the gradient of the mean would come out divided once more. The last step of an
        epoch may have fewer minibatches than the loop divides by.
        """
        (divisor, *others) = passes.divisors
        if passes.count > 1 and not others and math.isclose(divisor, passes.count, rel_tol=1e-5):
            self._number = divisor
        if not others and divisor > 1 and math.isclose(divisor, self._number, rel_tol=1e-5):
            raise IncompatiblePair(
                f"the recorded losses were divided by {divisor:.6g} before record(), as many as the minibatches that "
                "go into a step: record the loss itself and divide what record returns, "
                f"loss = learner.record(task_loss) / {divisor:.6g} + learner.penalty() / N_task (a mean over examples "
                'is task_loss.mean(), or reduction="mean")'
            )

    def _unrecorded(self, passes: _Passes) -> dict[str, Tensor]:
        """As accumulated, if that is what the optimiser got, or its mean over the passes."""
        hand = self._by_hand()
        if hand:
            raise IncompatiblePair(
                f"no backward() brought the gradient of {hand!r} that is in .grad; call loss.backward() and "
                "zero_grad() once a step, or give the task's gradients by name: learner.after_step(gradients)"
            )
        grads = {name: self.weights[name].grad for name in passes.total}
        if any(grad is None or not bool(_dense(grad).any()) for grad in grads.values()):
            missing = [n for n, g in grads.items() if g is None or (not _dense(g).any() and passes.total[n].any())]
            if missing:
                raise IncompatiblePair(
                    f"after_step() found no gradient of {missing[0]!r}: call it right after optimizer.step(), before "
                    f"zero_grad(). {RECORD}"
                )
        got = {name: _dense(grad) for name, grad in grads.items() if grad is not None}
        if all(torch.equal(got[name], total) for name, total in passes.total.items()):
            return passes.task
        inner = sum(float((got[n].double() * t.double()).sum()) for n, t in passes.total.items())
        own = sum(float(t.double().square().sum()) for t in passes.total.values())
        factor = inner / own if own else float("nan")
        size = sum(float(g.double().square().sum()) for g in got.values()) ** 0.5
        off = sum(float((got[n].double() - factor * t.double()).square().sum()) for n, t in passes.total.items()) ** 0.5
        eps = ROUNDING * max(torch.finfo(t.dtype).eps for t in passes.total.values())
        if off <= eps * size:
            if abs(factor - 1) <= eps:
                return passes.task
            if passes.count > 1 and abs(factor * passes.count - 1) <= eps:  # divided by their number
                return {name: gradient / passes.count for name, gradient in passes.task.items()}
        how = f"multiplied by {factor:.4g}" if off <= 1e-3 * size else "changed"
        raise IncompatiblePair(
            f"the gradients were {how} between backward() and the step (clipped, unscaled by a GradScaler, divided, "
            f"averaged over processes), so that the gradient of the task's loss is not known. {RECORD}"
        )

    def _by_hand(self) -> str:
        """A parameter with a gradient that came by no backward pass since the last step, or nothing."""
        for name, weight in self.weights.items():
            if weight.grad is not None and name not in self._touched and bool(_dense(weight.grad).any()):
                return name
        return ""

    @torch.no_grad()
    def along(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``−∇L · Δθ (*shape)`` for ``∇L`` by name; parameters that did not move give 0 whatever their gradient.

        Raises:
            NonFinite: for a gradient that is not finite of a weight that moved.
        """
        out = {}
        for name, weight in self.weights.items():
            if name in gradients:
                step = weight.detach() - self.before[name]
                out[name] = torch.where(step == 0, 0, -gradients[name].to(step) * step)
                if not bool(torch.isfinite(out[name]).all()):
                    raise NonFinite(f"the gradient of {name!r} in this step has NaN or infinite entries")
        return out

    def still(self) -> bool:
        """Whether no weight has moved since the gradients were taken (a step that a GradScaler skipped)."""
        return all(torch.equal(weight, self.before[name]) for name, weight in self.weights.items())


class _Passes:
    """Sums over backward passes: all that came, what of it is the task's, and the gradients at recorded losses."""

    def __init__(self, number: int = -1, seed: Tensor | None = None, divisor: float = 1.0) -> None:
        self.number, self.seeds = number, seed
        self.divisors = set() if seed is None else {divisor}  # of the recorded losses
        self.total: dict[str, Tensor] = {}
        self.task: dict[str, Tensor] = {}
        self.count = 0  # passes with something of the task's
        self.unrecorded = False
        self._own = False

    def take(self, name: str, new: Tensor, part: Tensor | None) -> None:
        own = new if part is None else new - part.to(new)
        self._own = self._own or part is None or not torch.equal(new, part.to(new))
        held = self.total.get(name)
        self.total[name] = new.clone() if held is None else held + new
        self.task[name] = own.clone() if held is None else self.task[name] + own

    def add(self, latest: _Passes) -> None:
        if not latest.total:
            return
        for name, new in latest.total.items():
            held = self.total.get(name)
            self.total[name] = new if held is None else held + new
            self.task[name] = latest.task[name] if held is None else self.task[name] + latest.task[name]
        self.count += latest._own
        self.unrecorded = self.unrecorded or (latest._own and latest.seeds is None)
        self.divisors |= latest.divisors
        if latest.seeds is not None:
            self.seeds = latest.seeds if self.seeds is None else self.seeds + latest.seeds


def _watched(weight: Tensor, name: str, of: weakref.ref[TaskGradients]) -> list[Any]:
    def arrives(gradient: Tensor) -> None:
        me = of()
        if me is not None:
            me.arrives(name, gradient)

    def accumulated(weight: Tensor) -> None:
        me = of()
        if me is not None:
            me.accumulated(name, weight)

    first = weight.register_hook(arrives)
    hooks = weight._backward_hooks
    if hooks is not None and len(hooks) > 1:  # ours goes before hooks that clip: they run in the order of insertion
        others = {number: hook for number, hook in hooks.items() if number != first.id}
        for number in others:
            del hooks[number]
        hooks.update(others)
    return [first, weight.register_post_accumulate_grad_hook(accumulated)]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _divisor(loss: Tensor) -> float:
    """The number by which a 0-dim loss was divided, as the last thing that was done to it; 1 if by none."""
    node: Any = loss.grad_fn
    while node is not None and node.name().partition("Backward")[0] in _ALIKE:
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith(("DivBackward", "MulBackward")):
        return 1.0
    divided = node.name().startswith("Div")
    if node.next_functions[1][0] is None:
        number = node._saved_other
    elif not divided and node.next_functions[0][0] is None:
        number = node._saved_self
    else:
        return 1.0
    if number is None or number.numel() != 1 or not float(number):
        return 1.0
    return float(number) if divided else 1.0 / float(number)


_ALIKE = frozenset(["Alias", "Clone", "Reshape", "Squeeze", "ToCopy", "Unsqueeze", "View"])


def _pass() -> int:
    """Number of the backward pass that is running."""
    return int(torch._C._current_graph_task_id())


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach() if gradient.layout == torch.strided else gradient.detach().to_dense()
