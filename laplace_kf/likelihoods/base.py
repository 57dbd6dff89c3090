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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_kf.draws import ExampleDraws
from laplace_kf.errors import IncompatiblePair, ShapeMismatch, UnknownName
from laplace_kf.likelihoods.drawing import drawn_scores
from laplace_kf.likelihoods.noise import Noise
from laplace_kf.likelihoods.predicting import Predicting
from laplace_kf.likelihoods.reading import Given, resolve_generator, root_of, times
from laplace_kf.likelihoods.roots import DenseRoot, Root, ScaledRoot
from laplace_kf.neighbours import of_loss
from laplace_kf.outputs.arranged import arranged
from laplace_kf.outputs.derivatives import autograd_hessian, usable_by_autograd
from laplace_kf.outputs.layout import from_positions, masked, to_positions
from laplace_kf.outputs.rows import map_rows
from laplace_kf.registry import Registry

__all__ = [
    "LIKELIHOODS",
    "Likelihood",
    "get_likelihood",
]


class Likelihood(Predicting, Noise):
    """A conditional density ``p(targets | outputs)`` with the derivatives of ``-log p`` in the outputs.

    Outputs are ``(N, C)``, sequences ``(N, T, C)`` or images ``(N, C, H, W)``. float64 outputs give float64 results;
    float16 and bfloat16 outputs are computed, and results returned, in float32. Values of the targets are not checked
    inside ``torch.func.vmap``, where they cannot be known; shapes always are.

    Everywhere targets are taken, :class:`~laplace_kf.outputs.weighted.WeightedTargets` may stand: the weight of an
    example multiplies its ``-log p``, gradient and curvature, and its counts of densities. An example of weight 0 is
    ignored.

    Args:
        ignore_index: targets equal to it contribute nothing to anything; None switches this off.

    Attributes:
        natural: True if ``-log p`` has a Hessian that does not depend on the targets, so that GGN = Fisher (methods
            2.6; Botev 2020, 3.5.1).
        psd: True if that Hessian is never indefinite, for whatever outputs and targets (methods 3).
        has_logits: True if outputs divided by a temperature are less certain predictions of the same classes.
        inverse_links: functions that outputs must not have gone through, by their name in autograd: each one's own
            name, what undoes it (a method, or an expression with "{}" for the outputs), and what outputs are.
        linked_range, linked_last, linked_sum: of what they give: its range; if only a last column is; if its sum is 1.
        needs_targets: True if ``hessian_root`` and friends (may) need the targets.
        ignore_index: see above.
    """

    natural: bool = False

    @classmethod
    def examples(cls) -> tuple[tuple[Likelihood, int], ...]:
        """Objects with a number of outputs C each, to try the likelihood on (the contract tests do)."""
        return ((cls(), cls._channels or 3),)

    # -- what a subclass implements besides _position_targets and _predict; z is (N, T, C), y comes from the former

    @abc.abstractmethod
    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        """``(N, T, E)``: log densities, E = 1 or C as the mask."""

    @abc.abstractmethod
    def _draw(self, z: Tensor, shape: Sequence[int], generator: Any) -> Tensor:
        """Targets drawn from the model, in the layout of ``log_prob``; z already lies on the generator's device.

        The generator is a ``torch.Generator``; where ``draws_by_row`` stands in the same class, it may also be the
        :class:`~laplace_kf.draws.RowDraws` of the rows of z, as the functions of that module take it.
        """

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

    def _position_summed(
        self, z: Tensor, y: Tensor | None, keep: Tensor | None, weight: Tensor | None, directions: Tensor | None
    ) -> Tensor:
        rows = masked(times(self._position_root(z, y), root_of(weight)), keep).flatten(0, 2)
        return rows.T @ (rows if directions is None else rows @ directions)

    # what follows has closed forms in subclasses; these defaults go through the root, (K, N, T, C)

    def _lazy_root(self, z: Tensor, y: Tensor | None, keep: Tensor | None) -> Root:
        return DenseRoot(masked(self._position_root(z, y), keep))

    def _curvature_diagonal(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._position_root(z, y).square().sum(0)

    def _curvature_rows(self, z: Tensor, y: Tensor | None, output: int) -> Tensor:
        root = self._position_root(z, y)
        return torch.einsum("knt,kntc->ntc", root[..., output], root)

    def _target_weight(self, y: Tensor | None) -> Tensor | None:
        """``(N, T, 1)``: factor on the curvature that belongs to a position's target (class weights); None for 1."""
        return None

    def _bent(self, given: Given) -> Tensor | None:
        """Factor on the curvature of a position, ``(N, T, 1)``: of its example and of its target."""
        own = self._target_weight(given.y)
        if own is None or given.weight is None:
            return given.weight if own is None else own
        return own * given.weight

    def _drawn(self) -> Likelihood:
        """The likelihood of targets drawn from the model: they may be equal to ``ignore_index``, and count."""
        other = copy.copy(self)
        other.ignore_index = None
        return other

    def _position_drawn_score(self, z: Tensor, y: Tensor, generator: Any) -> Tensor:
        """Scores ``(B, C)`` at targets drawn for rows ``z (B, C)``; ``y`` are the rows of the data's targets."""
        model = self._drawn()
        return model.score(z, model.sample(z, generator))

    def _settings(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this object; JSON-able."""
        return {"ignore_index": self.ignore_index}

    # -- public

    @property
    def psd(self) -> bool:
        """Whether the Hessian of ``-log p`` is never indefinite, as that of natural likelihoods (methods 3)."""
        return self.natural

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

    def drawn_score(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | ExampleDraws) -> Tensor:
        """Gradient ``∇_z log p(y | z)`` at targets drawn from the model, of the outputs' shape; zero where ignored.

        Its outer product has the output curvature of a natural likelihood as its mean: where examples or targets have
        weights, the drawn gradient is multiplied by the root of the weight at the target of the data. Only for
        positions that count a target is drawn, in their order: ignored ones do not shift the others' draws.

        Args:
            outputs, targets: as in :meth:`check`; of the targets only counts which are ignored, and their weights.
            generator: drawn from, on its own device; or the examples' own numbers.

        Raises:
            NonFinite: if the outputs give no valid distribution.
        """
        given = self._unpack(outputs, self._needed(targets, "drawn_score"))
        z, y, keep = given.z, given.y, given.keep
        assert y is not None
        found = torch.zeros_like(z)
        kept = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if keep is None else keep.any(-1)
        kept = kept.expand(z.shape[:2])
        if bool(kept.any()):
            draws = generator.rows(kept) if isinstance(generator, ExampleDraws) else generator
            found[kept] = drawn_scores(self, z[kept], self._target_rows_at(y, kept), draws)
        return from_positions(masked(times(found, root_of(self._bent(given))), keep), outputs)

    @staticmethod
    def _target_rows_at(y: Tensor, kept: Tensor) -> Tensor:
        """The targets ``y (N, T, ...)`` of the positions ``kept (N, T)``."""
        return y[kept]

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
        z, y, keep, weight = self._unpack(outputs, self._needed(targets, "log_prob"))
        assert y is not None
        return times(masked(self._position_log_prob(z, y), keep), weight).sum((1, 2))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient ``∇_z log p(y | z)``, of the outputs' shape; zero where ignored.

        Raises:
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        z, y, keep, weight = self._unpack(outputs, self._needed(targets, "score"))
        assert y is not None
        return from_positions(times(masked(self._position_score(z, y), keep), weight), outputs)

    def root_score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """:meth:`score` with the roots of the weights in place of the weights, of the outputs' shape (methods 17.11).

        Raises:
            ShapeMismatch, ValueError: see :meth:`check`.
        """
        given = self._unpack(outputs, self._needed(targets, "root_score"))
        score, scale = masked(self._position_score(given.z, given.y), given.keep), self._bent(given)  # type: ignore[arg-type]
        own = self._target_weight(given.y)  # already in the score
        scale = scale if scale is None or own is None else torch.where(own > 0, scale / own.square(), own)
        return from_positions(times(score, root_of(scale)), outputs)

    def _matrices(self, matrices: Tensor, given: Given, outputs: Tensor) -> Tensor:
        weight, keep = self._bent(given), given.keep
        matrices = times(matrices, None if weight is None else weight[..., None])
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
        given = self._unpack(outputs, targets)
        return self._matrices(self._position_hessian(given.z, given.y), given, outputs)

    def curvature(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """The PSD output curvature that is used in place of the Hessian, ``Σ_v r_v r_vᵀ`` of the root.

        Equal to :meth:`hessian` for natural likelihoods. Arguments, shapes and errors as there.
        """
        given = self._unpack(outputs, targets)
        return self._matrices(self._position_curvature(given.z, given.y), given, outputs)

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
        given = self._unpack(outputs, targets)
        return masked(times(self._position_root(given.z, given.y), root_of(self._bent(given))), given.keep)

    def root(self, outputs: Tensor, targets: Tensor | None = None) -> Root:
        """The root of :meth:`position_root`, its columns made on demand.

        Arguments and errors as there; nothing of size ``(K, N, T, C)`` is built where a closed form is known.
        """
        given = self._unpack(outputs, targets)
        scale = root_of(self._bent(given))
        root = self._lazy_root(given.z, given.y, given.keep)
        return root if scale is None else ScaledRoot(root, scale)

    def curvature_diagonal(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Diagonals of the positions' curvature, ``(N, T, C)``; arguments and errors as :meth:`position_root`."""
        given = self._unpack(outputs, targets)
        return masked(times(self._curvature_diagonal(given.z, given.y), self._bent(given)), given.keep)

    def curvature_rows(self, output: int, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Row ``output`` of every position's curvature, ``(N, T, C)``; errors as :meth:`position_root`."""
        given = self._unpack(outputs, targets)
        keep = given.keep
        row = masked(times(self._curvature_rows(given.z, given.y, output), self._bent(given)), keep)
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
        given = self._unpack(outputs, targets)
        return self._position_root(given.z[:1], None if given.y is None else given.y[:1]).shape[0]

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
        given = self._unpack(outputs, targets)
        z, keep = given.z, given.keep
        width = self.root_width(outputs, targets)
        if v.ndim != 4 or tuple(v.shape[1:]) != (*z.shape[:2], width):
            raise ShapeMismatch(
                f"{type(self).__name__}.root_product: noise of shape {tuple(v.shape)} does not fit outputs of shape "
                f"{tuple(outputs.shape)}; expected (samples, {z.shape[0]}, {z.shape[1]}, {width})."
            )
        product = self._position_product(z, v.to(z.dtype), given.y)
        return from_positions(masked(times(product, root_of(self._bent(given))), keep), outputs)

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
        given = self._unpack(outputs, targets)
        z, keep = given.z, given.keep
        if v.shape[1:] != outputs.shape:
            raise ShapeMismatch(
                f"{type(self).__name__}.curvature_product: v of shape {tuple(v.shape)} does not fit outputs of shape "
                f"{tuple(outputs.shape)}; expected (K, {', '.join(map(str, outputs.shape))})."
            )
        rows = torch.stack([to_positions(part) for part in v.to(z.dtype)])
        curved = self._position_curved(z, masked(rows, keep), given.y)
        return from_positions(masked(times(curved, self._bent(given)), keep), outputs)

    def summed_curvature(
        self, outputs: Tensor, targets: Tensor | None = None, directions: Tensor | None = None
    ) -> Tensor:
        """The PSD output curvature added up over examples and positions, ``(C, C)``; or its product with directions.

        Arguments and errors as :meth:`position_root`; ``directions (C, K)`` for a product ``(C, K)``.
        """
        given = self._unpack(outputs, targets)
        along = None if directions is None else directions.to(given.z)
        return self._position_summed(given.z, given.y, given.keep, self._bent(given), along)

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
        z = self._unpack(outputs, None).z
        generator = resolve_generator(generator, outputs.device)
        drawn = self._draw(z.to(generator.device), outputs.shape, generator)
        found: Tensor = map_rows(drawn, lambda t: t.to(outputs.device))  # a loss may have targets of several parts
        return found

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
        raise UnknownName("likelihood", name_or_object, LIKELIHOODS, of_loss(name_or_object))
    return LIKELIHOODS[name_or_object]()
