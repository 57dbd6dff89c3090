"""A mixture of two Bernoulli classifiers: a likelihood outside the natural exponential family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from laplace_kf.draws import Source, bernoulli
from laplace_kf.likelihoods.base import LIKELIHOODS, Likelihood
from laplace_kf.likelihoods.prediction import Prediction, binary_mixture
from laplace_kf.outputs.checks import refuse_nonfinite, refuse_nonfinite_parameters, refuse_shape, refuse_values
from laplace_kf.outputs.derivatives import psd_root
from laplace_kf.outputs.layout import scalar_shape
from laplace_kf.registry import Registry

__all__ = ["BernoulliMixture"]


def _log_probs(z: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(1 | z)`` and ``log p(0 | z)``, each ``z.shape[:-1]``."""
    first, second, third = z.unbind(-1)
    one = torch.logaddexp(logsigmoid(first) + logsigmoid(second), logsigmoid(-first) + logsigmoid(third))
    zero = torch.logaddexp(logsigmoid(first) + logsigmoid(-second), logsigmoid(-first) + logsigmoid(-third))
    return one, zero


def _parts(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log densities of both branches, responsibility r of the first, and the residuals y - s_2 and y - s_3."""
    first, second, third = z.unbind(-1)
    sign = 2.0 * y - 1.0  # y is 0 or 1: q_i = sigm(sign z_i), and y - s_i = sign sigm(-sign z_i) without cancellation
    a = logsigmoid(first) + logsigmoid(sign * second)
    b = logsigmoid(-first) + logsigmoid(sign * third)
    return a, b, torch.sigmoid(a - b), sign * torch.sigmoid(-sign * second), sign * torch.sigmoid(-sign * third)


def _em_diagonal(z: Tensor, y: Tensor) -> Tensor:
    a, b, r, _, _ = _parts(z, y)
    slope = (logsigmoid(z) + logsigmoid(-z)).exp()  # s(1-s) of the gate and of both classifiers
    return slope * torch.stack([torch.ones_like(r), r, torch.sigmoid(b - a)], -1)


def _hessian(z: Tensor, y: Tensor) -> Tensor:
    a, b, r, second, third = _parts(z, y)
    u = torch.stack([torch.ones_like(r), second, -third], -1)
    weight = (r * torch.sigmoid(b - a)).unsqueeze(-1).unsqueeze(-1)
    return torch.diag_embed(_em_diagonal(z, y)) - weight * (u.unsqueeze(-1) * u.unsqueeze(-2))


def _em_root(z: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(_em_diagonal(z, y).sqrt()).movedim(-1, 0)


def _fisher_root(z: Tensor, y: Tensor | None) -> Tensor:
    """The single column ``∇p(1) / √(p(1) p(0))``, built in log space so that p(1) p(0) may underflow."""
    first, second, third = z.unbind(-1)
    one, zero = _log_probs(z)
    norm = 0.5 * (one + zero)
    gate = logsigmoid(first) + logsigmoid(-first)
    # s_2 - s_3 = s_2 (1 - s_3) - s_3 (1 - s_2)
    up, down = logsigmoid(second) + logsigmoid(-third), logsigmoid(third) + logsigmoid(-second)
    column = [
        (gate + up - norm).exp() - (gate + down - norm).exp(),
        (logsigmoid(first) + logsigmoid(second) + logsigmoid(-second) - norm).exp(),
        (logsigmoid(-first) + logsigmoid(third) + logsigmoid(-third) - norm).exp(),
    ]
    return torch.stack(column, -1).unsqueeze(0)


@dataclass(frozen=True)
class _Treatment:
    root: Callable[..., Tensor]
    width: int
    needs_targets: bool


_TREATMENTS: Registry[_Treatment] = Registry("curvature of BernoulliMixture")
_TREATMENTS.register("clip")(_Treatment(lambda z, y: psd_root(_hessian(z, y), torch.relu), 3, True))
_TREATMENTS.register("abs")(_Treatment(lambda z, y: psd_root(_hessian(z, y), torch.abs), 3, True))
_TREATMENTS.register("em")(_Treatment(_em_root, 3, True))
_TREATMENTS.register("fisher")(_Treatment(_fisher_root, 1, False))


@LIKELIHOODS.register("bernoulli_mixture")
class BernoulliMixture(Likelihood):
    """A gate chooses between two binary classifiers (methods 3.1; Botev 2020, (4.28)).

    ``p(1 | z) = π s_2 + (1 - π) s_3`` with ``π, s_2, s_3`` the sigmoids of the three outputs. Outputs ``(N, 3)`` with
    targets ``(N,)`` or ``(N, 1)`` in {0, 1} (or ``ignore_index``); sequences ``(N, T, 3)`` with ``(N, T)`` or
    ``(N, T, 1)``; images ``(N, 3, H, W)`` with ``(N, H, W)`` or ``(N, 1, H, W)``. Drawn targets have the shorter form.

    ``hessian`` is exact: ``diag(π(1-π), r s_2(1-s_2), (1-r) s_3(1-s_3)) - r(1-r) u uᵀ`` with the responsibility r and
    ``u = (1, y - s_2, -(y - s_3))``. It depends on the target and is indefinite.

    Args:
        curvature: what replaces it by a PSD matrix: ``"clip"`` drops its negative eigenvalues, ``"abs"`` reflects
            them, ``"em"`` keeps the diagonal first term, ``"fisher"`` takes its mean under the model (rank 1, needs no
            targets).
        ignore_index: target that contributes nothing; None for no such value.

    Raises:
        UnknownName: for another ``curvature``.
    """

    _channels: ClassVar[int | None] = 3

    def __init__(self, curvature: str = "clip", ignore_index: int | None = -100) -> None:
        super().__init__(ignore_index)
        self._treatment_name = curvature
        _ = self._treatment  # refuses an unknown name here and not at first use

    @property
    def _treatment(self) -> _Treatment:
        return _TREATMENTS[self._treatment_name]

    @property
    def needs_targets(self) -> bool:
        """True unless the curvature is the Fisher."""
        return self._treatment.needs_targets

    def root_width(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """1 for the Fisher, else 3, for outputs of any shape."""
        self._check_outputs(outputs.shape)
        return self._treatment.width

    def _position_targets(self, shape: Sequence[int], targets: Tensor) -> tuple[Tensor, Tensor | None]:
        with_channel = (shape[0], 1, *shape[2:]) if len(shape) > 3 else (*shape[:-1], 1)
        refuse_shape("BernoulliMixture", shape, targets, scalar_shape(shape), with_channel)
        refuse_nonfinite("BernoulliMixture", targets)
        y, keep = self._ignore(targets if targets.is_floating_point() else targets.double())
        refuse_values("BernoulliMixture", y, (y != 0) & (y != 1), f"{{0, 1}} (ignore_index={self.ignore_index})")
        y = y.unsqueeze(-1).flatten(1)
        return y, None if keep is None else keep.reshape(*y.shape, 1)

    def _position_log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        a, b, *_ = _parts(z, y)
        return torch.logaddexp(a, b).unsqueeze(-1)

    def _position_score(self, z: Tensor, y: Tensor) -> Tensor:
        a, b, r, second, third = _parts(z, y)
        return torch.stack([r - torch.sigmoid(z[..., 0]), r * second, torch.sigmoid(b - a) * third], -1)

    def _position_hessian(self, z: Tensor, y: Tensor | None) -> Tensor:
        return _hessian(z, self._needed(y, "hessian"))

    def _position_root(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self._treatment.root(z, self._needed(y, "the root") if self.needs_targets else y)

    draws_by_row = True

    def _draw(self, z: Tensor, shape: Sequence[int], generator: Source) -> Tensor:
        p = _log_probs(z)[0].exp().clamp_max(1.0)
        refuse_nonfinite_parameters("BernoulliMixture", p)
        return bernoulli(p, generator).reshape(scalar_shape(shape))

    def _predict(self, z: Tensor, shape: Sequence[int]) -> Prediction:
        one, zero = _log_probs(z)
        density = partial(self._mixture_density, tuple(shape), z.dtype)
        return binary_mixture(one.unsqueeze(-1), zero.unsqueeze(-1), shape, density)

    def _mixture_density(
        self, shape: Sequence[int], dtype: torch.dtype, density: Callable[..., Tensor], targets: Tensor
    ) -> Tensor:
        y, keep = self._position_targets(shape, targets)
        return density(y.to(dtype).unsqueeze(-1), keep)

    def _settings(self) -> dict[str, Any]:
        return {"curvature": self._treatment_name, "ignore_index": self.ignore_index}
