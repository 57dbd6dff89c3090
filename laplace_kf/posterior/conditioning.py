"""The posterior once some weights are known: the exact conditional Gaussian, for pruning and quantisation.

``N(μ, Λ⁻¹)`` with the weights ``M`` held at ``v`` has the mean ``μ_F − Λ_FF⁻¹ Λ_FM (v − μ_M)`` and the precision
``Λ_FF`` at the others (optimal brain surgeon, Hassibi and Stork 1993, for any number of weights at once); with linear
constraints ``K θ = t`` besides, the mean moves by ``Λ_FF⁻¹ K_Fᵀ (K_F Λ_FF⁻¹ K_Fᵀ)⁻¹ (t − K μ)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import IncompatiblePair, InvalidArgument, NonFinite, ShapeMismatch, UnknownName
from laplace_kf.linalg import typed
from laplace_kf.models import copied
from laplace_kf.operators import Blockwise, FreePart
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.tape import FlatLayout

__all__ = ["Conditional", "Constraints", "conditioned"]

Values = Mapping[str, "Tensor | float"]
Constraints = tuple["Mapping[str, Tensor] | Tensor", Tensor]


class Conditional(dict[str, Tensor]):
    """Means of the weights by parameter name, each of its parameter's shape; the held ones exactly at their values.

    Attributes:
        precision: Λ of the posterior that was conditioned, of size P.
        held: which weights are known, bool ``(P,)`` in flat order.
    """

    precision: Blockwise
    held: Tensor

    def __init__(
        self,
        fitted: Fitted,
        precision: Blockwise,
        held: Tensor,
        wanted: Tensor,
        constraints: tuple[Tensor, Tensor] | None,
    ) -> None:
        self._fitted, self.precision, self.held = fitted, precision, held
        self._wanted, self._constraints = wanted, constraints
        centre = fitted.mean.to(precision.diag())
        super().__init__({name: part[0] for name, part in self._named(self._moved(centre[:, None])).items()})

    @cached_property
    def free(self) -> FreePart:
        """``Λ_FF⁻¹``, as vectors ``(P,)`` that are zero where held."""
        return FreePart(self.precision, self.held)

    def _moved(self, points: Tensor) -> Tensor:
        """Draws of the posterior ``(P, S)`` to draws of the conditional one; the mean to its mean."""
        known = self.held[:, None]
        change = torch.where(known, self._wanted[:, None] - points, torch.zeros_like(points))
        found = points + change
        if bool(change.any()):
            found = found - self.free.solve(self.precision.matvec(change))
        if self._constraints is not None:
            rows, targets = self._constraints
            solved, factor = self._constrained
            missing = targets[:, None] - rows @ found
            found = found + solved @ torch.cholesky_solve(missing, factor)
        return found

    @cached_property
    def _constrained(self) -> tuple[Tensor, Tensor]:
        """``Λ_FF⁻¹ Kᵀ (P, K)`` and the Cholesky factor of ``K Λ_FF⁻¹ Kᵀ``."""
        assert self._constraints is not None
        rows = self._constraints[0]
        solved = self.free.solve(rows.T)
        gram = rows @ solved
        scale = gram.diagonal().clamp_min(0).sqrt()
        relative = gram / (scale[:, None] * scale).clamp_min(torch.finfo(gram.dtype).tiny)
        smallest = float(torch.linalg.eigvalsh(relative).min()) if len(rows) and bool((scale > 0).all()) else 0.0
        if len(rows) and smallest <= 10 * len(rows) * torch.finfo(gram.dtype).eps:
            raise IncompatiblePair(
                f"the {len(rows)} linear constraints are not independent on the free weights (smallest eigenvalue "
                f"{smallest:.2g} of their correlations); leave out rows that follow from the others or that touch held "
                "weights only"
            )
        return solved, torch.linalg.cholesky(gram)

    def _named(self, points: Tensor) -> dict[str, Tensor]:
        """Columns ``(P, S)`` as ``(S, *shape)`` by parameter name, with the constants of a subnetwork."""
        rest, named = self._fitted.rest, self._fitted.parameters()
        return {
            name: (part + rest[name].to(part) if name in rest else part).to(named[name]).detach()
            for name, part in self._fitted.layout.split(points.T).items()
        }

    def model(self) -> nn.Module:
        """A copy of the network with these weights."""
        made = copied(self._fitted.model)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name in self:
                    parameter.copy_(self[name])
        return made

    @typed
    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draws from the conditional Gaussian by parameter name, each ``(n, *shape)``; held weights stay.

        A draw of the posterior is conditioned (Matheron's rule): one solve with the free part each.

        Raises:
            NotPositiveDefinite: if the precision is singular.
        """
        if n < 1:
            raise InvalidArgument(f"the number of samples must be at least 1, got {n}")
        layout = self._fitted.layout
        drawn = layout.join({name: part.to(self._wanted) for name, part in self.precision.draw(n, generator).items()})
        points = self._moved((self._fitted.mean.to(drawn) + drawn).T)
        return self._named(points)

    @typed
    def variances(self) -> dict[str, Tensor]:
        """Variances by parameter name, each ``(*shape)`` and zero where held; one solve for every free weight.

        Raises:
            NotPositiveDefinite: if the precision is singular.
        """
        size = len(self.held)
        flat = self._wanted.new_zeros(size)
        for some in (~self.held).nonzero()[:, 0].split(256):
            columns = flat.new_zeros(size, len(some))
            columns[some, torch.arange(len(some), device=some.device)] = 1
            solved = self.free.solve(columns)
            if self._constraints is not None:
                left, factor = self._constrained
                solved = solved - left @ torch.cholesky_solve(self._constraints[0] @ solved, factor)
            flat[some] = solved[some].diagonal()
        named = self._fitted.parameters()
        parts = self._fitted.layout.split(flat[None])
        return {name: part[0].to(named[name]) for name, part in parts.items()}


def conditioned(
    fitted: Fitted,
    precision: Blockwise,
    values: Values | float | None,
    masks: Mapping[str, Tensor] | None,
    constraints: Constraints | None,
) -> Conditional:
    """The conditional Gaussian; arguments as of ``LaplacePosterior.condition``, ``precision`` is Λ ``(P, P)``."""
    layout, named = fitted.layout, fitted.parameters()
    if values is None and constraints is None:
        raise IncompatiblePair(
            "condition needs values for the weights that are held, or linear constraints: "
            "posterior.condition(values=0.0, masks=masks) holds the weights under the masks at zero"
        )
    mean = fitted.mean_by_name()
    given = _values(values, masks, layout)
    held = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    wanted = {name: value.clone() for name, value in mean.items()}
    for name, mask in (masks or {}).items():
        _known("masks", name, layout)
        held[name] = _mask(name, mask, held[name].shape)
    for name, value in given.items():
        _known("values", name, layout)
        if masks is None or name not in masks:
            held[name] = torch.ones_like(held[name])
        wanted[name] = _value(name, value, held[name], wanted[name])
    _refuse_constants(fitted, held)
    like = precision.diag()
    flat_held = layout.join({name: mask[None] for name, mask in held.items()})[0].to(like.device)
    flat_wanted = layout.join(
        {name: (value - _rest(fitted, name, value))[None].to(like) for name, value in wanted.items()}
    )
    rows = None if constraints is None else _rows(constraints, fitted, like)
    found = Conditional(fitted, precision, flat_held, flat_wanted[0], rows)
    for name, mask in held.items():  # exactly, whatever the type of the curvature
        on = mask.to(found[name].device)
        found[name] = torch.where(on, wanted[name].to(found[name]), found[name])
        if not bool(torch.isfinite(found[name]).all()):
            raise NonFinite(f"the conditional mean of parameter {name!r} has NaN or infinite entries")
        assert named[name].shape == found[name].shape
    return found


def _known(what: str, name: str, layout: FlatLayout) -> None:
    if name not in layout.names:
        raise UnknownName(f"parameter in {what}", name, layout.names)


def _values(values: Values | float | None, masks: Mapping[str, Tensor] | None, layout: FlatLayout) -> dict[str, Any]:
    if values is None:
        return {}
    if isinstance(values, Mapping):
        return dict(values)
    if isinstance(values, Tensor) and values.dim():
        raise ShapeMismatch(
            f"values is a tensor of shape {tuple(values.shape)}; give one number, or tensors by parameter name: "
            f"values={{{layout.names[0]!r}: tensor}}"
        )
    return {name: float(values) for name in (layout.names if masks is None else masks)}


def _mask(name: str, mask: Any, shape: Sequence[int]) -> Tensor:
    found = torch.as_tensor(mask)
    if found.dtype != torch.bool:
        raise ShapeMismatch(
            f"the mask of {name!r} has type {found.dtype}; it must be bool, True where the weight is held: "
            f"masks[{name!r}] = mask.bool()"
        )
    if tuple(found.shape) != tuple(shape):
        raise ShapeMismatch(f"the mask of {name!r} has shape {tuple(found.shape)}, its parameter has {tuple(shape)}")
    return found.cpu()


def _value(name: str, value: Any, held: Tensor, like: Tensor) -> Tensor:
    found = torch.as_tensor(value)
    if found.dim() and found.shape != like.shape:
        raise ShapeMismatch(
            f"the values of {name!r} have shape {tuple(found.shape)}, its parameter has {tuple(like.shape)}; give "
            "them in the parameter's shape"
        )
    found = found.detach().to(like).expand_as(like)
    on = held.to(like.device)
    if not bool(torch.isfinite(found[on]).all()):
        raise NonFinite(f"the values of {name!r} have NaN or infinite entries where the weight is held")
    return torch.where(on, found, like)


def _rest(fitted: Fitted, name: str, like: Tensor) -> Tensor:
    return fitted.rest[name].to(like) if name in fitted.rest else torch.zeros_like(like)


def _refuse_constants(fitted: Fitted, held: Mapping[str, Tensor]) -> None:
    """Single weights of a subnetwork are all that can be conditioned on: the others have no distribution."""
    if not fitted.rest:
        return
    layout = fitted.layout
    covered = layout.split(torch.ones(1, layout.size))
    for name, mask in held.items():
        outside = mask & ~covered[name][0].bool()
        if bool(outside.any()):
            raise IncompatiblePair(
                f"the mask of {name!r} holds {int(outside.sum())} weights that are not in the posterior's subnetwork "
                "and are constants; hold weights of the subnetwork only, or fit whole parameters"
            )


def _rows(constraints: Constraints, fitted: Fitted, like: Tensor) -> tuple[Tensor, Tensor]:
    """``K (K, P)`` and the targets for the flat weights."""
    layout = fitted.layout
    given, targets = constraints
    right = torch.as_tensor(targets).to(like).reshape(-1)
    if isinstance(given, Mapping):
        for name in given:
            _known("constraints", name, layout)
        parts = {}
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            part = given.get(name)
            if part is None:
                part = like.new_zeros(len(right), *shape)
            if tuple(part.shape) != (len(right), *shape):
                raise ShapeMismatch(
                    f"the constraints on {name!r} have shape {tuple(part.shape)}; for {len(right)} targets and a "
                    f"parameter {tuple(shape)} it must be {(len(right), *shape)}"
                )
            parts[name] = part.detach().to(like)
            if name in fitted.rest:  # what the constants of a subnetwork contribute
                right = right - (parts[name] * fitted.rest[name].to(like)).flatten(1).sum(1)
        rows = layout.join(parts)
    else:
        rows = given.detach().to(like)
        if tuple(rows.shape) != (len(right), layout.size):
            raise ShapeMismatch(
                f"constraints are (K, P) and (K,) with P = {layout.size} (or by parameter name), got "
                f"{tuple(rows.shape)} and {len(right)} targets"
            )
    if not bool(torch.isfinite(rows).all()) or not bool(torch.isfinite(right).all()):
        raise NonFinite("the linear constraints have NaN or infinite entries")
    return rows, right
