"""Softmax classification."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from laplace_kf.draws import Source, categorical
from laplace_kf.errors import InvalidArgument, InvalidTarget, InvalidType, ShapeMismatch
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import LIKELIHOODS, Likelihood
from laplace_kf.likelihoods.mixed import log_mixture
from laplace_kf.likelihoods.normal import GaussianOutputs, Link, without_components
from laplace_kf.likelihoods.prediction import Prediction, by_position, given, of_logits
from laplace_kf.likelihoods.reading import times
from laplace_kf.likelihoods.roots import Root, SoftmaxRoot
from laplace_kf.outputs.arranged import CHANNELS_FIRST
from laplace_kf.outputs.checks import (
    known_true,
    refuse_nonfinite,
    refuse_nonfinite_parameters,
    refuse_shape,
    refuse_values,
)
from laplace_kf.outputs.classes import checked_class_weights, class_masses
from laplace_kf.outputs.layout import from_positions, masked, scalar_shape
from laplace_kf.outputs.spread import Spread

__all__ = ["Categorical"]

UNLABELLED = 255  # of segmentation masks


def _sum_of_others(x: Tensor) -> Tensor:
    """``Σ_{j≠i} x_j`` over the last dimension, by sums from both ends.

    ``x.sum() - x_i`` would cancel: for nearly one-hot p the whole curvature lies in ``1 - p_i``.
    """
    edge = torch.zeros_like(x[..., :1])
    below = torch.cumsum(x, -1)[..., :-1]
    above = torch.cumsum(x.flip(-1), -1).flip(-1)[..., 1:]
    return torch.cat([edge, below], -1) + torch.cat([above, edge], -1)


def _distribution(log_p: Tensor, shape: Sequence[int]) -> Distribution:
    return of_logits(log_p.reshape(*scalar_shape(shape), log_p.shape[-1]))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _clamped(fresh: Tensor, least: float) -> Tensor:
    """At least so much; a tensor that nobody else has is changed in place where no gradient is asked for."""
    return fresh.clamp_min(least) if fresh.requires_grad else fresh.clamp_min_(least)


def _mean_and_entropy(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """``log (1/S) Σ_s p_s (N, T, C)`` and ``(1/S) Σ_s H(p_s) (N, T)`` of ``log_p (S, N, T, C)``, by one exponential."""
    samples = log_p.shape[0]
    top = log_p.detach().amax(0)
    scaled = log_p - top
    scaled = scaled.exp() if scaled.requires_grad else scaled.exp_()
    log_mean = scaled.sum(0).log() + top - math.log(samples)
    products = scaled * log_p if scaled.requires_grad else scaled.mul_(log_p)
    size = top.exp()
    # where the probability is 0 in this type, the sum may have overflowed
    entropy = -torch.where(size > 0, size * products.sum(0), 0.0).sum(-1) / samples
    return log_mean, entropy


BLOCK = 2**18  # numbers of drawn logits that are worked on at a time, so that they stay in the processor's cache
STREAMED = 2**18  # drawn logits from which this pays


def _streamed(outputs: GaussianOutputs) -> tuple[Tensor, Tensor] | None:
    """What :func:`_mean_and_entropy` gives for normal logits, a few draws at a time and without their logarithms.

    Returns:
        ``None`` where it would not be the same: where gradients are wanted, where some probability is next to 0 in this
        type (a mean of probabilities then loses what a mean of their logarithms keeps), or where little is drawn.
    """
    mean, full = outputs.mean, outputs.covariance
    few = outputs.samples * mean.numel() < STREAMED or outputs.samples < 2
    if few or not isinstance(full, Spread) or mean.dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_grad_enabled() and (mean.requires_grad or full.differentiable):
        return None
    least = torch.finfo(mean.dtype).tiny * 2.0**30
    total, entropy = torch.zeros_like(mean).flatten(0, 1), mean.new_zeros(mean.shape[:2].numel())
    for block in outputs.draw_blocks(BLOCK):
        z = block.flatten(1, 2).transpose(0, 1)  # (N T, s, C)
        z.sub_(z.amax(-1, keepdim=True))
        p = z.exp()
        size = p.sum(-1, keepdim=True)
        inner = torch.linalg.vecdot(p, z)
        entropy += (size.log() - inner.unsqueeze(-1) / size).sum((1, 2))
        total += torch.matmul(size.reciprocal().transpose(1, 2), p)[:, 0]
        if not float(total.amin()) > least:  # NaN neither
            return None
    log_mean = total.div_(outputs.samples).log_().reshape(mean.shape)
    return log_mean, entropy.div_(outputs.samples).reshape(mean.shape[:2])


@LIKELIHOODS.register("categorical")
@explained
class Categorical(Likelihood):
    """Softmax cross-entropy: outputs are the C logits of one class label per position.

    Targets are integer class indices in ``0..C-1`` or ``ignore_index``: ``(N,)`` for outputs ``(N, C)``, ``(N, T)``
    for ``(N, T, C)`` and ``(N, H, W)`` for ``(N, C, H, W)``; or class probabilities (one-hot, soft, smoothed or mixup
    targets) of the shape of the outputs, each position's at least 0 and adding up to 1. Which of the two is decided by
    the number of dimensions alone. With probabilities t ``log_prob`` is ``Σ_k t_k log p_k``; a position all of whose
    entries equal ``ignore_index`` contributes nothing.

    The output curvature is ``diag(p) - p pᵀ`` (methods 3; Martens 2016, Table 4.1), of rank C-1; ``position_root`` is
    its exact Cholesky-type root (Tanabe & Sagae 1992), while ``root_product`` uses ``S = diag(√p) - p √pᵀ`` with C
    noise entries, so that nothing of size C by C per example is built.

    Class weights w are those of ``torch.nn.CrossEntropyLoss(weight=, reduction="none")``: ``-log p`` is ``-Σ_k t_k w_k
    log p_k`` and its Hessian, the output curvature, ``(Σ_k t_k w_k) (diag(p) - p pᵀ)``, the GGN of that loss. N counts
    examples, whatever their weights. The curvature then depends on the targets of the data; the sampled estimator
    draws labels from the unweighted model and takes the weight of the data's target, so that it is unbiased for the
    same matrix. Drawn targets and predicted probabilities know neither weights nor smoothing.

    Args:
        ignore_index: label that contributes nothing; None for no such label.
        class_weights: ``(C,)``, a tensor or numbers, finite and at least 0; a class of weight 0 is ignored.
        label_smoothing: ε in [0, 1): targets become ``(1 - ε) t + ε / C``, as in torch's loss.
    """

    has_logits: ClassVar[bool] = True
    inverse_links: ClassVar[Mapping[str, tuple[str, str, str]]] = {"SoftmaxBackward0": ("softmax", "log", "logits")}
    linked_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    linked_sum: ClassVar[bool] = True
    simplex_targets: ClassVar[bool] = True

    def __init__(
        self,
        ignore_index: int | None = -100,
        class_weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(ignore_index)
        self.class_weights = None if class_weights is None else checked_class_weights("Categorical", class_weights)
        if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
            raise InvalidType(f"Categorical: label_smoothing must be a number in [0, 1), got {label_smoothing!r}.")
        if not 0.0 <= label_smoothing < 1.0:
            raise InvalidArgument(f"Categorical: label_smoothing {label_smoothing!r} is outside [0, 1).")
        self.label_smoothing = float(label_smoothing)

    @classmethod
    def examples(cls) -> tuple[tuple[Likelihood, int], ...]:
        return ((cls(), 3), (cls(class_weights=[0.5, 2.0, 1.25], label_smoothing=0.1), 3))

    @property
    def natural(self) -> bool:  # type: ignore[override]
        """True without class weights: with them the Hessian depends on the target."""
        return self.class_weights is None

    @property
    def psd(self) -> bool:
        """True: the Hessian is a positive multiple of ``diag(p) - p pᵀ``."""
        return True

    @property
    def needs_targets(self) -> bool:
        """True with class weights: the curvature is then that of the weighted loss."""
        return self.class_weights is not None

    def _settings(self) -> dict[str, Any]:
        found = super()._settings()
        if self.class_weights is not None:
            found["class_weights"] = self.class_weights.tolist()
        return {**found, "label_smoothing": self.label_smoothing} if self.label_smoothing else found

    def _drawn(self) -> Likelihood:
        return Categorical(ignore_index=None)

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """C, for outputs of any layout (one more than the columns of the root)."""
        self._check_outputs(outputs.shape)
        return int(self.to_positions(outputs).shape[-1])

    def _check_outputs(self, shape: Sequence[int]) -> None:
        super()._check_outputs(shape)
        if (shape[1] if len(shape) > 3 else shape[-1]) < 2:
            raise ShapeMismatch(
                f"Categorical needs at least 2 classes, got outputs of shape {tuple(shape)}. "
                "Use Bernoulli for a single logit."
            )

        if self.class_weights is not None and len(self.class_weights) != (shape[1] if len(shape) > 3 else shape[-1]):
            raise ShapeMismatch(
                f"Categorical: {len(self.class_weights)} class_weights do not fit outputs of shape {tuple(shape)}."
            )

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        classes = shape[1] if len(shape) > 3 else shape[-1]
        refuse_shape("Categorical", shape, targets, scalar_shape(shape), shape)
        refuse_nonfinite("Categorical", targets)
        if targets.ndim == len(shape):
            y, keep = class_masses("Categorical", targets, self.ignore_index)
        else:
            y, keep = self._labels(shape, targets, classes)
        if self.label_smoothing:
            hot = y if y.is_floating_point() else torch.nn.functional.one_hot(y, classes).double()
            y = hot * (1.0 - self.label_smoothing) + self.label_smoothing / classes
        weight = self._target_weight(y) if self.class_weights is not None else None
        if weight is not None:
            keep = weight > 0 if keep is None else keep & (weight > 0)
        return y, keep

    def _labels(self, shape: Sequence[int], targets: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
        allowed = f"0..{classes - 1} (outputs of shape {tuple(shape)}; ignore_index={self.ignore_index})"
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            first = f", first value {targets.flatten()[0].item()}" if targets.numel() else ""
            raise InvalidTarget(
                f"Categorical: targets must be integer class indices in {allowed}, got {targets.dtype}{first}: "
                f"y.long() makes them so. Class probabilities have the shape of the outputs."
            )
        y, keep = self._ignore(targets.long())
        bad = (y < 0) | (y >= classes)
        marked = _ignored_by_others(targets, bad)
        refuse_values("Categorical", targets, bad, allowed if marked is None else f"{allowed}. {marked}")
        y = y.unsqueeze(-1).flatten(1)
        return y, None if keep is None else keep.reshape(*y.shape, 1)

    def _masses(self, y: Tensor) -> Tensor:
        """Soft targets times the class weights, ``(N, T, C)``."""
        return y if self.class_weights is None else y * self.class_weights.to(y)

    def _target_weight(self, y: Tensor | None) -> Tensor | None:
        if self.class_weights is None:
            return None
        y = self._needed(y, "the curvature with class_weights")
        if y.is_floating_point():
            return self._masses(y).sum(-1, keepdim=True)
        return self.class_weights.to(y.device)[y].unsqueeze(-1)

    def _entropies_of(self, log_p: Tensor, y: Tensor) -> Tensor:
        """Minus the (weighted) cross-entropy of targets with log probabilities ``(N, T, C)``: ``(N, T, 1)``."""
        if y.is_floating_point():
            masses = self._masses(y)
            return torch.where(masses > 0, masses * log_p, torch.zeros_like(log_p)).sum(-1, keepdim=True)
        return times(log_p.gather(-1, y.unsqueeze(-1)), self._target_weight(y))

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return self._entropies_of(torch.log_softmax(z, -1), y)

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        p = torch.softmax(z, -1)
        if y.is_floating_point():  # s - (Σs) p without the difference of two nearly equal terms
            masses = self._masses(y)
            return masses * _sum_of_others(p) - p * _sum_of_others(masses)
        hit = torch.arange(p.shape[-1], device=p.device) == y.unsqueeze(-1)
        return times(torch.where(hit, _sum_of_others(p), -p), self._target_weight(y))

    def _position_curvature(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._position_hessian(z, y)

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        p = torch.softmax(z, -1)
        diagonal = torch.eye(p.shape[-1], dtype=torch.bool, device=p.device)
        on_diagonal = (p * _sum_of_others(p)).unsqueeze(-1)
        return torch.where(diagonal, on_diagonal, -(p.unsqueeze(-1) * p.unsqueeze(-2)))

    def _lazy_root(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Root:
        return SoftmaxRoot(torch.softmax(z, -1), keep)

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        root = self._lazy_root(z, y, None)
        kind, example, position = (torch.arange(n, device=z.device) for n in (root.count, *z.shape[:2]))
        return root.entries(kind[:, None, None], example[:, None], position)

    def _curvature_diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        p = torch.softmax(z, -1)
        return p * _sum_of_others(p)

    def _position_summed(
        self, z: Tensor, y: Tensor | None, keep: Tensor | None, weight: Tensor | None, directions: Tensor | None
    ) -> Tensor:
        p = masked(torch.softmax(z, -1), keep)
        weighted = times(p, weight).flatten(0, 1)
        p = p.flatten(0, 1)
        if directions is not None:
            return weighted.sum(0)[:, None] * directions - p.T @ (weighted @ directions)
        total = -(p.T @ weighted)
        total.diagonal().copy_((weighted * _sum_of_others(p)).sum(0))  # the difference Σp − Σp² would cancel
        return total

    def _curvature_rows(self, z: Tensor, y: Tensor | None, output: int) -> Tensor:
        p = torch.softmax(z, -1)
        row = -p[..., output : output + 1] * p
        row[..., output] = p[..., output] * _sum_of_others(p)[..., output]
        return row

    def _position_curved(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        p = torch.softmax(z, -1)
        w = p * v
        return w * _sum_of_others(p) - p * _sum_of_others(w)

    def _position_product(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        # √p∘v - p(√p·v) with its own term of the inner product moved over: √p_i v_i (1 - p_i) - p_i Σ_{j≠i} √p_j v_j.
        p = torch.softmax(z, -1)
        w = p.sqrt() * v
        return w * _sum_of_others(p) - p * _sum_of_others(w)

    draws_by_row = True

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Source) -> Tensor:
        p = torch.softmax(z, -1).flatten(0, 1)
        refuse_nonfinite_parameters("Categorical", p)
        if not p.shape[0]:
            return torch.zeros(scalar_shape(shape), dtype=torch.long, device=z.device)
        return categorical(p, generator).reshape(scalar_shape(shape))

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        # Finite even for masked classes (logit -inf), whose p·log p and gradient would be NaN.
        log_p = _clamped(torch.log_softmax(z, -1), torch.finfo(z.dtype).min / 8)
        log_mean, conditional = _mean_and_entropy(log_p) if z.shape[0] > 1 else (log_p[0], _entropy(log_p[0]))
        return self._mixture(log_mean, conditional, shape)

    def _predict_draws(self, outputs: GaussianOutputs) -> Prediction:
        found = _streamed(outputs)
        return super()._predict_draws(outputs) if found is None else self._mixture(*found, outputs.shape)

    def _mixture(self, log_mean: Tensor, conditional: Tensor, shape: Sequence[int]) -> Prediction:
        """From logarithms of mean probabilities ``(N, T, C)`` and mean entropies ``(N, T)``."""
        return Prediction(
            values={"probs": from_positions(log_mean.exp(), shape)},
            density=partial(self._density, tuple(shape), log_mean.dtype, partial(self._mean_density, log_mean)),
            entropies=partial(given, by_position(_entropy(log_mean), shape), by_position(conditional, shape)),
            build=partial(_distribution, log_mean, tuple(shape)),
        )

    def mixed_outputs(self, parts: Sequence[Prediction], log_weights: Tensor) -> Tensor | None:
        """Logarithms of the mean probabilities, ``(N, C)`` in the layout of the outputs."""
        logits: list[Tensor] = [part.distribution.logits for part in parts]  # type: ignore[attr-defined]
        found = log_mixture(torch.stack(logits), log_weights)
        shape = parts[0].probs.shape
        return self.from_positions(found.reshape(shape[0], math.prod(found.shape[1:-1]), found.shape[-1]), shape)

    def _mean_density(self, log_p: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
        return masked(self._entropies_of(log_p, y), keep)

    def _counts(self, targets: Tensor) -> Tensor:
        found = super()._counts(targets)
        if not targets.is_floating_point():
            return found
        layout = getattr(self, "layout", None)
        first = targets.ndim > 3 if layout is None else layout == CHANNELS_FIRST
        return found / targets.shape[1 if first else -1]  # one target a position

    def links(self) -> dict[str, Link]:
        """``"mc"`` (draws of the logits), ``"probit"`` (variances of the logits) and ``"bridge"`` (Dirichlet)."""
        return {**super().links(), "probit": Link(self._probit, True), "bridge": Link(self._bridge, False)}

    def _probit(self, outputs: GaussianOutputs) -> Prediction:
        """``softmax(f / √(1 + π/8 · var))``, the multi-class form of MacKay (1992), with each logit's own variance."""
        z = outputs.mean / (1.0 + math.pi / 8.0 * outputs.variance).sqrt()
        return without_components(self._predict(z[None], outputs.shape), outputs, self._predict)

    def _bridge(self, outputs: GaussianOutputs) -> Prediction:
        """Laplace bridge: the Dirichlet whose density over logits has the given mode and curvature.

        Hobbhahn, Kristiadi, Hennig (2022), "Fast predictive uncertainty for classification with Bayesian deep
        networks": logits are first conditioned on adding up to 0, and large variances are scaled back (their "norm
        correction").
        """
        full = outputs.covariance
        assert full is not None
        rows = full.product(torch.ones_like(outputs.mean[0, 0])) if isinstance(full, Spread) else full.sum(-1)
        log_alpha = _bridge_concentration(outputs.mean, outputs.variance, rows)
        log_total = torch.logsumexp(log_alpha, -1, keepdim=True)
        prediction = self._predict((log_alpha - log_total)[None], outputs.shape)
        # mean entropy of the members of a Dirichlet family; beyond the cap it is that of their mean
        total = log_total.clamp_max(math.log(_LARGEST_CONCENTRATION)).exp()
        alpha = (log_alpha - log_total).exp() * total
        within = torch.digamma(total[..., 0] + 1.0) - (alpha / total * torch.digamma(alpha + 1.0)).sum(-1)
        entropies = partial(given, prediction.position_entropy, by_position(within, outputs.shape))
        return replace(prediction, entropies=entropies)


#: Beyond this sum of concentrations the digamma functions of the entropy only lose digits.
_LARGEST_CONCENTRATION = 1e6


def _bridge_concentration(mean: Tensor, variance: Tensor, rows: Tensor) -> Tensor:
    """Logarithms of the Dirichlet concentrations, ``(N, T, C)``.

    Args:
        mean: of the logits, ``(N, T, C)``.
        variance: of the logits, ``(N, T, C)``.
        rows: sums of the rows of their covariance, ``(N, T, C)``.
    """
    classes = mean.shape[-1]
    whole = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
    # conditioned on Σ_k f_k = 0, which the softmax does not see
    mean = mean - rows * mean.sum(-1, keepdim=True) / whole
    variance = variance - rows.square() / whole
    variance = variance.clamp_min(torch.finfo(mean.dtype).eps)
    scale = variance.mean(-1, keepdim=True) / math.sqrt(classes / 2.0)  # the norm correction
    mean, variance = mean / scale.sqrt(), variance / scale
    grown = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2.0 * math.log(classes)
    least = torch.full_like(grown, math.log1p(-2.0 / classes) if classes > 2 else -math.inf)
    return torch.logaddexp(least, grown) - variance.log()


def _ignored_by_others(targets: Tensor, bad: Tensor) -> str | None:
    """The line to paste where all bad targets (of one shape) are one number that marks what has no label elsewhere."""
    found = targets[bad].unique() if known_true(bad.any()) else targets[:0]
    if len(found) != 1 or not (found[0] < 0 or found[0] == UNLABELLED):
        return None
    mark = int(found[0])
    return f"If {mark} marks what has no label: likelihood=lk.likelihoods.Categorical(ignore_index={mark})"
