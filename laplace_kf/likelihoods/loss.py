"""A likelihood from any loss of one example."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from laplace_kf.callers import warn_user
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownAttribute
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.prediction import Prediction, by_position, log_mean_exp, of_logits
from laplace_kf.outputs.checks import known_true, refuse_nonfinite
from laplace_kf.outputs.derivatives import psd_root, shifted_root
from laplace_kf.outputs.layout import from_positions, masked, scalar_shape
from laplace_kf.outputs.rows import leaves, map_rows, target_rows
from laplace_kf.registry import Registry

__all__ = ["FromLoss"]

LossFunction = Callable[[Tensor, Any], Tensor]
#: How far the loss of an example may move if the others are taken away, relative to 1 + its size: rounding only.
_SHAPES = re.compile(r"[Ss]ize|shape|dimension|[Dd]im |out of range")
_ALONE = 1e-3


@dataclass(frozen=True)
class _Treatment:
    root: Callable[[FromLoss, Tensor, Any], Tensor]
    needs_support: bool = False


_TREATMENTS: Registry[_Treatment] = Registry("curvature of FromLoss")
_TREATMENTS.register("clip")(_Treatment(lambda rule, z, y: psd_root(rule._position_hessian(z, y), torch.relu)))
_TREATMENTS.register("abs")(_Treatment(lambda rule, z, y: psd_root(rule._position_hessian(z, y), torch.abs)))
_TREATMENTS.register("shift")(_Treatment(lambda rule, z, y: shifted_root(rule._position_hessian(z, y))))
_TREATMENTS.register("fisher")(_Treatment(lambda rule, z, y: rule._fisher_root(z), needs_support=True))


@explained
class FromLoss(Likelihood):
    """The likelihood ``p(y | z) ∝ exp(-loss(z, y))`` of any loss of one example, so that nothing has to be subclassed.

    ``loss`` is always called with rows: outputs ``(B, C)`` and the targets of these rows ``(B, *rest)``, and returns
    ``(B,)``, each number a function of its own row. For outputs ``(N, C)`` the rows are the examples; for sequences
    ``(N, T, C)`` and images ``(N, C, H, W)`` they are the positions, B = N·T, with targets ``(N, T, *rest)`` and
    ``(N, H, W)`` or ``(N, E, H, W)`` (channel last in the rows). Targets may be a tuple or mapping of such tensors, of
    any type (a time and whether it is censored); floating ones come in the type of the outputs.

    ``log_prob`` is ``-loss``: constants that the loss leaves out are missing from the log likelihood and the evidence,
    too. Score and ``hessian`` are exact, by automatic differentiation. The Hessian may be indefinite and depends on the
    targets; a PSD matrix takes its place (methods 3.1, 3.2; Martens 2016, 4.4.3). Where the Hessian of every example is
    positive semi-definite (a convex loss), the first three are equal to it.

    A loss does not say how to draw targets. With ``support=``, the finitely many targets there are, they are drawn with
    probabilities ``softmax(-loss)``, and predictions have ``probs`` and entropies (of labels, a support
    ``torch.arange(K)``, a ``distribution`` too); with ``sample=`` they are drawn by it. Without either ``sample`` and
    ``estimator="sampled"`` are refused. Predictions have ``log_prob``, the log of the mean ``exp(-loss)`` over the
    sampled outputs, and ``mean`` and ``epistemic_variance`` of the outputs themselves.

    Args:
        loss: ``(outputs (B, C), targets (B, *rest)) -> (B,)``, twice differentiable in the outputs.
        curvature: what takes the place of the Hessian. ``"clip"`` (default) drops its negative eigenvalues, ``"abs"``
            reflects them, ``"shift"`` adds the multiple of the identity that makes the smallest eigenvalue 0 where it
            is negative; ``"fisher"`` takes the Fisher of ``p ∝ exp(-loss)`` over the support, which is exact and needs
            no targets.
        ignore_index: a position whose target entries (of a tuple or mapping: of its first tensor) all equal it
            contributes nothing; off by default, because it may be a possible target.
        support: ``(K, *rest)``: all targets that one row can have.
        sample: ``(outputs (B, C), generator) -> targets (B, *rest)`` drawn from the model.

    Raises:
        UnknownName: for another ``curvature``.
        IncompatiblePair: if ``loss`` is not callable, averages over the examples, or ``"fisher"`` has no support.
    """

    def __init__(
        self,
        loss: LossFunction,
        curvature: str = "clip",
        ignore_index: int | None = None,
        *,
        support: Tensor | None = None,
        sample: Callable[[Tensor, torch.Generator], Any] | None = None,
    ) -> None:
        super().__init__(ignore_index)
        if not callable(loss):
            raise IncompatiblePair(
                f"FromLoss: loss must be a function (outputs (N, C), targets) -> (N,), got {type(loss).__name__}; for "
                'example FromLoss(lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))'
            )
        if isinstance(loss, type):
            raise IncompatiblePair(
                f"FromLoss: {loss.__name__} is a class; make an object of it, for example "
                f'FromLoss({loss.__name__}(reduction="none"))'
            )
        reduction = getattr(loss, "reduction", None)
        if isinstance(loss, nn.Module) and isinstance(reduction, str) and reduction.lower() not in ("none", ""):
            raise IncompatiblePair(
                f"FromLoss: {type(loss).__name__} has reduction={reduction!r}, but one loss for every example is "
                f'needed; pass FromLoss({type(loss).__name__}(reduction="none"))'
            )
        self.loss, self._curvature_name, self._sampler = loss, curvature, sample
        self._treatment = _TREATMENTS[curvature]
        if support is not None and (not isinstance(support, Tensor) or support.ndim < 1 or len(support) < 2):
            raise ShapeMismatch(
                "FromLoss: support must be a tensor (K, *rest) of the K ≥ 2 targets that one row can have, for example "
                "support=torch.arange(3)"
            )
        self.support = support
        if self._treatment.needs_support and support is None:
            raise IncompatiblePair(
                f'FromLoss(curvature="{curvature}"): the Fisher is a mean over the targets that the model may give, '
                "and a loss does not say what they are. List them, for example support=torch.arange(3), or use "
                'curvature="clip" (needs targets).'
            )
        self._alone = False  # whether the loss was seen to treat rows one by one
        self._curved = False  # whether it was seen to be curved, or that was said not to be so

    @property
    def _labels(self) -> bool:
        """Whether the supported targets are the labels 0..K-1."""
        support = self.support
        return support is not None and support.ndim == 1 and support.tolist() == list(range(len(support)))

    @property
    def needs_targets(self) -> bool:
        """True unless the curvature is the Fisher."""
        return not self._treatment.needs_support

    def to_config(self) -> dict[str, Any]:
        """Refuses: a function cannot be written to a file.

        Raises:
            IncompatiblePair: always; pass the object itself when loading.
        """
        raise IncompatiblePair(f"{self!r} holds a Python function and cannot be saved; pass the object itself to load.")

    def _settings(self) -> dict[str, Any]:
        return {"loss": self.loss, "curvature": self._curvature_name, "ignore_index": self.ignore_index}

    # -- the loss, row by row

    def _losses(self, rows: Tensor, targets: Any) -> Tensor:
        """Checked losses ``(B,)``."""
        try:
            found = self.loss(rows, targets)
        except (RuntimeError, IndexError) as error:
            if "vmap" in str(error) or not _SHAPES.search(str(error)):
                raise
            raise ShapeMismatch(
                f"FromLoss: the loss cannot be computed of outputs {tuple(rows.shape)} and targets {_shapes(targets)} "
                f"({str(error).splitlines()[0]}); it is given one row for every example and position, and returns "
                f"({rows.shape[0]},). A loss of whole examples needs outputs (N, C): flatten them in the model"
            ) from error
        wrong = None
        if not isinstance(found, Tensor):
            wrong = f"a {type(found).__name__}"
        elif found.shape != rows.shape[:1]:
            wrong = f"a tensor of shape {tuple(found.shape)}"
        if wrong is None:
            assert isinstance(found, Tensor)
            return found
        way = 'leave out its mean, for example F.cross_entropy(outputs, targets, reduction="none")'
        if isinstance(found, Tensor) and found.ndim > 1 and found.shape[0] == rows.shape[0]:
            way = "add up the entries of an example: lambda outputs, targets: loss(outputs, targets).flatten(1).sum(1)"
        raise ShapeMismatch(
            f"FromLoss: for outputs {tuple(rows.shape)} and targets {_shapes(targets)} the loss returned {wrong}; one "
            f"loss for every example is needed, shape ({rows.shape[0]},): {way}"
        )

    def _check_alone(self, rows: Tensor, targets: Any) -> None:
        """Refuses, once, a loss in which the examples of a batch take part in each other's terms."""
        if self._alone or len(rows) < 2:
            return
        with torch.no_grad():
            whole = self._losses(rows, targets)[-1]
            single = self._losses(rows[-1:], map_rows(targets, lambda t: t[-1:]))[0]
        try:
            together, alone = float(whole), float(single)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            return  # not to be known there
        if math.isfinite(alone) and not abs(together - alone) <= _ALONE * (1.0 + abs(alone)):
            raise IncompatiblePair(
                f"FromLoss: the loss of an example is {together:.6g} in its batch and {alone:.6g} alone, "
                "so it depends on the other examples (or is random): there is no curvature of one example. Use a loss "
                "in which each example has a term of its own"
            )
        self._alone = True

    def _read(self, z: Tensor, shape: Sequence[int], targets: Any) -> tuple[Any, Tensor | None]:
        rows = target_rows("FromLoss", targets, shape)
        for leaf in leaves(rows):
            refuse_nonfinite("FromLoss", leaf)
        rows = map_rows(rows, lambda t: t.to(z.dtype) if t.is_floating_point() else t)
        keep = None
        if self.ignore_index is not None:
            first = next(iter(leaves(rows)))
            keep = ~(first == self.ignore_index).reshape(first.shape[0], -1).all(1)
            if known_true(keep.any()):  # a target that the loss can compute with
                other = int(keep.nonzero()[0])
                rows = map_rows(rows, lambda t: torch.where(_like(keep, t), t, t[other]))
            else:
                rows = map_rows(rows, lambda t: torch.where(_like(keep, t), t, torch.zeros_like(t)))
        if known_true(torch.tensor(True) if keep is None else keep.any()):
            self._check_alone(z.detach().reshape(-1, z.shape[-1]), rows)
        return rows, None if keep is None else keep.reshape(*z.shape[:2], 1)

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError  # rows of any structure are read in _read

    @staticmethod
    def _target_rows_at(y: Any, kept: Tensor) -> Any:
        return map_rows(y, lambda t: t[kept.flatten()])

    def _position_log_prob(self, z: Tensor, y: Any) -> Tensor:
        return -self._losses(z.reshape(-1, z.shape[-1]), y).reshape(*z.shape[:2], 1)

    def root_width(self, outputs: Tensor, targets: Any = None) -> int:
        """C (with the Fisher: K, the size of the support), for outputs of any layout."""
        self._check_outputs(outputs.shape)
        if self._treatment.needs_support:
            assert self.support is not None
            return len(self.support)
        return int(self.to_positions(outputs).shape[-1])

    # -- curvature

    def _position_hessian(self, z: Tensor, y: Any) -> Tensor:
        found = super()._position_hessian(z, y)
        if not self._curved and found.numel():
            flat = known_true((found == 0).all())
            if flat:
                warn_user(
                    "FromLoss: the second derivatives of the loss are 0 at all outputs of this minibatch, so that the "
                    "data leave the posterior as the prior is there. A loss that is piecewise linear (absolute error, "
                    "quantile, hinge) has no curvature anywhere: use a smooth one, for example F.huber_loss or "
                    "F.softplus in its place"
                )
            self._curved = flat or known_true((found != 0).any())
        return found

    def _position_root(self, z: Tensor, y: Any) -> Tensor:
        return self._treatment.root(self, z, y)

    def _log_probs(self, z: Tensor) -> Tensor:
        """``(K, ...)`` for outputs ``(..., C)``: log probabilities of the supported targets."""
        assert self.support is not None
        rows = z.reshape(-1, z.shape[-1])
        values = []
        for value in self.support.to(z.device):
            value = value.to(z.dtype) if value.is_floating_point() else value
            values.append(-self._losses(rows, value.expand(rows.shape[0], *value.shape)))
        return torch.log_softmax(torch.stack(values), 0).reshape(-1, *z.shape[:-1])

    def _fisher_root(self, z: Tensor) -> Tensor:
        """``√p_k ∇ log p_k`` for every supported target, ``(K, N, T, C)`` (methods 3.2)."""
        assert self.support is not None
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_()
            log_p = self._log_probs(leaf)
            columns = [
                torch.autograd.grad(one.sum(), leaf, retain_graph=True, materialize_grads=True)[0] for one in log_p
            ]
        return torch.stack(columns) * (0.5 * log_p.detach()).exp().unsqueeze(-1)

    # -- draws and predictions

    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Any:
        rows = z.reshape(-1, z.shape[-1])
        if self._sampler is not None:
            return map_rows(self._sampler(rows, generator), lambda t: _restored(t, shape))
        if self.support is None:
            raise IncompatiblePair(
                f"{self!r} cannot draw targets: a loss does not say how. Pass FromLoss(..., sample=f) with f(outputs,"
                ' generator), or support= (all possible targets), or use estimator="exact" or "empirical"'
            )
        p = self._log_probs(rows).exp().movedim(0, -1)
        chosen = torch.multinomial(p, 1, generator=generator)[:, 0] if len(p) else rows.new_zeros(0).long()
        return _restored(self.support.to(z.device)[chosen], shape)

    def _drawn(self) -> Likelihood:
        other = super()._drawn()
        assert isinstance(other, FromLoss)
        other._alone = True
        return other

    def _counts(self, targets: Any) -> Tensor:
        first = next(iter(leaves(targets)))
        return torch.ones(first.shape[0], dtype=torch.float64, device=first.device)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        values = {
            "mean": from_positions(z.mean(0), shape),
            "epistemic_variance": from_positions(z.var(0, correction=0), shape),
        }
        entropies: Callable[[], tuple[Tensor, Tensor | None]] = partial(_no_entropies, repr(self))
        build: Callable[[], Distribution] = partial(_no_distribution, repr(self))
        if self.support is not None:
            log_p = self._log_probs(z)  # (K, S, N, T)
            log_mean = log_mean_exp(log_p.movedim(1, 0))  # (K, N, T)
            values["probs"] = from_positions(log_mean.exp().movedim(0, -1), shape)
            entropies = partial(_finite_entropies, log_p, log_mean, tuple(shape))
            if self._labels:
                build = partial(_labels_distribution, log_mean, tuple(shape))
        return Prediction(
            values=values,
            density=partial(self._mean_density, z, tuple(shape)),
            entropies=entropies,
            build=build,
        )

    def _mean_density(self, z: Tensor, shape: Sequence[int], targets: Any) -> Tensor:
        y, keep = self._read(z[0], shape, targets)
        log_mean = log_mean_exp(torch.stack([self._position_log_prob(one, y) for one in z]))
        return masked(log_mean, keep)


def _shapes(targets: Any) -> str:
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves(targets))


def _like(keep: Tensor, t: Tensor) -> Tensor:
    return keep.reshape(-1, *[1] * (t.ndim - 1))


def _restored(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Targets ``(N·T, *rest)`` in the layout that goes with outputs of ``shape``."""
    found = rows.reshape(*scalar_shape(shape), *rows.shape[1:])
    return found.movedim(-1, 1) if len(shape) > 3 and rows.ndim > 1 else found


def _no_entropies(who: str) -> tuple[Tensor, Tensor | None]:
    raise UnknownAttribute(
        Prediction,
        "entropy",
        why=f"The entropy of {who} is not known: exp(-loss) has to be summed over all targets. Pass support= "
        "(the targets that there are).",
    )


def _no_distribution(who: str) -> Distribution:
    raise UnknownAttribute(
        Prediction,
        "distribution",
        why=f"{who} is no torch distribution: use FromDistribution for one, or support=torch.arange(K) for K labels.",
    )


def _labels_distribution(log_p: Tensor, shape: Sequence[int]) -> Distribution:
    return of_logits(log_p.movedim(0, -1).reshape(*scalar_shape(shape), log_p.shape[0]))


def _finite_entropies(log_p: Tensor, log_mean: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    total = -torch.special.xlogy(log_mean.exp(), log_mean.exp()).sum(0)
    single = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(0).mean(0)
    return by_position(total, shape), by_position(single, shape)
