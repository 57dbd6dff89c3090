"""What every likelihood offers.

A likelihood turns network outputs ``z`` into a density ``p(y | z)``. Everything the curvature code needs follows from
``-log p``: its Hessian in ``z``, a square root of that Hessian, samples of ``y`` and scores ``∇_z log p``.

Inside the package every output is brought to one layout, *positions*: ``(N, T, C)``, N examples, T positions that share
the network's weights (sequence steps, pixels; T = 1 for plain outputs) and C outputs per position. Positions are
conditionally independent given the outputs, so all curvature is block diagonal over them.

A new likelihood is one file: subclass :class:`Likelihood` (or a class of :mod:`laplace_kf.likelihoods.elementwise`),
implement the methods that start with ``_position_``, ``_draw`` and ``_predict``, and register it in
:data:`LIKELIHOODS`.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.likelihoods.roots import DenseRoot, Root
from laplace_kf.outputs.arranged import arranged
from laplace_kf.outputs.derivatives import autograd_hessian, usable_by_autograd
from laplace_kf.outputs.layout import check_layout, from_positions, masked, to_positions
from laplace_kf.registry import Registry

if TYPE_CHECKING:
    from laplace_kf.likelihoods.prediction import GaussianOutputs, Link, Prediction

__all__ = [
    "LIKELIHOODS",
    "Likelihood",
    "get_likelihood",
    "resolve_generator",
]


def resolve_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """The given generator, or a fresh private one seeded from the operating system's entropy."""
    if generator is None:
        generator = torch.Generator(device=device)
        generator.seed()
    return generator


class Likelihood(abc.ABC):
    """A conditional density ``p(targets | outputs)`` with the derivatives of ``-log p`` in the outputs.

    Outputs are ``(N, C)``, sequences ``(N, T, C)`` or images ``(N, C, H, W)``. float64 outputs give float64 results;
    float16 and bfloat16 outputs are computed, and results returned, in float32. Values of the targets are not checked
    inside ``torch.func.vmap``, where they cannot be known; shapes always are.

    Args:
        ignore_index: targets equal to it contribute nothing to anything; None switches this off.

    Attributes:
        natural: True if ``-log p`` has a Hessian that does not depend on the targets, so that GGN = Fisher (methods
            2.6; Botev 2020, 3.5.1).
        has_logits: True if outputs divided by a temperature are less certain predictions of the same classes.
        needs_targets: True if ``hessian_root`` and friends (may) need the targets.
        ignore_index: see above.
    """

    natural: ClassVar[bool] = False
    has_logits: ClassVar[bool] = False
    _channels: ClassVar[int | None] = None

    def __init__(self, ignore_index: int | None = -100) -> None:
        if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
            raise ValueError(f"{type(self).__name__}: ignore_index must be an int or None, got {ignore_index!r}.")
        self.ignore_index = ignore_index

    @classmethod
    def examples(cls) -> tuple[tuple[Likelihood, int], ...]:
        """Objects with a number of outputs C each, to try the likelihood on (the contract tests do)."""
        return ((cls(), cls._channels or 3),)

    # -- what a subclass implements; z is (N, T, C), y and keep come from _position_targets

    @abc.abstractmethod
    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Checks targets against the outputs' shape; returns them by position and a mask broadcastable to (N, T, C).

        Ignored entries come back as 0, a value every method can compute with; None as a mask keeps everything.
        """

    @abc.abstractmethod
    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """``(N, T, E)``: log densities, E = 1 or C as the mask."""

    @abc.abstractmethod
    def _draw(self, z: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Targets drawn from the model, in the layout of ``log_prob``; z already lies on the generator's device."""

    @abc.abstractmethod
    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        """Mixture over the leading dimension of ``z (S, N, T, C)``; ``shape`` is that of one set of outputs."""

    @abc.abstractmethod
    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        """``(K, N, T, C)`` columns of a root of the PSD curvature."""

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() and z.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z if differentiable else z.detach().clone().requires_grad_()
            total = self._position_log_prob(leaf, usable_by_autograd(y)).sum()
            return torch.autograd.grad(total, leaf, create_graph=differentiable, materialize_grads=True)[0]

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        y = usable_by_autograd(self._needed(y, "hessian"))
        return autograd_hessian(lambda leaf: -self._position_log_prob(leaf, y), z)

    def _position_curvature(self, z: Tensor, y: Tensor | None) -> Tensor:
        if self.natural:
            return self._position_hessian(z, y)
        root = self._position_root(z, y)
        return torch.einsum("kntc,kntd->ntcd", root, root)

    def _position_product(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        return torch.einsum("sntk,kntc->sntc", v, self._position_root(z, y))

    def _position_curved(self, z: Tensor, v: Tensor, y: Tensor | None) -> Tensor:
        root = self._position_root(z, y)
        return torch.einsum("kntc,sknt->sntc", root, torch.einsum("kntc,sntc->sknt", root, v))

    def _position_summed(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Tensor:
        rows = masked(self._position_root(z, y), keep).flatten(0, 2)
        return rows.T @ rows

    # what follows has closed forms in subclasses; these defaults go through the root, (K, N, T, C)

    def _lazy_root(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Root:
        return DenseRoot(masked(self._position_root(z, y), keep))

    def _curvature_diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._position_root(z, y).square().sum(0)

    def _curvature_rows(self, z: Tensor, y: Tensor | None, output: int) -> Tensor:
        root = self._position_root(z, y)
        return torch.einsum("knt,kntc->ntc", root[..., output], root)

    def _settings(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this object; JSON-able."""
        return {"ignore_index": self.ignore_index}

    def _density(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        density: Callable[[Tensor, Tensor | None], Tensor],
        targets: Tensor,
    ) -> Tensor:
        """Evaluates a predictive's density of ``(y, keep)`` at targets as a user gives them."""
        y, keep = self._position_targets(shape, targets)
        return density(y.to(dtype) if y.is_floating_point() else y, keep)

    # -- layout

    to_positions = staticmethod(to_positions)
    from_positions = staticmethod(from_positions)

    def _check_outputs(self, shape: Sequence[int]) -> None:
        check_layout(shape)
        channels = shape[-1] if len(shape) < 4 else shape[1]
        if self._channels is not None and channels != self._channels:
            raise ShapeMismatch(
                f"{type(self).__name__} needs {self._channels} outputs per position, got outputs of shape "
                f"{tuple(shape)} with {channels}."
            )

    def _unpack(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        self._check_outputs(outputs.shape)
        if not outputs.is_floating_point():
            raise ValueError(f"{type(self).__name__}: outputs must be floating point, got {outputs.dtype}.")
        z = to_positions(outputs)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if targets is None:
            return z, None, None
        if not isinstance(targets, Tensor):
            raise ValueError(f"{type(self).__name__}: targets must be a tensor, got {type(targets).__name__}.")
        y, keep = self._position_targets(outputs.shape, targets)
        return z, y.to(z.dtype) if y.is_floating_point() else y, keep

    def _needed(self, targets: Tensor | None, method: str) -> Tensor:
        if targets is None:
            raise IncompatiblePair(
                f"{self!r}: {method} without targets; this output curvature depends on the targets, pass them."
            )
        return targets

    def _everything(self) -> Likelihood:
        """This likelihood without an ``ignore_index``: drawn targets may be equal to it, and count all the same."""
        other = copy.copy(self)
        other.ignore_index = None
        return other

    def _ignore(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.ignore_index is None:
            return y, None
        keep = y != self.ignore_index
        return torch.where(keep, y, torch.zeros((), dtype=y.dtype, device=y.device)), keep

    # -- public

    @property
    def needs_targets(self) -> bool:
        """Whether the output curvature (``curvature``, the roots) may depend on the targets."""
        return False

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Checks that targets fit the outputs.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            targets: as described by the likelihood.

        Raises:
            ShapeMismatch: with both shapes, if they do not fit.
            ValueError: with the first offending value and the allowed range.
            NonFiniteTarget: for a NaN or infinite target (also a ``ValueError``).
        """
        self._unpack(outputs, self._needed(targets, "check"))

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which outputs count: those with a target that is not ignored.

        Args:
            outputs, targets: as in :meth:`check`, with the same errors.

        Returns:
            bool of the shape of the outputs; ``None`` if all of them count.
        """
        z, _, keep = self._unpack(outputs, self._needed(targets, "counted"))
        if keep is None or bool(keep.all()):
            return None
        return from_positions(keep.expand(z.shape), outputs)

    def counted_positions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As :meth:`counted`, by position: bool ``(N, T)``."""
        kept = self.counted(outputs, targets)
        return to_positions(torch.ones_like(outputs, dtype=torch.bool) if kept is None else kept).any(-1)

    def counted_examples(self, outputs: Tensor, targets: Tensor) -> int:
        """How many of the examples of outputs ``(N, ...)`` have a position that counts; errors as :meth:`counted`."""
        kept = self.counted(outputs, targets)
        return len(outputs) if kept is None else int(kept.flatten(1).any(1).sum())

    def drawn_score(self, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient ``∇_z log p(y | z)`` at targets drawn from the model, of the outputs' shape; zero where ignored.

        Only for positions that count a target is drawn, in their order: ignored ones do not shift the others' draws.

        Args:
            outputs, targets: as in :meth:`check`; of the targets only counts which are ignored.
            generator: drawn from, on its own device.

        Raises:
            NonFinite: if the outputs give no valid distribution.
        """
        whole = self._everything()
        z, _, keep = self._unpack(outputs, targets)
        if keep is None or bool(keep.all()):
            return whole.score(outputs, whole.sample(outputs, generator))
        kept = keep.any(-1)
        rows = z[kept]
        found = torch.zeros_like(z)
        if len(rows):
            found[kept] = masked(whole.score(rows, whole.sample(rows, generator)), keep[kept])
        return from_positions(found, outputs)

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log density of the targets, all constants included.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            targets: as described by the likelihood.

        Returns:
            ``(N,)`` in nats: the sum over the positions and outputs of an example; ignored ones contribute 0.

        Raises:
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        z, y, keep = self._unpack(outputs, self._needed(targets, "log_prob"))
        assert y is not None
        return masked(self._position_log_prob(z, y), keep).sum((1, 2))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient ``∇_z log p(y | z)``, of the outputs' shape; zero where ignored.

        Raises:
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        z, y, keep = self._unpack(outputs, self._needed(targets, "score"))
        assert y is not None
        return from_positions(masked(self._position_score(z, y), keep), outputs)

    def _matrices(self, matrices: Tensor, keep: Tensor | None, outputs: Tensor) -> Tensor:
        if keep is not None:
            matrices = masked(matrices, keep.unsqueeze(-1) & keep.unsqueeze(-2))
        return matrices.squeeze(1) if outputs.ndim == 2 else matrices

    def hessian(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Exact Hessian of ``-log p`` in the outputs; indefinite for some likelihoods.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            targets: needed where the Hessian depends on them, otherwise only to zero the ignored positions.

        Returns:
            ``(N, C, C)`` for ``(N, C)`` outputs, else ``(N, T, C, C)`` (T = H·W for images).

        Raises:
            IncompatiblePair: if the Hessian depends on the targets and they are missing.
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        z, y, keep = self._unpack(outputs, targets)
        return self._matrices(self._position_hessian(z, y), keep, outputs)

    def curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """The PSD output curvature that is used in place of the Hessian, ``Σ_v r_v r_vᵀ`` of the root.

        Equal to :meth:`hessian` for natural likelihoods. Arguments, shapes and errors as there.
        """
        z, y, keep = self._unpack(outputs, targets)
        return self._matrices(self._position_curvature(z, y), keep, outputs)

    def position_root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Root of every position's curvature.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            targets: needed where the curvature depends on them, otherwise only to zero the ignored positions.

        Returns:
            ``(K, N, T, C)`` with ``Σ_k r_k r_kᵀ`` the curvature; K may be smaller than C (softmax: C-1).

        Raises:
            IncompatiblePair: if the curvature depends on the targets and they are missing.
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        z, y, keep = self._unpack(outputs, targets)
        return masked(self._position_root(z, y), keep)

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Root:
        """The root of :meth:`position_root`, its columns made on demand.

        Arguments and errors as there; nothing of size ``(K, N, T, C)`` is built where a closed form is known.
        """
        z, y, keep = self._unpack(outputs, targets)
        return self._lazy_root(z, y, keep)

    def curvature_diagonal(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Diagonals of the positions' curvature, ``(N, T, C)``; arguments and errors as :meth:`position_root`."""
        z, y, keep = self._unpack(outputs, targets)
        return masked(self._curvature_diagonal(z, y), keep)

    def curvature_rows(self, output: int, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Row ``output`` of every position's curvature, ``(N, T, C)``; errors as :meth:`position_root`."""
        z, y, keep = self._unpack(outputs, targets)
        row = masked(self._curvature_rows(z, y, output), keep)
        return row if keep is None else masked(row, keep[..., output : output + 1] if keep.shape[-1] > 1 else keep)

    def hessian_root(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Root columns over the whole output of an example (methods 3, "exact square-root vectors").

        Returns:
            ``(V, *outputs.shape)`` with ``Σ_v r_v r_vᵀ`` the PSD curvature of the flattened output; V = K for
            ``(N, C)`` outputs, else V = T·K: column ``t·K + k`` touches position t only.

        Raises:
            as :meth:`position_root`.
        """
        root = self.position_root(outputs, targets)
        k, n, t, c = root.shape
        if outputs.ndim > 2:
            spread = torch.diag_embed(root.movedim(2, -1)).permute(4, 0, 1, 3, 2)  # (T, K, N, T, C)
            root = spread.reshape(t * k, n, t, c)
        return from_positions(root, outputs)

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """M, the noise entries per position that :meth:`root_product` takes for outputs of this shape.

        Arguments and errors as :meth:`position_root`; where nothing else is known M is the number of its columns.
        """
        z, y, _ = self._unpack(outputs, targets)
        return self._position_root(z[:1], None if y is None else y[:1]).shape[0]

    def root_product(self, outputs: Tensor, v: Tensor, targets: Tensor | None = None) -> Tensor:
        """``S v`` per position, with ``S Sᵀ`` the curvature: white noise in, curvature-distributed seeds out.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            v: ``(samples, N, T, M)`` with M = ``root_width(outputs, targets)``; unit covariance for unbiased products.
            targets: as in :meth:`position_root`.

        Returns:
            ``(samples, *outputs.shape)``.

        Raises:
            ShapeMismatch: if ``v`` does not fit; otherwise as :meth:`position_root`.
        """
        z, y, keep = self._unpack(outputs, targets)
        width = self.root_width(outputs, targets)
        if v.ndim != 4 or tuple(v.shape[1:]) != (*z.shape[:2], width):
            raise ShapeMismatch(
                f"{type(self).__name__}.root_product: noise of shape {tuple(v.shape)} does not fit outputs of shape "
                f"{tuple(outputs.shape)}; expected (samples, {z.shape[0]}, {z.shape[1]}, {width})."
            )
        return from_positions(masked(self._position_product(z, v.to(z.dtype), y), keep), outputs)

    def curvature_product(self, outputs: Tensor, v: Tensor, targets: Tensor | None = None) -> Tensor:
        """``H v`` per example, with H the PSD output curvature (:meth:`curvature`), which is never formed.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            v: ``(K, *outputs.shape)``.
            targets: as in :meth:`position_root`.

        Returns:
            ``(K, *outputs.shape)``.

        Raises:
            ShapeMismatch: if ``v`` does not fit; otherwise as :meth:`position_root`.
        """
        z, y, keep = self._unpack(outputs, targets)
        if v.shape[1:] != outputs.shape:
            raise ShapeMismatch(
                f"{type(self).__name__}.curvature_product: v of shape {tuple(v.shape)} does not fit outputs of shape "
                f"{tuple(outputs.shape)}; expected (K, {', '.join(map(str, outputs.shape))})."
            )
        rows = torch.stack([to_positions(part) for part in v.to(z.dtype)])
        return from_positions(masked(self._position_curved(z, masked(rows, keep), y), keep), outputs)

    def summed_curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """The PSD output curvature added up over examples and positions, ``(C, C)``.

        Arguments and errors as :meth:`position_root`.
        """
        z, y, keep = self._unpack(outputs, targets)
        return self._position_summed(z, y, keep)

    @torch.no_grad()
    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets drawn from the model.

        Args:
            outputs: ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            generator: drawn from on its own device; None uses a fresh private one. The global RNG never advances.

        Returns:
            Targets of the shape and dtype that :meth:`log_prob` takes, on the outputs' device.

        Raises:
            NonFinite: if the outputs give no valid distribution.
        """
        z, _, _ = self._unpack(outputs, None)
        generator = resolve_generator(generator, outputs.device)
        return self._draw(z.to(generator.device), outputs.shape, generator).to(outputs.device)

    def predict(self, outputs: Tensor, keep_samples: bool = False) -> Prediction:
        """Predictive distribution: the equal-weight mixture over sampled outputs (methods 10.1).

        Args:
            outputs: ``(S, N, C)``, ``(S, N, T, C)`` or ``(S, N, C, H, W)``; everything in the result stays
                differentiable in them.
            keep_samples: whether ``prediction.samples`` holds ``outputs``.

        Returns:
            A :class:`~laplace_kf.likelihoods.prediction.Prediction`.

        Raises:
            ShapeMismatch: if the outputs have no sample dimension, or no samples.
        """
        if outputs.ndim < 3 or outputs.shape[0] == 0:
            raise ShapeMismatch(
                f"{type(self).__name__}.predict: expected sampled outputs (S, N, C), (S, N, T, C) or (S, N, C, H, W) "
                f"with S >= 1, got {tuple(outputs.shape)}. Use outputs[None] for a single set of outputs."
            )
        shape = torch.Size(outputs.shape[1:])
        z, _, _ = self._unpack(outputs.flatten(0, 1), None)
        prediction = self._predict(z.reshape(*outputs.shape[:2], *z.shape[1:]), shape)
        prediction = dataclasses.replace(prediction, ignore_index=self.ignore_index)
        if keep_samples:
            prediction = dataclasses.replace(prediction, values={**prediction.values, "samples": outputs})
        return prediction

    def links(self) -> dict[str, Link]:
        """How normally distributed outputs become predictions, by name; the first one is the default.

        Every likelihood has ``"mc"``, the mixture over draws of the outputs.
        """
        from laplace_kf.likelihoods.prediction import Link

        return {"mc": Link(self._predict_draws, marginal=False)}

    def _predict_draws(self, outputs: GaussianOutputs) -> Prediction:
        return self._predict(outputs.draws, torch.Size(outputs.shape))

    def link(self, name: str | None) -> Link:
        """One of :meth:`links`, the default for ``None``.

        Raises:
            UnknownName: for another name.
        """
        links = self.links()
        if name is None:
            return next(iter(links.values()))
        if name not in links:
            raise UnknownName(f"link of {type(self).__name__}", name, links)
        return links[name]

    def predict_gaussian(
        self,
        outputs: Tensor,
        variance: Tensor,
        covariance: Tensor | None = None,
        link: str | None = None,
        samples: int = 100,
        generator: torch.Generator | None = None,
        keep_samples: bool = False,
    ) -> Prediction:
        """Predictive distribution for outputs that are normal around ``outputs``.

        Args:
            outputs: means, ``(N, C)``, ``(N, T, C)`` or ``(N, C, H, W)``.
            variance: of every output, in the same layout.
            covariance: of the outputs of a position, ``(N, T, C, C)``; not needed by links that are ``marginal``.
            link: a name of :meth:`links`; ``None`` for the default.
            samples: draws S of links that draw.
            generator: their random numbers; None uses a fresh private one.
            keep_samples: whether ``prediction.samples`` holds draws ``(S, *outputs.shape)`` of the outputs.

        Raises:
            UnknownName: for a link that this likelihood does not have.
            ValueError: if ``samples`` is not positive.
        """
        from laplace_kf.likelihoods.prediction import GaussianOutputs

        rule = self.link(link)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        z, _, _ = self._unpack(outputs, None)
        spread = to_positions(variance).to(z)
        full = None if rule.marginal or covariance is None else covariance.to(z)
        state = resolve_generator(generator, z.device)
        normal = GaussianOutputs(z, spread, full, tuple(outputs.shape), samples, state)
        prediction = dataclasses.replace(rule.predict(normal), ignore_index=self.ignore_index)
        if keep_samples:
            draws = from_positions(normal.draws, outputs)
            prediction = dataclasses.replace(prediction, values={**prediction.values, "samples": draws})
        return prediction

    # -- naming and saving

    def with_layout(self, layout: str) -> Likelihood:
        """A copy that reads all outputs in one layout; everything it returns is in that layout, too.

        Args:
            layout: ``"channels_first"`` (``(N, C, T)``, ``(N, C, H, W)``, ...: torch's own) or ``"channels_last"``
                (``(N, T, C)``, ``(N, H, W, C)``, ...).

        Raises:
            UnknownName: for another layout.
        """
        return arranged(self, layout)

    def terms(self, targets: Tensor) -> float:
        """How many scalar densities make up :meth:`log_prob` of these targets (of any shape), ignored ones left out."""
        return float(targets.numel() if self.ignore_index is None else int((targets != self.ignore_index).sum()))

    def rescaled(
        self, fitted: Mapping[str, float], log_likelihood: Tensor, terms: float
    ) -> tuple[float | Tensor, Tensor]:
        """What a noise parameter that was changed since a fit does to curvature and log likelihood.

        Args:
            fitted: :meth:`parameters` at the time of the fit.
            log_likelihood: sum of ``log p`` at that time, 0-dim.
            terms: sum of :meth:`terms` over the data.

        Returns:
            The factor on the curvature (1.0 by default) and the log likelihood now, 0-dim.
        """
        return 1.0, log_likelihood

    def parameters(self) -> dict[str, float]:
        """Numeric parameters of the density that are not network outputs (a noise scale); empty for most."""
        return {}

    @property
    def noise_scale(self) -> float | None:
        """Standard deviation of noise that is the same for all examples and can be tuned; None where there is none."""
        return None

    def with_noise_scale(self, value: float | Tensor) -> Likelihood:
        """A copy with another noise scale (> 0, a number or 0-dim, in the units of the outputs).

        Raises:
            IncompatiblePair: for a likelihood without one.
        """
        raise IncompatiblePair(f"{self!r} has no noise scale to tune; leave noise out, or use the Gaussian likelihood")

    def to_config(self) -> dict[str, Any]:
        """JSON-able description from which :meth:`from_config` rebuilds this likelihood.

        Raises:
            IncompatiblePair: if the class is not registered under a name.
        """
        for name, registered in LIKELIHOODS.items():
            if registered is type(self):
                return {"name": name, **self._settings()}
        raise IncompatiblePair(
            f"{self!r} is not registered, so a file cannot name it: pass the object itself to load, or register its "
            "class in LIKELIHOODS."
        )

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Likelihood:
        """Rebuilds a likelihood from :meth:`to_config`'s dictionary.

        Raises:
            UnknownName: if its name is not registered.
            ValueError: if its settings are not those of that likelihood.
        """
        settings = dict(config)
        name, layout = settings.pop("name", None), settings.pop("layout", None)
        rule = LIKELIHOODS[name]  # a missing name is refused there, with the registered ones
        try:
            made = rule(**settings)
            return made if layout is None else made.with_layout(layout)
        except TypeError as error:
            raise ValueError(f"{sorted(settings)} are not the settings of likelihood {name!r}: {error}") from error

    def __repr__(self) -> str:
        settings = {**self._settings(), **self.parameters()}
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


LIKELIHOODS: Registry[type[Likelihood]] = Registry("likelihood")


def get_likelihood(name_or_object: str | Likelihood) -> Likelihood:
    """The likelihood itself, or the one registered under a name with default settings.

    Raises:
        UnknownName: if it is neither; lists the registered names.
    """
    if isinstance(name_or_object, Likelihood):
        return name_or_object
    if not isinstance(name_or_object, str):
        raise UnknownName("likelihood", name_or_object, LIKELIHOODS)
    return LIKELIHOODS[name_or_object]()
