"""How a network's modules were set when a posterior was fitted, and whether they still make the same function.

Numbers are the smaller part of what a network does: an adapter that was merged, switched off or exchanged for another
one has the weights it had, but its parameters reach no output, and draws of them would change nothing. So the plain
attributes of all modules (switches, names, counts) are remembered. Where one of them is another now, the network is run
on a few inputs with the values of the fit and with those of now: parameters of the posterior that are lost are refused,
other outputs are warned of, and a change that makes no difference is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import conventions
from laplace_kf.batches import Forward, map_examples, mapped, predicted, to_device
from laplace_kf.callers import warn_user
from laplace_kf.errors import UnsupportedLayer
from laplace_kf.models import preserved
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.predictive.asked import examples_of
from laplace_kf.randomness import same_random_states
from laplace_kf.sequences import read
from laplace_kf.substitution import leaves_of, substituted

__all__ = ["Conduct"]

Place = tuple[str, str]
"""A module's path and the name of one of its attributes."""

FEW = 64  # entries of a container that is looked into
HARMLESS = 3  # changes of an attribute that made no difference, after which it is a counter and is no more asked about
_OTHER = object()  # in place of what is no plain value


class Conduct:
    """The plain attributes of the modules of a network.

    Args:
        settings: by place; ``None`` where nothing is known of the fit, which was in another process.
    """

    def __init__(self, settings: Mapping[Place, Any] | None = None) -> None:
        self.settings = None if settings is None else dict(settings)
        self._harmless: dict[Place, int] = {}
        self._told: dict[Place, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Conduct:
        """Those of a model as it is now; none of one whose layers' types say what they do."""
        return cls({} if read(model) is not None else _settings(model))

    def require_same(
        self, model: nn.Module, running: nn.Module, forward: Forward | None, mean: Callable[[], Mapping[str, Tensor]],
        x: Any,
    ) -> None:  # fmt: skip
        """Looks at a network before it predicts; nothing is run where all attributes are as they were.

        Args:
            model: the user's network, whose attributes are looked at.
            running: what runs in its place, itself or a double; left as it was.
            forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
            mean: () → the posterior's mean by parameter name, each of its parameter's shape.
            x: what ``predict`` was given, N examples of which two are run.

        Raises:
            UnsupportedLayer: if parameters that reached the outputs in the fit do not any more, or none does; names
                them, the attribute, and the way back.
        """
        if self.settings is None:
            self.settings = {} if read(model) is not None else _settings(model)
            if self.settings:  # what the fit saw is not known, but something has to reach the outputs
                self._compare(running, forward, mean(), x, {})
            return
        changed = self._changed(model)
        if changed and changed != self._told:
            self._compare(running, forward, mean(), x, changed)

    def _changed(self, model: nn.Module) -> dict[Place, Any]:
        """The attributes that are not what they were, with their values of now."""
        found: dict[Place, Any] = {}
        known = self.settings
        if not known:
            return found
        own = {path: module.__dict__ for path, module in model.named_modules()}
        for place, then in known.items():
            path, name = place
            now = own[path].get(name, _OTHER) if path in own else _OTHER
            if now is not then and now is not _OTHER and now != then:
                found[place] = _kept(now)
        return {place: now for place, now in found.items() if now is not _OTHER}

    def _compare(
        self, model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any, changed: dict[Place, Any]
    ) -> None:
        assert self.settings is not None
        then = {place: self.settings[place] for place in changed}
        try:
            few = _few(x, next(iter(mean.values())).device)
            now, before = _both(model, forward, mean, few, then)
            lost = [name for name in mean if name in before.reached and name not in now.reached]
            if not now.reached and self._around(model, forward, mean, few):
                return  # they are read past their modules, which the prediction says, with the way out
            lost = list(mean) if not now.reached else lost
            cut = bool(lost) and not same_outputs(_moved(model, forward, mean, few, lost), now.outputs)
        except Exception:  # what is wrong with the input, or the network, is said by the prediction itself
            return
        if lost and not cut:
            raise _lost(model, lost, len(mean), then, changed)
        if same_outputs(now.outputs, before.outputs) and not cut:
            self._forget(changed)
            return
        self._told = dict(changed)
        if cut:
            warn_user(
                f"{_shown(lost)} have an influence on the outputs, and no gradient (torch.no_grad() or detach() in "
                f"forward){_since(lost, then, changed)}: predictions by gradients (linearized, probit, covariances, "
                'scores) take them for constants; method="mc" does not. Put it back, or fit again, '
                "posterior.fit(train_loader)"
            )
            return
        (path, name), value = next(iter(changed.items()))
        warn_user(
            f"attribute {name!r} of {_named(path)} is {value!r}, and was {then[path, name]!r} when the posterior was "
            "fitted, and with it the network gives other outputs: predictions are those of another network. Put it "
            "back, or fit again, posterior.fit(train_loader)"
        )

    @staticmethod
    def _around(model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any) -> bool:
        """Whether the model's own tensors reach the outputs though others are in their place."""
        own = {id(p) for name, p in model.named_parameters() if name in mean}
        with preserved(model), same_random_states(), torch.enable_grad():
            outputs = substituted(model, dict(mean), lambda: predicted(model, x, forward))
        return any(id(leaf) in own for leaf in leaves_of(outputs))

    def _forget(self, changed: Mapping[Place, Any]) -> None:
        assert self.settings is not None
        harmless = {**self._harmless, **{place: self._harmless.get(place, 0) + 1 for place in changed}}
        known = {**self.settings, **changed}
        # other threads may be looking at what was known before
        self.settings = {place: now for place, now in known.items() if harmless.get(place, 0) < HARMLESS}
        self._harmless = harmless


@dataclass(frozen=True)
class _Pass:
    """Outputs ``(N, ...)`` at the mean, and the names of the parameters that they depend on."""

    outputs: Tensor
    reached: frozenset[str]


def _both(
    model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any, then: Mapping[Place, Any]
) -> tuple[_Pass, _Pass]:
    """A pass with the attributes of now, and one with those of the fit."""
    with preserved(model):
        now = _pass(model, forward, mean, x)
        modules = dict(model.named_modules())
        for (path, name), value in then.items():
            modules[path].__dict__[name] = _kept(value)
        return now, _pass(model, forward, mean, x) if then else now


def _moved(
    model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any, names: Sequence[str]
) -> Tensor:
    """Outputs ``(N, ...)`` at other values of some parameters: a graph may be cut where numbers go through."""
    other = {name: 1.5 * value + 0.5 if name in names else value for name, value in mean.items()}
    with preserved(model):
        return _pass(model, forward, other, x).outputs


def _few(x: Any, device: torch.device) -> Any:
    """Two of the examples ``(N, ...)``, or all where it is not known what they are."""
    count = examples_of(x)
    few = x if count is None or count <= 2 else map_examples(x, count, lambda t: t[:2])
    return to_device(mapped(few, torch.detach), device)


def _pass(model: nn.Module, forward: Forward | None, mean: Mapping[str, Tensor], x: Any) -> _Pass:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in mean.items()}
    with same_random_states(), torch.enable_grad():
        outputs = substituted(model, leaves, lambda: predicted(model, x, forward))
    names = {id(leaf): name for name, leaf in leaves.items()}
    return _Pass(outputs.detach(), frozenset(names[id(leaf)] for leaf in leaves_of(outputs) if id(leaf) in names))


def _settings(model: nn.Module) -> dict[Place, Any]:
    found: dict[Place, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            kept = _OTHER if name == "training" else _kept(value)
            if kept is not _OTHER:
                found[path, name] = kept
    return found


def _kept(value: Any, depth: int = 2) -> Any:
    """A copy of a plain value, or of a container of such; :data:`_OTHER` of anything else."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind not in (list, tuple, set, frozenset, dict) or not depth or len(value) > FEW:
        return _OTHER
    parts = [_kept(part, depth - 1) for part in (value.items() if kind is dict else value)]
    return _OTHER if any(part is _OTHER for part in parts) else kind(parts)


def _named(path: str) -> str:
    return f"module {path!r}" if path else "the model"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _since(lost: Sequence[str], then: Mapping[Place, Any], changed: Mapping[Place, Any]) -> str:
    """The attribute that is to blame: one above the parameters, if there is any."""
    above = [place for place in changed if any(name.startswith(f"{place[0]}.") for name in lost)] or list(changed)
    if not above:
        return ""
    path, name = above[0]
    return (
        f" since attribute {name!r} of {_named(path)} is {changed[path, name]!r}, and was {then[path, name]!r} when "
        "the posterior was fitted"
    )


def _lost(
    model: nn.Module, lost: Sequence[str], whole: int, then: Mapping[Place, Any], changed: Mapping[Place, Any]
) -> UnsupportedLayer:
    """The error about parameters that reach no output any more."""
    return UnsupportedLayer(
        f"{len(lost)} of the {whole} parameters that the posterior is over, {_shown(lost)}, have no influence on the "
        f"outputs{_since(lost, then, changed)}, so that draws of them would change nothing. Put it back"
        f"{conventions.adapter_lines(model, lost)}, or fit a posterior for the network as it is now, "
        "posterior.fit(train_loader)"
    )
