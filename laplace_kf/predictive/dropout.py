"""MC dropout: the mixture over random dropout masks, for networks that were trained with dropout (methods 10.4).

A sample is one thinned network: its masks are the same for all inputs, of one call and of the next, as a weight draw
is. Masks are put in where torch draws them, below all modules and functions, so it does not matter which module or
function drops: ``nn.Dropout`` and its kinds for channels and for self-normalising networks, ``F.dropout``, the dropout
arguments of attention and recurrent layers, stochastic depth.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_kf.batches import Forward, check_finite, predicted, tensors_of, to_device
from laplace_kf.errors import NonFinite, UnsupportedLayer
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, Prediction, get_likelihood
from laplace_kf.models import lasting, preserved, usable
from laplace_kf.predictive.activations import examples
from laplace_kf.predictive.draws import draw_seeds
from laplace_kf.replica import stage

__all__ = ["MCDropout", "mc_dropout"]

aten = torch.ops.aten
# what these do in training mode is not dropping: statistics of the minibatch, random slopes
_STEADY = (nn.modules.batchnorm._NormBase, nn.RReLU)
_OFF = frozenset(["dropout_p", "p", "dropout", "training", "train"])


class _Masks(TorchDispatchMode):
    """Draws every mask of one thinned network; surround one forward pass with it.

    Args:
        seed: of its masks.
        count: N, the examples that share them.
    """

    def __init__(self, seed: int, count: int) -> None:
        super().__init__()
        self.generator, self.count, self.drawn = torch.Generator().manual_seed(seed), count, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli_.float:
            keep = float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            return args[0].copy_(self._mask(args[0], keep))
        if func is aten.native_dropout.default and args[2] is not False:
            keep = 1.0 - float(args[1])
            mask = self._mask(args[0], keep)
            return args[0] * mask * (1.0 / keep if keep else 0.0), mask.bool().expand(args[0].shape)
        if torch.Tag.nondeterministic_seeded in func.tags and not _idle(func, args, kwargs):
            raise UnsupportedLayer(
                f"the forward pass draws random numbers by {func}, which is no dropout mask; MC dropout cannot share "
                "them between inputs. Keep that module out of training mode (override its train()), or use "
                "nn.Dropout or F.dropout"
            )
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if "batch_norm" in str(func) and given.get("training") and given.get("running_mean") is not None:
            raise UnsupportedLayer(
                "a module that is no nn.BatchNorm normalises with the statistics of the minibatch in training mode; "
                "make it a subclass of nn.BatchNorm1d, 2d or 3d, so that MC dropout leaves it in eval mode"
            )
        return func(*args, **kwargs)

    def _mask(self, like: Tensor, keep: float) -> Tensor:
        """Zeros and ones that broadcast to ``like``, whose examples lie along its first axis or, failing that, second.

        A first axis of k·N (heads of attention next to examples) has k masks that all examples share.
        """
        self.drawn += 1
        shape, n = tuple(like.shape), self.count

        def drawn(size: Sequence[int]) -> Tensor:
            made = torch.empty(size, dtype=torch.float32).bernoulli_(keep, generator=self.generator)
            return made.to(like)

        if n == 1 or not shape or shape[0] == 1:
            return drawn(shape)
        if len(shape) > 1 and shape[0] % n == 0:
            own = drawn((1, shape[0] // n, *shape[1:]))
            return own.expand(n, *own.shape[1:]).reshape(shape)
        if len(shape) > 1 and shape[1] == n:
            return drawn((shape[0], 1, *shape[2:])).expand(shape)
        if shape == (n,):
            return drawn((1,)).expand(shape)
        raise UnsupportedLayer(
            f"a dropout mask of shape {shape} has no axis for the {n} examples, so it cannot be shared by them; "
            "predict one input at a time, or keep the examples on the first axis"
        )


def _idle(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function that could drop does not: its rate is 0, or it is told not to."""
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    rates = [values[name] for name in _OFF & values.keys()]
    return ("attention" in str(func) and "dropout_p" not in values) or any(rate in (0, 0.0, False) for rate in rates)


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
    ) -> None:
        self.model, self.likelihood, self.forward = usable(model), get_likelihood(likelihood), forward
        self._seeds = draw_seeds(samples, generator)

    @lasting()
    def __call__(self, x: Any, *, keep_samples: bool = False) -> Prediction:
        """Predictive distribution at inputs.

        Args:
            x: what the model takes, N examples.
            keep_samples: keep the outputs ``(S, N, ...)`` of every thinned network in ``prediction.samples``.

        Raises:
            UnsupportedLayer: for random numbers in the forward pass that are no dropout masks.
            NonFinite: for NaN or infinity in the inputs or outputs.
        """
        check_finite(x, 0, "the input")
        first = next(self.model.parameters(), None)
        x = x if first is None else to_device(x, first.device)
        track = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(x))
        with stage(self.model, self.forward) as (model, forward), preserved(model):
            for module in model.modules():
                module.training = not isinstance(module, _STEADY)
            found, dropped = [], 0
            for seed in self._seeds:
                masks = _Masks(seed, examples(x))
                with torch.set_grad_enabled(track), sdpa_kernel(SDPBackend.MATH), masks:
                    found.append(predicted(model, x, forward))
                dropped += masks.drawn
        if not dropped:
            warnings.warn(
                "MC dropout has nothing to drop: no dropout is active in this network (no dropout layer, or all rates "
                "0), so its prediction is that of the network itself",
                stacklevel=3,
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
) -> MCDropout:
    """Predictions averaged over random dropout masks (methods 10.4): a callable ``x -> Prediction``.

    The masks of a sample are shared by all inputs, also from call to call. Everything but dropout is in eval mode
    (normalisation keeps its running statistics); the model, its mode and the caller's random numbers stay as they are.
    Predictions are differentiable in ``x``. Examples lie on the first axis (or the second, as in recurrent layers).

    Args:
        model: trained with dropout of any kind.
        likelihood: registered name or object.
        samples: number of masks S.
        generator: random numbers of the masks; a fresh private one by default.
        forward: ``(model, batch) -> (outputs, targets)``, as for :class:`laplace_kf.LaplacePosterior`.

    Raises:
        UnknownName: for an unknown likelihood.
        ValueError: if ``samples`` is not positive.

    Warns, when called, if no dropout is active.
    """
    return MCDropout(model, likelihood, samples, generator, forward=forward)
