"""Any ``torch.distributions`` object as a likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Gumbel,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    Pareto,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)
from torch.distributions.constraints import Constraint

from laplace_kf.errors import IncompatiblePair, InvalidTarget, ShapeMismatch, UnknownAttribute, UnknownName
from laplace_kf.keywords import explained
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.likelihoods.prediction import Prediction, by_position, gaussian_entropy, log_mean_exp
from laplace_kf.likelihoods.reading import Given
from laplace_kf.outputs.checks import known_true, refuse_nonfinite
from laplace_kf.outputs.derivatives import autograd_hessian, psd_root, usable_by_autograd
from laplace_kf.outputs.layout import from_positions, scalar_shape

__all__ = ["FromDistribution"]

_CURVATURES = ("auto", "fisher", "hessian")
#: Numbers of outputs that a function is tried with before it was called.
_TRIED = (3, 2, 1, 4, 5, 6, 8, 10)

# Registered KL divergences whose autograd Hessian is not the Fisher: kinks at coinciding parameters (Laplace), supports
# that move with the parameters (Uniform, Pareto), and transformed distributions, whose rule looks at the base
# distribution only and so misses parameters of the transforms.
_IRREGULAR = (Laplace, Uniform, Pareto)
_REGULAR_TRANSFORMED = (LogNormal, HalfNormal, Gumbel)


def _without_independent(distribution: Distribution) -> Distribution:
    """The distribution of the single independent elements."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _has_regular_kl(distribution: Distribution) -> bool:
    if isinstance(distribution, _IRREGULAR):
        return False
    return not isinstance(distribution, TransformedDistribution) or isinstance(distribution, _REGULAR_TRANSFORMED)


def _enumerated(distribution: Distribution) -> Tensor | None:
    """``(K, *batch, *event)``: every value of a finite support, or None."""
    if not distribution.has_enumerate_support:
        return None
    try:
        return distribution.enumerate_support()
    except NotImplementedError:  # e.g. binomials with different numbers of trials
        return None


@contextmanager
def _private_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the default generators that ``Distribution.sample`` draws from and puts their states back."""
    # Not torch.manual_seed: it would also reset the generators of devices that are not saved here.
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _SampleMixture(Distribution):
    """Equal-weight mixture over the leading factor S of a distribution with batch ``(S * rows, *rest)``.

    ``MixtureSameFamily`` wants the components last, which a distribution of an unknown class cannot be reshaped to.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(self, components: Distribution, samples: int, rows: Sequence[int]) -> None:
        self.components, self.samples, self.rows = components, samples, math.prod(rows)
        batch = torch.Size([*rows, *components.batch_shape[1:]])
        super().__init__(batch, components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(self.samples, self.rows, *x.shape[1:])

    def _average(self, x: Tensor) -> Tensor:
        return x.mean(0).reshape(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        return self._average(self._split(self.components.mean))

    @property
    def epistemic_variance(self) -> Tensor:
        means = self._split(self.components.mean)
        return means.var(0, correction=0).reshape(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self._average(self._split(self.components.variance)) + self.epistemic_variance

    def component_log_prob(self, value: Tensor) -> Tensor:
        """``(S, rows, *rest)``: log density of one value per row under every component."""
        flat = value.reshape(1, self.rows, *self.components.batch_shape[1:], *self.event_shape)
        return self._split(self.components.log_prob(flat.expand(self.samples, *flat.shape[1:]).flatten(0, 1)))

    def log_prob(self, value: Tensor) -> Tensor:
        return log_mean_exp(self.component_log_prob(value)).reshape(self.batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        lead = torch.Size(sample_shape)
        with torch.no_grad():
            draws = self.components.sample(lead)
            draws = draws.reshape(*lead, self.samples, self.rows, *draws.shape[len(lead) + 1 :])
            choice = torch.randint(self.samples, (*lead, 1, self.rows), device=draws.device)
            choice = choice.reshape(*choice.shape, *[1] * (draws.ndim - choice.ndim))
            shape = (*lead, 1, *draws.shape[len(lead) + 1 :])
            return draws.gather(len(lead), choice.expand(shape)).reshape(lead + self.batch_shape + self.event_shape)


@explained
class FromDistribution(Likelihood):
    """The likelihood of ``fn(outputs)``, for any function that returns a ``torch.distributions.Distribution``.

    ``fn`` is always called with rows ``(B, C)``, whatever the layout of the outputs (B = N·T), and returns a
    distribution whose batch shape starts with B: positions are independent by construction. Independent elements
    (further batch dimensions) are summed. Targets are ``(N, *rest)`` for outputs ``(N, C)``, ``(N, T, *rest)`` for
    ``(N, T, C)``, and ``(N, H, W)`` or ``(N, E, H, W)`` for ``(N, C, H, W)``, with ``rest`` the remaining batch and
    event shape of the distribution. ``hessian`` is the exact Hessian of ``-log p``, by automatic differentiation.

    Predictions have ``probs`` (over ``enumerate_support()``) for one finite variable per position, and ``mean``,
    ``variance``, ``epistemic_variance`` where the distribution defines them. Densities are averaged over samples for
    every batch element on its own and jointly over the dimensions of an event. Entropies add those of the elements:
    exact for finite supports, else of normals with the same variance.

    Args:
        fn: outputs ``(B, C)`` → distribution; differentiable in the outputs.
        curvature: the PSD output curvature.
            ``"fisher"``: exact, without targets: by enumeration of a finite support, otherwise as the Hessian at
            ``z = z₀`` of ``KL(p_{z₀} || p_z)``, which is the Fisher, where torch has that divergence in closed form
            and it is smooth. Never by sampling.
            ``"hessian"``: the Hessian of ``-log p`` at the targets, negative eigenvalues dropped (methods 3.2).
            ``"auto"`` (default): the Fisher where it can be computed, else the Hessian.
        ignore_index: a position whose target entries all equal it contributes nothing; off by default, because it may
            be a possible target.

    Raises:
        UnknownName: for another ``curvature``.
    """

    def __init__(
        self, fn: Callable[[Tensor], Distribution], curvature: str = "auto", ignore_index: int | None = None
    ) -> None:
        super().__init__(ignore_index)
        if curvature not in _CURVATURES:
            raise UnknownName("curvature of FromDistribution", curvature, _CURVATURES)
        self.fn = fn
        self._wants_fisher = curvature != "hessian"
        self._wants_hessian = curvature != "fisher"
        self._curvature_name = curvature
        self._natural: dict[int, bool] = {}  # by the number of outputs

    @property
    def natural(self) -> bool:  # type: ignore[override]
        """Whether the outputs are natural parameters, as far as that can be found out (methods 2.6).

        Found by trying: at random outputs, Hessians at several drawn targets are all equal to the exact Fisher. The
        number of outputs is that of the last call; before the first one, the smallest that ``fn`` takes.
        """
        if self._natural:
            return next(reversed(self._natural.values()))
        return next((found for c in _TRIED if (found := self._tried(c, torch.device("cpu"))) is not None), False)

    def _tried(self, channels: int, device: torch.device) -> bool | None:
        """Whether ``channels`` outputs are natural parameters; None if ``fn`` does not take so many."""
        try:
            generator = torch.Generator().manual_seed(channels)
            z = torch.randn(8, 1, channels, dtype=torch.float64, generator=generator).to(device)
            objective = self._fisher_objective(z)
            if objective is None:
                self._rows(z)
                return False
            fisher = autograd_hessian(objective, z)
            with _private_seed(0, device), torch.no_grad():
                drawn = [self._rows(z).sample() for _ in range(4)]
            found = [self._position_hessian(z, y.to(z) if y.is_floating_point() else y) for y in drawn]
        except Exception:  # whatever a function of other shapes or types may raise (or vmap, at random numbers)
            return None
        scale = fisher.abs().amax() + 1e-12
        return bool(torch.stack([(one - fisher).abs().amax() <= 1e-8 * scale for one in found]).all())

    @property
    def needs_targets(self) -> bool:
        """True unless the curvature is ``"fisher"``; ``"auto"`` may turn out not to need them."""
        return self._wants_hessian

    def to_config(self) -> dict[str, Any]:
        """Refuses: a function cannot be written to a file.

        Raises:
            IncompatiblePair: always; pass the object itself when loading.
        """
        raise IncompatiblePair(f"{self!r} holds a Python function and cannot be saved; pass the object itself to load.")

    def _settings(self) -> dict[str, Any]:
        return {"fn": self.fn, "curvature": self._curvature_name, "ignore_index": self.ignore_index}

    # -- the distribution

    def _rows(self, z: Tensor) -> Distribution:
        rows = z.reshape(-1, z.shape[-1])
        distribution = self.fn(rows)
        if not isinstance(distribution, Distribution):
            raise IncompatiblePair(
                "FromDistribution: fn must return a torch.distributions.Distribution, got "
                f"{type(distribution).__name__}."
            )
        if tuple(distribution.batch_shape[:1]) != (rows.shape[0],):
            raise ShapeMismatch(
                f"FromDistribution: fn maps outputs of shape {tuple(rows.shape)} to a distribution with batch shape "
                f"{tuple(distribution.batch_shape)}; its first dimension must be {rows.shape[0]}."
            )
        return distribution

    @staticmethod
    def _target_shape(shape: Sequence[int], rest: Sequence[int]) -> tuple[int, ...]:
        if len(shape) < 4:
            return (*scalar_shape(shape), *rest)
        if len(rest) > 1:
            raise ShapeMismatch(
                f"FromDistribution: a target of shape {tuple(rest)} per pixel has no place in outputs "
                f"{tuple(shape)}; give one target for every position."
            )
        return (shape[0], *rest, *shape[2:])

    def _target_rows(self, distribution: Distribution, shape: Sequence[int], targets: Tensor) -> Tensor:
        """Checked targets, one row per position: ``(N·T, *rest)``."""
        batch, event = distribution.batch_shape[1:], distribution.event_shape
        expected = self._target_shape(shape, [*batch, *event])
        if tuple(targets.shape) != expected:
            raise ShapeMismatch(
                f"FromDistribution: targets of shape {tuple(targets.shape)} do not fit outputs of shape "
                f"{tuple(shape)}, whose distribution has batch shape {tuple(distribution.batch_shape)} and event shape "
                f"{tuple(event)}; expected {expected}."
            )
        refuse_nonfinite("FromDistribution", targets)
        if len(shape) > 3 and len(expected) == len(shape):
            targets = targets.movedim(1, -1)
        return targets.reshape(-1, *batch, *event)

    @staticmethod
    def _check_support(distribution: Distribution, rows: Tensor) -> None:
        try:
            support: Any = distribution.support
        except NotImplementedError:
            return
        bad = ~support.check(rows)
        if known_true(bad.any()):
            first = rows[tuple(bad.nonzero()[0].tolist())]
            raise InvalidTarget(
                f"FromDistribution: target {first.tolist()} is outside the support {support} of "
                f"{type(distribution).__name__}."
            )

    def _unpack(self, outputs: Tensor, targets: Any) -> Given:
        given = super()._unpack(outputs, targets)
        channels = int(given.z.shape[-1])
        if channels not in self._natural:
            found = self._tried(channels, given.z.device)
            if found is not None:
                self._natural[channels] = found
        return given

    def _read(self, z: Tensor, shape: Sequence[int], targets: Any) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            distribution = self._rows(z)
        rows = self._target_rows(distribution, shape, targets)
        rows = rows.to(z.dtype) if rows.is_floating_point() else rows
        rows, keep = self._ignored_rows(distribution, rows)
        self._check_support(distribution, rows)
        return rows, None if keep is None else keep.reshape(*z.shape[:2], 1)

    @staticmethod
    def _target_rows_at(y: Tensor, kept: Tensor) -> Tensor:
        return y[kept.flatten()]

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """C, for outputs of any layout: a root is made of all eigenvectors."""
        self._check_outputs(outputs.shape)
        return int(self.to_positions(outputs).shape[-1])

    def _ignored_rows(self, distribution: Distribution, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``(N·T, *rest)`` with possible values where they are ignored, and which are not, ``(N·T,)``."""
        if self.ignore_index is None:
            return rows, None
        hits = (rows == self.ignore_index).reshape(rows.shape[0], -1)
        if known_true((hits.any(1) & ~hits.all(1)).any()):
            raise InvalidTarget(
                f"FromDistribution: some, but not all, target entries of a position equal ignore_index="
                f"{self.ignore_index}; a position must be left out as a whole."
            )
        keep = ~hits.any(1)
        with _private_seed(0, rows.device), torch.no_grad():
            possible = distribution.sample()[: rows.shape[0]].to(rows.dtype)
        return torch.where(keep.reshape(-1, *[1] * (rows.ndim - 1)), rows, possible), keep

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError  # targets are checked against the distribution, in _read

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        log_prob = self._rows(z).log_prob(y)
        return log_prob.unsqueeze(-1).flatten(1).sum(1).reshape(*z.shape[:2], 1)

    # -- curvature

    def _fisher_objective(self, z: Tensor) -> Callable[[Tensor], Tensor] | None:
        """A function of the outputs whose Hessian at ``z`` is the Fisher; None if there is no exact one.

        Both are ``-Σ_y p_{z₀}(y) log p_z(y)`` up to a constant, whose Hessian at z₀ is ``E[-∇² log p]``.
        """
        z = usable_by_autograd(z.detach())
        with torch.inference_mode(False), torch.no_grad():
            reference = _without_independent(self._rows(z))
            support = _enumerated(reference)
            if support is not None:
                weights = reference.log_prob(support).exp()

                def cross_entropy(leaf: Tensor) -> Tensor:
                    log_p = _without_independent(self._rows(leaf)).log_prob(support)
                    return -torch.where(weights > 0, weights * log_p, torch.zeros_like(log_p))

                return cross_entropy
            if not _has_regular_kl(reference):
                return None
        try:
            with torch.inference_mode(False), torch.enable_grad():  # of exponential families torch takes a gradient
                kl_divergence(reference, reference)
        except NotImplementedError:
            return None
        return lambda leaf: kl_divergence(reference, _without_independent(self._rows(leaf)))

    def _position_curvature(self, z: Tensor, y: Tensor | None) -> Tensor:
        root = self._position_root(z, y)
        return torch.einsum("kntc,kntd->ntcd", root, root)

    def _position_matrix(self, z: Tensor, y: Tensor | None) -> Tensor:
        # of natural parameters the Hessian at any target is the Fisher
        objective = self._fisher_objective(z) if self._wants_fisher or (y is None and self.natural) else None
        if objective is not None:
            return autograd_hessian(objective, z)
        if not self._wants_hessian:
            raise IncompatiblePair(
                f"FromDistribution(curvature='fisher'): {type(_without_independent(self._rows(z))).__name__} has "
                "neither a finite support nor a smooth closed-form divergence, so its Fisher is not known exactly. "
                "Use curvature='hessian' (needs targets)."
            )
        return self._position_hessian(z, y)

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return psd_root(self._position_matrix(z, y))

    # -- draws and predictions

    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        with _private_seed(seed, z.device):
            rows = self._rows(z).sample()
        return self._restore(rows, shape)

    @classmethod
    def _restore(cls, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """``(N·T, *rest)`` in the layout of targets."""
        rest = rows.shape[1:]
        expected = cls._target_shape(shape, rest)
        if len(shape) < 4 or not rest:
            return rows.reshape(expected)
        return rows.reshape(shape[0], *shape[2:], *rest).movedim(-1, 1)

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        components = self._rows(z)
        mixture = _SampleMixture(components, z.shape[0], scalar_shape(shape))
        values: dict[str, Tensor] = {}
        elements = _without_independent(components)
        support = _enumerated(elements)
        if support is not None and len(elements.batch_shape) == 1:
            log_p = elements.log_prob(support).movedim(0, -1).reshape(*z.shape[:3], -1)
            values["probs"] = from_positions(log_mean_exp(log_p).exp(), shape)
        for name in ("mean", "variance", "epistemic_variance"):
            try:
                value: Tensor = getattr(mixture, name)
            except NotImplementedError:
                continue
            rows = value.reshape(mixture.rows, *components.batch_shape[1:], *components.event_shape)
            # NaN is how torch says that a categorical variable has no mean.
            if not bool(torch.isnan(rows).any()) and (len(shape) < 4 or rows.ndim <= 2):
                values[name] = self._restore(rows, shape)
        return Prediction(
            values=values,
            density=partial(self._rows_density, mixture, tuple(shape), z.dtype),
            entropies=partial(self._entropies, elements, z.shape[0], tuple(shape)),
            build=partial(_same, mixture),
        )

    def _rows_density(
        self, mixture: _SampleMixture, shape: Sequence[int], dtype: torch.dtype, targets: Tensor
    ) -> Tensor:
        rows = self._target_rows(mixture.components, shape, targets)
        rows = rows.to(dtype) if rows.is_floating_point() else rows
        rows, keep = self._ignored_rows(mixture.components, rows)
        first = rows.unsqueeze(0).expand(mixture.samples, *rows.shape).flatten(0, 1)
        self._check_support(mixture.components, first)
        log_mean = log_mean_exp(mixture.component_log_prob(rows))
        if keep is not None:
            log_mean = torch.where(keep.reshape(-1, *[1] * (log_mean.ndim - 1)), log_mean, torch.zeros_like(log_mean))
        return log_mean.reshape(shape[0], -1)

    @staticmethod
    def _entropies(elements: Distribution, samples: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        support = _enumerated(elements)
        positions = (shape[0], math.prod(scalar_shape(shape)[1:]))

        def layout(x: Tensor) -> Tensor:
            return by_position(x.reshape(*positions, -1).sum(-1), shape)

        if support is not None:
            log_p = elements.log_prob(support).movedim(0, -1)
            log_p = log_p.clamp_min(torch.finfo(log_p.dtype).min / 8)  # p log p = 0 and not NaN where p = 0
            log_p = log_p.reshape(samples, -1, *log_p.shape[1:])
            log_mean = log_mean_exp(log_p)
            return layout(-(log_mean.exp() * log_mean).sum(-1)), layout(-(log_p.exp() * log_p).sum(-1).mean(0))
        try:
            variance, mean = elements.variance, elements.mean
        except NotImplementedError as error:
            raise UnknownAttribute(
                Prediction, "entropy", why=f"{type(elements).__name__} defines no variance to take an entropy from."
            ) from error
        variance = variance.reshape(samples, -1, *variance.shape[1:])
        total = variance.mean(0) + mean.reshape(variance.shape).var(0, correction=0)
        return layout(gaussian_entropy(total)), layout(gaussian_entropy(variance).mean(0))


def _same(distribution: Distribution) -> Distribution:
    return distribution
