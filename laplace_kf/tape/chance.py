"""Whether a model is a function in eval mode: that it draws nothing, and that no pass hangs on earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from laplace_kf.batches import map_examples, tensors_of
from laplace_kf.callers import warn_user
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.memory import storage_of
from laplace_kf.models import named_parameters
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.randomness import torch_states
from laplace_kf.substitution import leaves_of, require_reached, substituted

__all__ = ["FirstPass", "require_a_function", "require_derivatives"]

SMALL = 2**16  # entries of a parameter that is compared; of larger ones torch's count of changes is
Place = tuple[str, str, str]  # kind, path of the module, attribute
_CALL = nn.Module._call_impl.__code__
_OTHERS = ("_parameters", "_modules", "_buffers")  # no attributes


class FirstPass:
    """Around the first forward pass in eval mode; then :meth:`require_a_function`.

    Args:
        model: in eval mode, inside of :func:`laplace_kf.models.preserved`.
        again: the same pass over a batch, for outputs ``(N, ...)``.
        batch: of the pass.
    """

    def __init__(self, model: nn.Module, again: Callable[[Any], Tensor], batch: Any) -> None:
        self.model, self.again, self.batch = model, again, batch
        self.devices = {p.device for p in model.parameters()}

    def __enter__(self) -> FirstPass:
        self.buffers = _buffers(self.model)
        self.weights = [(n, p, p._version, p.detach().clone() if p.numel() <= SMALL else None) for n, p in self._own()]
        self.kept = [_Kept(path, module) for path, module in self.model.named_modules()]
        self.random = torch_states(self.devices)
        return self

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, but those of tables that renormalise their rows (``max_norm``) as they are looked up."""
        tables = (m for m in self.model.modules() if getattr(m, "max_norm", None) is not None)
        written = {id(p) for m in tables for p in m.parameters(recurse=False)}
        yield from ((n, p) for n, p in self.model.named_parameters() if id(p) not in written and _held(p))

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.drew = not all(map(torch.equal, self.random, torch_states(self.devices)))
            named = dict(self.model.named_buffers())
            changed = [n for n, old in self.buffers.items() if n not in named or not torch.equal(named[n], old)]
            self.changed = [("buffer", *name.rpartition(".")[::2]) for name in changed]
            self.changed += [place for kept in self.kept for place in kept.changed()]

    def require_a_function(self, outputs: Tensor, second: Tensor | None = None, names: Collection[str] = ()) -> None:
        """Warns of a model that draws, and refuses one whose outputs hang on how often it ran, or on what before.

        Args:
            outputs: of the first pass, ``(N, ...)``.
            second: of another one over the same batch, if there was one.
            names: parameters in whose place other values will be put.

        Raises:
            UnsupportedLayer: names the module and what it changes.
        """
        with torch.no_grad():
            self._refuse_written()
            if self.drew:
                self._say_who_drew()
                return
            try:
                self._refuse_state(outputs.detach(), names)
            finally:  # a pass without a graph leaves nothing that one with a graph could go on with
                self._restore()
        if second is not None and not same_outputs(second.detach(), outputs.detach()):
            raise UnsupportedLayer(
                "the forward pass gives other outputs for the same inputs when it runs again in eval mode, so that "
                "curvature and predictions are each of another network. It hangs on something outside of its modules "
                "(a global variable, numpy's or Python's random numbers, a file): make what it needs an input, or a "
                "buffer that only training changes (if self.training:)"
            )

    def _refuse_written(self) -> None:
        written = []
        for name, parameter, version, kept in self.weights:
            if parameter._version != version if kept is None else not torch.equal(parameter, kept):
                written.append(name)
                if kept is not None:
                    parameter.data.copy_(kept)
        if written:
            path, _, last = written[0].rpartition(".")
            raise UnsupportedLayer(
                f"{f'module {path!r}' if path else 'the model'} writes into its parameter {last!r} while it runs in "
                "eval mode (an initialisation by the first batch, a constraint), so that its weights are other ones "
                "after the pass, and draws would not stay what they are. If it does so once, run a batch through it "
                f"before, model.eval()(x); a constraint goes through a function, for instance self.{last}.clamp(min=0) "
                "where it is used, or torch.nn.utils.parametrize"
            )

    def _say_who_drew(self) -> None:
        with _Who(self.model) as who:
            self.again(self.batch)
        if who.outside and who.found is None:
            return  # a ``forward=`` or ``inputs=`` may draw what it likes
        by = f" (by {who.found}{who.where})" if who.found else ""
        warn_user(
            f"the forward pass draws random numbers in eval mode{by}, so that curvature and predictions are each of "
            "another network. Dropout by a function is told the mode: F.dropout(x, p, training=self.training), and "
            "attention dropout_p=p if self.training else 0.0; noise that is meant goes into the batch, as an input"
        )

    def _at(self, buffers: Mapping[str, Tensor], batch: Any, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs with copies of these buffers, as what was made of the model's own is in use, and other weights."""
        copies = {n: b.clone() for n, b in buffers.items()}
        return substituted(self.model, {**copies, **weights}, lambda: self.again(batch))

    def _refuse_state(self, outputs: Tensor, names: Collection[str]) -> None:
        """Where something has changed: whether outputs of other examples, or at other weights, hang on it."""
        if not self.changed:
            return
        kind, path, name = self.changed[0]
        more = f" (and {len(self.changed) - 1} more)" if len(self.changed) > 1 else ""
        who = f"module {path!r}" if path else "the model"
        now, half = _buffers(self.model), (len(outputs) + 1) // 2
        for rows in (len(outputs), half):  # in another order, and not as many
            try:
                other = map_examples(self.batch, len(outputs), lambda t, rows=rows: t[:rows].flip(0))  # type: ignore[misc]
                same = self._hangs_not(now, other, {})
            except Exception:  # examples that cannot be cut out, or a model of one batch size
                same = self._hangs_not(now, self.batch, {})
            if not same:
                raise UnsupportedLayer(
                    f"{who} changes its {kind} {name!r}{more} while it runs in eval mode, and its outputs with it, so "
                    "that every pass is one of another network and curvature means nothing. Change it in training mode "
                    f"only (if self.training: self.{name} = ...), make it at the start of every forward, or hand it "
                    "over as an input; what is initialised by the first batch has to be before the fit"
                )
        with suppress(Exception):  # numbers that the model does not take for weights
            same = self._hangs_not(now, self.batch, _moved(self.model, names))
        if not same:
            raise UnsupportedLayer(
                f"{who} keeps its {kind} {name!r}{more}, which it made of its weights, from pass to pass in eval mode, "
                "so that draws and steps, which put other weights there, would go on with the old ones. Make it at the "
                "start of every forward (torch.nn.utils.parametrize does), or of a constant"
            )

    def _hangs_not(self, now: Mapping[str, Tensor], batch: Any, weights: Mapping[str, Tensor]) -> bool:
        """Whether what the last pass left makes no difference to another one; what that leaves is left afterwards."""
        after = self._at(now, batch, weights)
        self._restore()
        fresh = self._at(self.buffers, batch, weights)
        return same_outputs(after, fresh) or not bool(fresh.isfinite().all())

    def _restore(self) -> None:
        for kept in self.kept:
            kept.restore()


def _moved(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """These parameters with other numbers; they want gradients as before, which a forward pass may look at."""
    generator = torch.Generator().manual_seed(1)
    moved = {}
    for name, p in model.named_parameters():
        if name in names and p.is_floating_point() and _held(p):
            noise = torch.randn(p.shape, generator=generator).to(p)
            other = p.detach() + 0.3 * (p.detach().abs().mean() + 0.1) * noise
            moved[name] = other.requires_grad_(p.requires_grad)
    return moved


def require_a_function(
    model: nn.Module, forward: Any, names: Collection[str], again: Callable[[Any], Tensor], batch: Any
) -> Tensor:
    """Refuses a model that is no function, or in whose parameters' place no other values can be put.

    Args:
        model: in eval mode, inside of :func:`laplace_kf.models.preserved`.
        forward: the user's ``forward=`` or ``None``; only to remember the answer by.
        names: the parameters that are going to be replaced.
        again: a pass over a batch, for outputs ``(N, ...)``.
        batch: of the pass.

    Returns:
        The outputs, with their graph.

    Raises:
        UnsupportedLayer: names the module, and the parameters or what it keeps from pass to pass.
    """
    first = FirstPass(model, again, batch)
    with first, torch.enable_grad():  # what is kept from pass to pass has its graph, by which it is recognised
        outputs = again(batch)
    second = require_reached(model, forward, names, lambda: again(batch))
    first.require_a_function(outputs, second, names)
    return outputs


@torch.no_grad()
def require_derivatives(
    model: nn.Module, names: Sequence[str], again: Callable[[Any], Tensor], batch: Any, outputs: Tensor
) -> None:
    """Refuses parameters that outputs hang on, but have no derivative by: to be unused is something else.

    Args:
        model: in eval mode, inside of :func:`laplace_kf.models.preserved`.
        names: parameters.
        again: a pass over a batch, for outputs ``(N, ...)``.
        batch: of a pass.
        outputs: of the pass, with its graph, which says by which parameters there are derivatives.

    Raises:
        UnsupportedLayer: names the first one.
    """
    known = {id(leaf) for leaf in leaves_of(outputs)}
    named = named_parameters(model)
    names = [name for name in names if id(named[name]) not in known]

    def at(some: Collection[str]) -> Tensor:
        return substituted(model, _moved(model, some), lambda: again(batch))

    if not names:
        return
    outputs, moved = again(batch), at(names)
    if same_outputs(moved, outputs) or not bool(moved.isfinite().all()) or not same_outputs(again(batch), outputs):
        return
    name = next((name for name in names if not same_outputs(at([name]), outputs)), names[0])
    path, _, last = name.rpartition(".")
    raise UnsupportedLayer(
        f"the outputs hang on parameter {last!r} of {f'module {path!r}' if path else 'the model'}, but have no "
        "derivative by it: forward reads it under torch.no_grad(), set_grad_enabled(self.training) or inference_mode, "
        "through detach() or .data, or outside of torch. Take that out of forward (callers have no_grad), or leave the "
        f"parameter out: parameters=[patterns] without {name!r}, or requires_grad_(False)"
    )


class _Kept:
    """What one module holds, to see whether a pass changes it, and to put it back."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.plain = {name: value for name, value in module.__dict__.items() if name not in _OTHERS}
        containers = {name: value for name, value in self.plain.items() if isinstance(value, (dict, list, set))}
        self.contents = {name: value.copy() for name, value in containers.items()}
        tensors = filter(_held, tensors_of(list(self.plain.values())))
        self.tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def changed(self) -> Iterator[Place]:
        """Kind, module and name of attributes with another value now."""
        for name, value in self.module.__dict__.items():
            if name in _OTHERS:
                continue
            old = self.plain.get(name)
            same = not self._another(old, value)
            if same and name in self.contents:
                same = _identities(value) == _identities(self.contents[name])
            if not same:
                yield "attribute", self.path, name

    def _another(self, old: Any, new: Any) -> bool:
        if new is old:
            mine = {id(tensor) for tensor in tensors_of(new)}
            return any(not torch.equal(tensor, copy) for tensor, copy in self.tensors if id(tensor) in mine)
        return not (isinstance(new, (bool, int, float, str, type(None))) and type(new) is type(old) and new == old)

    def restore(self) -> None:
        """Puts everything back."""
        own = self.module.__dict__
        for name in own.keys() - self.plain.keys() - set(_OTHERS):
            del own[name]
        own.update(self.plain)
        for name, contents in self.contents.items():
            held = own[name]
            if _identities(held) != _identities(contents):
                held.clear()
                held.extend(contents) if isinstance(contents, list) else held.update(contents)
        for tensor, copy in self.tensors:
            if not torch.equal(tensor, copy):
                tensor.data.copy_(copy)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers by name, but of those that are views of parameters."""
    memory = {storage_of(p) for p in model.parameters()} - {None}
    return {n: b.detach().clone() for n, b in model.named_buffers() if _held(b) and storage_of(b) not in memory}


def _held(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be compared."""
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


def _identities(container: Collection[Any]) -> list[Any]:
    if isinstance(container, Mapping):
        return [(key, id(value)) for key, value in container.items()]
    return [id(value) for value in container]


class _Who(TorchFunctionMode):
    """Finds the first function that draws inside a module of the model.

    Args:
        model: whose modules count.

    Attributes:
        found: the function's name.
        where: the module that it was called in, for a message.
        outside: whether something else drew.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.found: str | None = None
        self.where, self.outside = "", False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = None if self.found is not None else torch.get_rng_state()
        result = func(*args, **(kwargs or {}))
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            path = self._module()
            if path is None:
                self.outside = True
            else:
                self.found = getattr(func, "__name__", "a function")
                self.where = f" in module {path!r}" if path else ""
        return result

    def _module(self) -> str | None:
        """Path of the innermost module that is running; ``None`` outside of all."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is _CALL:
                path = self.paths.get(id(frame.f_locals.get("self")))
                if path is not None:
                    return path
            frame = frame.f_back
        return None
