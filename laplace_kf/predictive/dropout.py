"""MC dropout: the mixture over random dropout masks, for networks that were trained with dropout (methods 10.4).

A sample is one thinned network: its masks are the same for all inputs, of one call and of the next, as a weight draw
is. Masks are put in where torch draws them, below all modules and functions, so it does not matter which module or
function drops: ``nn.Dropout`` and its kinds for channels and for self-normalising networks, ``F.dropout``, the dropout
arguments of attention and recurrent layers, stochastic depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_kf.batches import Forward, check_finite, map_examples, mapped, predicted, tensors_of, to_device
from laplace_kf.callers import warn_user
from laplace_kf.errors import LaplaceKFError, NonFinite, UnsupportedLayer
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, Prediction, get_likelihood
from laplace_kf.models import lasting, preserved, usable
from laplace_kf.outputs.checks import same_outputs
from laplace_kf.predictive.activations import examples
from laplace_kf.predictive.asked import asked
from laplace_kf.predictive.draws import draw_seeds
from laplace_kf.reading import Part, reading
from laplace_kf.replica import stage

__all__ = ["MCDropout", "mc_dropout"]

aten = torch.ops.aten
# what these do in training mode is not dropping: statistics of the minibatch, random slopes, power iterations
_STEADY = (nn.modules.batchnorm._NormBase, nn.RReLU, parametrizations._SpectralNorm)
_DRAWING = frozenset(
    [
        aten.bernoulli_.float, aten.bernoulli.p, aten.bernoulli.default, aten.bernoulli_.Tensor,
        aten.native_dropout.default,
    ]
)  # fmt: skip
_OFF = frozenset(["dropout_p", "p", "dropout", "training", "train"])


class _Masks(TorchDispatchMode):
    """Draws every mask of one thinned network; surround one forward pass with it.

    Args:
        seed: of its masks.
        count: N, the examples that share them.
        other: the shapes of the masks of the same network at N + 1 examples, which tell where the examples lie in each;
            ``None`` to have masks that are not shared.
        told_apart: masks are numbers from 0.5 to 1.5, which are never the same by chance.
    """

    def __init__(
        self, seed: int, count: int, other: Sequence[tuple[int, ...]] | None = None, told_apart: bool = False
    ) -> None:
        super().__init__()
        self.told_apart = told_apart
        self.generator, self.count, self.other = torch.Generator().manual_seed(seed), count, other
        self.shapes: list[tuple[int, ...]] = []  # of the masks drawn

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _steady(func):
            return func(*args, **kwargs)
        given = _arguments(func, args, kwargs)
        if func in (aten.bernoulli_.float, aten.bernoulli.p):
            mask = self._mask(args[0], float(given["p"]))
            return args[0].copy_(mask) if func is aten.bernoulli_.float else mask
        if func in (aten.bernoulli.default, aten.bernoulli_.Tensor):
            keep = given["self"] if func is aten.bernoulli.default else given["p"]
            mask = (self._shared(given["self"], _uniform) < keep).to(given["self"])
            return args[0].copy_(mask) if func is aten.bernoulli_.Tensor else mask
        if func is aten.native_dropout.default and args[2] is not False:
            keep = 1.0 - float(args[1])
            mask = self._mask(args[0], keep)
            return args[0] * mask * (1.0 / keep if keep else 0.0), mask.bool().expand(args[0].shape)
        if torch.Tag.nondeterministic_seeded in func.tags and not _idle(func, given):
            raise UnsupportedLayer(
                f"the forward pass draws random numbers by {func}, which is no dropout mask; MC dropout cannot share "
                "them between inputs. Keep that module out of training mode (override its train()), or use "
                "nn.Dropout or F.dropout"
            )
        if "batch_norm" in str(func) and given.get("training") and given.get("running_mean") is not None:
            raise UnsupportedLayer(
                "a module that is no nn.BatchNorm normalises with the statistics of the minibatch in training mode; "
                "make it a subclass of nn.BatchNorm1d, 2d or 3d, so that MC dropout leaves it in eval mode"
            )
        return func(*args, **kwargs)

    def _mask(self, like: Tensor, keep: float) -> Tensor:
        """Zeros and ones of the shape of ``like``."""
        if self.told_apart:
            return self._shared(like, lambda made, generator: made.uniform_(0.5, 1.5, generator=generator)).to(like)
        return self._shared(like, lambda made, generator: made.bernoulli_(keep, generator=generator)).to(like)

    def _shared(self, like: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        """Random numbers of the shape of ``like``, the same for all examples.

        An axis of k·N (heads of attention, or positions, next to examples) has k masks that all examples share.
        """
        shape, number = tuple(like.shape), len(self.shapes)
        self.shapes.append(shape)
        axis = None if self.other is None or self.count == 1 else self._axis(shape, number)
        own = list(shape)
        if axis is not None:
            own[axis] //= self.count
        drawn = draw(torch.empty(own, dtype=torch.float32), self.generator).to(like.device)
        if axis is None:
            return drawn
        return drawn.unsqueeze(axis).expand(*own[:axis], self.count, *own[axis:]).reshape(shape)

    def _axis(self, shape: tuple[int, ...], number: int) -> int | None:
        """Along which axis of a mask the examples lie: the one that grows with them; none in masks of weights."""
        assert self.other is not None
        other = self.other[number] if number < len(self.other) else ()
        if len(other) == len(shape):
            grown = [a for a, (one, two) in enumerate(zip(shape, other, strict=True)) if one != two]
            if not grown:
                return None
            if len(grown) == 1 and shape[grown[0]] % self.count == 0:
                return grown[0]
        raise UnsupportedLayer(
            f"a dropout mask of shape {shape} has no axis for the {self.count} examples (with one more input it has "
            f"the shape {other}), so it cannot be shared by them; predict one input at a time, or keep the examples on "
            "an axis of their own"
        )


def _uniform(made: Tensor, generator: torch.Generator) -> Tensor:
    return made.uniform_(generator=generator)


@functools.cache
def _steady(func: Any) -> bool:
    """Whether a function has nothing to do with masks, whatever it is called with: most have not."""
    drawing = func in _DRAWING or torch.Tag.nondeterministic_seeded in func.tags
    return not drawing and "batch_norm" not in str(func)


def _arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a function is called with, by name, defaults included."""
    schema = func._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}


def _idle(func: Any, values: dict[str, Any]) -> bool:
    """Whether a function that could drop does not: its rate is 0, or it is told not to."""
    rates = [values[name] for name in _OFF & values.keys()]
    return ("attention" in str(func) and "dropout_p" not in values) or any(rate in (0, 0.0, False) for rate in rates)


def _require_one_function(again: Tensor, outputs: Tensor) -> None:
    """Refuses other outputs than ``(N, ...)`` when the network runs again, perhaps with the first input once more."""
    wanted = torch.cat([outputs, outputs[:1]]) if len(again) > len(outputs) else outputs
    if not same_outputs(again, wanted):
        raise UnsupportedLayer(
            "with the same dropout masks an input does not have the same outputs when it comes twice, or when the "
            "network runs again: random numbers of numpy or of Python's random, masks over examples and positions "
            "mixed in one axis, or statistics of the minibatch. Use nn.Dropout or F.dropout, with the examples on an "
            "axis of their own"
        )


class MCDropout:
    """A callable ``x -> Prediction``; see :func:`mc_dropout`."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        samples: int = 100,
        generator: torch.Generator | None = None,
        *,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
    ) -> None:
        self.model, self.likelihood = usable(model), get_likelihood(likelihood)
        self.forward = reading(forward, inputs, targets)
        self._seeds = draw_seeds(samples, generator)
        self._told_apart: set[tuple[int, tuple[tuple[int, ...], ...]]] = set()  # forms of batches looked at once

    @lasting()
    def __call__(self, x: Any, *, keep_samples: bool = False) -> Prediction:
        """Predictive distribution at inputs.

        Args:
            x: what the model takes, N examples.
            keep_samples: keep the outputs ``(S, N, ...)`` of every thinned network in ``prediction.samples``.

        Raises:
            UnsupportedLayer: for random numbers in the forward pass that are no dropout masks, or where masks cannot be
                shared by the examples.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        x = asked(self.model, self.forward, x)
        check_finite(x, 0, "the input")
        first = next(self.model.parameters(), None)
        x = x if first is None else to_device(x, first.device)
        track = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(x))
        count = examples(x)
        with stage(self.model, self.forward) as (model, forward), preserved(model):
            for module in model.modules():
                hooks = module._forward_pre_hooks.values()
                module.training = not isinstance(module, _STEADY) and not any(
                    isinstance(h, SpectralNorm) for h in hooks
                )

            def thinned(x: Any, masks: _Masks, track: bool = False) -> Tensor:
                with torch.set_grad_enabled(track), sdpa_kernel(SDPBackend.MATH), masks:
                    return predicted(model, x, forward)

            more, other = mapped(x, torch.detach), None
            if count > 1:  # a first input more shows along which axis of a mask the examples lie
                more = map_examples(more, count, lambda t: torch.cat([t, t[:1]]))
                larger = _Masks(self._seeds[0], count + 1)
                try:
                    thinned(more, larger)
                except LaplaceKFError:
                    thinned(mapped(x, torch.detach), _Masks(self._seeds[0], count))  # speaks of what was given
                    raise
                other = larger.shapes
            made = [_Masks(seed, count, other) for seed in self._seeds]
            found = [thinned(x, masks, track) for masks in made]
            shared = _Masks(self._seeds[0], count + 1, made[0].shapes) if count > 1 else _Masks(self._seeds[0], 1)
            _require_one_function(thinned(more, shared), found[0].detach())
            form = count, tuple(made[0].shapes)
            if count > 1 and form not in self._told_apart:  # two masks of zeros and ones may be the same by chance
                one = thinned(mapped(x, torch.detach), _Masks(self._seeds[0], count, other, told_apart=True))
                two = thinned(more, _Masks(self._seeds[0], count + 1, made[0].shapes, told_apart=True))
                _require_one_function(two, one)
                self._told_apart.add(form)
        if not any(masks.shapes for masks in made):
            warn_user(
                "MC dropout has nothing to drop: no dropout is active in this network (no dropout layer, or all rates "
                "0), so its prediction is that of the network itself"
            )
        outputs = torch.stack(found)
        if not torch.isfinite(outputs.detach()).all():
            raise NonFinite("outputs of thinned networks have NaN or infinite entries; check the trained weights")
        return self.likelihood.predict(outputs, keep_samples=keep_samples)


@explained
def mc_dropout(
    model: nn.Module,
    likelihood: str | Likelihood,
    samples: int = 100,
    generator: torch.Generator | None = None,
    *,
    forward: Forward | None = None,
    inputs: Part | None = None,
    targets: Part | None = None,
) -> MCDropout:
    """Predictions averaged over random dropout masks (methods 10.4): a callable ``x -> Prediction``.

    The masks of a sample are shared by all inputs, also from call to call. Everything but dropout is in eval mode
    (normalisation keeps its running statistics); the model, its mode and the caller's random numbers stay as they are.
    Predictions are differentiable in ``x``. Where the examples lie in a mask (first, second, next to heads or
    positions, nowhere in a mask of weights) shows a pass with one input more; the last pass makes sure that an input
    which comes twice has the same outputs.

    Args:
        model: trained with dropout of any kind.
        likelihood: registered name or object.
        samples: number of masks S.
        generator: random numbers of the masks; a fresh private one by default.
        forward: ``(model, batch) -> (outputs, targets)``, as for :class:`laplace_kf.LaplacePosterior`.
        inputs: with ``targets``, functions of a batch in its place.
        targets: the other one.

    Raises:
        UnknownName: for an unknown likelihood.
        InvalidArgument: if ``samples`` is no whole number of at least 1.

    Warns, when called, if no dropout is active.
    """
    return MCDropout(model, likelihood, samples, generator, forward=forward, inputs=inputs, targets=targets)
