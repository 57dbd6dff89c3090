"""What optimisers are set by, one object per concern: factors, damping, step, scope; of Hessian-free also the system.

Optimisers and presets take the fields of these objects as keyword arguments. :func:`shows` writes them, with the
defaults that hold there, into a constructor's or preset's signature and documentation; the typed dictionaries at the
end say the same to editors and type checkers (a test compares them).
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

import torch

from laplace_kf.batches import Forward
from laplace_kf.errors import IncompatiblePair
from laplace_kf.estimators import ESTIMATORS, Estimator
from laplace_kf.operators import DAMPINGS
from laplace_kf.optim.arguments import check_arguments
from laplace_kf.optim.cg import Progress
from laplace_kf.optim.damping import GreedySearch, LevenbergMarquardt
from laplace_kf.optim.preconditioner import Preconditioner
from laplace_kf.optim.recipes import Recipe
from laplace_kf.reading import Part
from laplace_kf.structures import Structure
from laplace_kf.weighting import Weights

__all__ = [
    "Curvature",
    "Damping",
    "DiagonalPreset",
    "Factors",
    "GaussNewtonDamping",
    "GaussNewtonPreset",
    "GaussNewtonSettings",
    "GaussNewtonStep",
    "HessianFreePreset",
    "HessianFreeSettings",
    "Preconditioning",
    "Scope",
    "Settings",
    "Step",
    "System",
    "shows",
    "sorted_into",
]


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"text": text})


class Settings:
    """Base of the settings of one concern: checks its numbers."""

    def __post_init__(self) -> None:
        names = (entry.name for entry in dataclasses.fields(self))  # type: ignore[arg-type]
        check_arguments({"power" if name == "exponent" else name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Curvature(Settings):
    """Which approximate curvature is measured."""

    estimator: str | Estimator = _field(
        "recursive",
        '``"recursive"`` (KFRA), ``"sampled"`` (KFAC), ``"exact"`` (KFLR), ``"projection"``, ``"importance"`` or '
        '``"auto"``.',
    )
    structure: str | Structure = _field("kron", '``"kron"``, ``"diag"`` or another structure of the engine.')


@dataclass(frozen=True)
class Factors(Settings):
    """The approximate curvature that gives the direction, and its inverse."""

    inverse: str = _field("block_diagonal", '``"block_diagonal"`` or ``"block_tridiagonal"`` (methods 5.5).')
    damping: str = _field(
        "balanced",
        'how ``ζ + l2`` enters a Kronecker block: ``"balanced"`` (with ω), ``"factored"`` or ``"exact"``.',
    )
    power: float = _field(
        1.0, 'exponent of the inverse, ``(C̃ + ζ)^-power``; other than 1 needs ``damping="exact"`` (methods 8.2).'
    )
    ema: float = _field(
        0.9,
        "limit of the moving average of the factors (:func:`laplace_kf.optim.running_statistics.averaged`); 0: none.",
    )
    refresh: int = _field(1, "steps between fresh inverses (the first three always get one).")
    factors_every: int = _field(
        1,
        "steps between minibatches that go into the factors (each of the first three does); a divisor of ``refresh``. "
        "With ``refresh`` itself, factors cost what a refresh costs, and the average reaches as many times further "
        "back.",
    )
    curvature_fraction: float | tuple[float, float] = _field(
        1.0,
        "part of each minibatch for the factors and for the exact products, one number or a pair (τ₁, τ₂ of methods "
        "4.4); 128 examples at the least.",
    )
    low_rank: bool | None = _field(
        False,
        "in ``step(x, y)``, apply the inverses to the factors of the gradient of layers where that is cheaper (methods "
        "5.6). Needs block-diagonal products; with a part of the minibatch in the factors, a chain of layers on rows. "
        "With ``l2`` from the second step with the same inverse on: weight decay is then solved for at the first of "
        "them, and again when the direction might miss more than a thousandth of its length. ``None``: where it can "
        "be and pays.",
    )

    def __post_init__(self) -> None:
        check_arguments(
            {name: getattr(self, name) for name in ("power", "ema", "refresh", "low_rank", "factors_every")}
        )
        if self.refresh % self.factors_every:
            raise IncompatiblePair(
                f"factors_every={self.factors_every} does not divide refresh={self.refresh}, so that some inverses "
                f"would be made of old factors; take factors_every={self.refresh} or 1"
            )
        fraction = self.curvature_fraction
        if isinstance(fraction, tuple) and len(fraction) != 2:
            raise IncompatiblePair(f"curvature_fraction is one number in (0, 1] or a pair, got {fraction}")
        for part in self.parts:
            check_arguments({"curvature_fraction": part})

    @property
    def parts(self) -> tuple[float, float]:
        """The shares of a minibatch for the factors and for the exact products."""
        fraction = self.curvature_fraction
        return fraction if isinstance(fraction, tuple) else (fraction, fraction)


@dataclass(frozen=True)
class Damping(Settings):
    """How much is added to the curvature, and how that adapts."""

    tau: float | None = _field(
        None,
        "damping of the exact curvature (λ of Hessian-free); default 150 for losses summed over many outputs, else 1.",
    )
    zeta: float | None = _field(
        None, "damping of the approximate curvature; default as ``tau``. K-FAC's γ is ``√(zeta + l2)``."
    )
    adapt_tau: bool = _field(True, "adapt ``tau`` (or the trust radius) by ``tau_rule``.")
    adapt_zeta: bool = _field(True, "adapt ``zeta`` by ``zeta_rule``; of Hessian-free, a given one moves with ``tau``.")
    tau_rule: LevenbergMarquardt | None = _field(None, "period, factor and thresholds for ``tau``.")


@dataclass(frozen=True)
class GaussNewtonDamping(Damping):
    """With the search for the damping of the factors."""

    zeta_rule: GreedySearch | None = _field(None, "period, factor and scale of the search for ``zeta``.")
    search_start: bool = _field(
        False,
        "at the first step, take the one of ``tau`` and ``zeta`` that was not given, or both, from a wide ladder, by "
        "the loss after one update (:class:`laplace_kf.optim.damping.StartSearch`); costs about as much as 10 steps.",
    )


@dataclass(frozen=True)
class Step(Settings):
    """The objective, and what becomes of a proposed update."""

    l2: float = _field(0.0, "coefficient η of the regulariser.")
    lr: float = _field(1.0, "factor on the final update; schedulers change it through the parameter groups.")
    averaging: float | None = _field(
        None, "limit of the average of the iterates (0.95 in Botev et al. 2017, B.4), ``None`` for none."
    )
    max_rise: float = _field(
        0.5,
        "steps that raise the loss of their own minibatch by more than this share of its size are refused and tried "
        "again with more damping (:class:`laplace_kf.optim.base.SecondOrder`); infinity for no limit.",
    )


@dataclass(frozen=True)
class GaussNewtonStep(Step):
    """With the length of the step."""

    rescale: bool = _field(
        True,
        "length of the step from the exact quadratic model; ``False`` takes the direction as it is, which with "
        '``damping="factored"`` and fixed damping is the plain factored Tikhonov update (methods 6.4).',
    )
    momentum: bool = _field(False, "also search along the previous update (methods 6.2).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum and not self.rescale:
            raise IncompatiblePair("momentum=True chooses the length of the step from the model: it needs rescale=True")


@dataclass(frozen=True)
class Scope(Settings):
    """Which parameters are trained, on which batches."""

    parameters: str | Sequence[str] = _field("all", '``"all"`` or name patterns.')
    groups: Sequence[Mapping[str, Any]] = _field(
        (), "parameter groups by name pattern, some of them perhaps ``first_order``."
    )
    inputs: Part | None = _field(
        None, "with ``targets``, a function of a batch of another form: ``outputs = model(*inputs(batch))``."
    )
    targets: Part | None = _field(None, "the other one.")
    forward: Forward | None = _field(None, "instead of them, ``(model, batch) -> (outputs, targets)``.")
    weights: Weights = _field(
        False,
        'batches are ``(x, y, w)`` or mappings with ``"weights"``: ``step((x, y, w))``; or a function of a batch. The '
        "weight of an example multiplies its ``−log p`` and its curvature; means are over examples (of weight > 0; "
        "methods 17.11).",
    )
    generator: torch.Generator | None = _field(None, "random numbers; with one, training is reproducible.")
    unused: str = _field(
        "error",
        'what becomes of parameters that the minibatches so far did not reach: ``"error"``, or ``"prior"``: their '
        "curvature is 0 (the damping alone moves them), until one reaches them.",
    )
    process_group: Any = _field(
        None,
        "a ``torch.distributed`` group whose processes all make the same calls, each with minibatches of its own: one "
        "step is of all of them. Gradients are added up in ``backward``, factors once a refresh.",
    )


@dataclass(frozen=True)
class System(Settings):
    """The linear system of a Hessian-free step, and how conjugate gradients are run on it."""

    recipe: str | Recipe = _field(
        "original", "name in ``RECIPES`` or a :class:`Recipe`: limits, warm start and choice of the iterate."
    )
    termination: Progress | None = _field(None, "of CG, by relative progress.")
    momentum: bool = _field(True, "start CG from the decayed solution of the step before.")
    penalty: str | None = _field(
        None,
        'D of the damping ``λ D`` (methods 7.7), a name of ``PENALTIES``: ``"identity"``, ``"diagonal"`` (exact '
        'diag(G)), ``"sampled_diagonal"``, ``"preconditioner"`` (CᵀC, the structured curvature of the '
        'preconditioner), ``"curvature"`` (D = B).',
    )
    scale_sensitive: bool = _field(False, 'another way to say ``penalty="diagonal"``.')
    reduction: str = _field(
        "undamped",
        'whether ρ compares with the ``"undamped"`` model, of ``G + μ D_h + η I``, or the ``"damped"`` one, with '
        "``λ D`` as well. Structural damping (μ) is in both: it is part of the model, λ is not.",
    )
    structural_damping: float | None = _field(
        None,
        "μ of the penalty on changes of hidden activities, for recurrent networks (1/30 in Martens 2016, 4.13). A "
        "diagonal preconditioner takes it in (an estimate by random signs), a Kronecker one leaves it out.",
    )
    hidden: Sequence[str] | None = _field(
        None, "name patterns of the modules whose outputs are hidden activities; default: all recurrent modules."
    )
    distance: str = _field(
        "squared",
        'of hidden activities: ``"squared"`` or ``"cross_entropy"``, for logistic units only: torch recurrent layers '
        "are refused, other activities outside [0, 1] at the step.",
    )
    trust_radius: float | None = _field(
        None, "solve within ``‖δ‖_P ≤ radius`` by Steihaug–Toint in place of damping with λ."
    )
    curvature_fraction: float = _field(
        1.0, "part of each minibatch for the products; ``step(..., curvature=batch)`` brings another one."
    )


@dataclass(frozen=True)
class Preconditioning(Settings):
    """The preconditioner of conjugate gradients."""

    preconditioner: str | Preconditioner | None = _field(
        "diagonal", '``"none"``, ``"diagonal"``, ``"kronecker"``, or a :class:`Preconditioner`.'
    )
    kappa: float | None = _field(
        None,
        "κ of the preconditioner ``(d + κ)^ξ``, in units of the mean curvature (methods 7.6); default 0.01 where D may "
        "be singular or there is a trust region, else 0.",
    )
    exponent: float | None = _field(
        None,
        'ξ of the preconditioner; default 0.75 for ``"diagonal"``, 1 for ``"kronecker"``, which needs '
        '``damping="exact"`` for another one.',
    )
    inverse: str = _field("block_diagonal", "of the preconditioner, as for :class:`laplace_kf.optim.GaussNewton`.")
    damping: str | None = _field(None, "of the preconditioner's blocks; default: that of its kind.")
    ema: float = _field(0.0, "limit of the moving average of the preconditioner's factors; 0: none.")
    refresh: int = _field(1, "steps between fresh preconditioners.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None:
            DAMPINGS[self.damping]  # refuses other names, and numbers


# ------------------------------------------------------------------------------------------------ keyword arguments

F = TypeVar("F", bound=Callable[..., Any])


def sorted_into(given: Mapping[str, Any], *groups: type[Settings]) -> tuple[list[Any], dict[str, Any]]:
    """One object of every group from the keyword arguments that are its fields, and the arguments that are left."""
    left = dict(given)
    made = [
        group(**{e.name: left.pop(e.name) for e in dataclasses.fields(group) if e.name in left})  # type: ignore[arg-type]
        for group in groups
    ]
    return made, left


def shows(
    *groups: type[Settings],
    options: str = "",
    drawn_by: str | None = None,
    without: Sequence[str] = (),
    **defaults: Any,
) -> Callable[[F], F]:
    """Decorator: fields of settings take the place of ``**settings`` in a signature, and are documented.

    Args:
        groups: whose fields are keyword arguments.
        options: what further keyword arguments are taken; nothing: there are none.
        drawn_by: registered name of an estimator whose own arguments (``samples``) are shown, too.
        without: arguments that the decorated function makes itself.
        **defaults: by argument, where they differ from the settings'.
    """

    def change(function: F) -> F:
        plain = inspect.signature(function)
        own = [p for p in plain.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        entries = [entry for group in groups for entry in dataclasses.fields(group)]  # type: ignore[arg-type]
        entries = [entry for entry in entries if entry.name not in (*plain.parameters, *without)]
        shown = [
            inspect.Parameter(
                e.name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(e.name, e.default), annotation=e.type
            )
            for e in entries
        ]
        told = {entry.name: entry.metadata["text"] for entry in entries}
        if drawn_by is not None:
            rule = ESTIMATORS[drawn_by]
            text = f'of estimator ``"{drawn_by}"``, see :class:`{rule.__module__}.{rule.__name__}`.'
            for parameter in inspect.signature(rule).parameters.values():
                default = defaults.get(parameter.name, parameter.default)
                shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default))
                told[parameter.name] = text
        if options:
            shown.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation="Any"))
            told["**options"] = options
        function.__signature__ = plain.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        function.__doc__ = _documented(inspect.cleandoc(function.__doc__ or ""), told)
        return function

    return change


def _documented(text: str, told: Mapping[str, str]) -> str:
    """A docstring whose ``Args:`` go on with ``told``; what comes after them (``Raises:``) stays after them."""
    lines = [
        textwrap.fill(f"{name}: {what}", 116, initial_indent="    ", subsequent_indent="        ")
        for name, what in told.items()
    ]
    head, _, rest = text.partition("\nArgs:\n")
    args, *after = rest.split("\n\n", 1)
    return "\n".join([f"{head}\nArgs:", args, *lines, *(["", *after] if after else [])])


class _Common(TypedDict, total=False):
    tau: float | None
    zeta: float | None
    adapt_tau: bool
    adapt_zeta: bool
    tau_rule: LevenbergMarquardt | None
    l2: float
    lr: float
    averaging: float | None
    max_rise: float
    parameters: str | Sequence[str]
    groups: Sequence[Mapping[str, Any]]
    inputs: Part | None
    targets: Part | None
    forward: Forward | None
    weights: Weights
    generator: torch.Generator | None
    unused: str
    process_group: Any
    ema: float
    refresh: int
    inverse: str
    momentum: bool
    # of structures and estimators
    samples: int
    columns: float
    noise: str
    vector_blocks: str
    sharing: str
    max_side: int


class DiagonalPreset(_Common, total=False):
    """The keyword arguments of :func:`laplace_kf.optim.diagonal`, for editors and type checkers."""

    estimator: str | Estimator
    structure: str | Structure
    damping: str
    factors_every: int
    curvature_fraction: float | tuple[float, float]
    low_rank: bool | None
    zeta_rule: GreedySearch | None
    search_start: bool
    rescale: bool
    rank: int


class GaussNewtonPreset(DiagonalPreset, total=False):
    """The keyword arguments of presets of :class:`laplace_kf.optim.GaussNewton`, for editors and type checkers."""

    power: float


class GaussNewtonSettings(_Common, total=False):
    """As :class:`GaussNewtonPreset`, without what the constructor also takes by position."""

    damping: str
    power: float
    factors_every: int
    curvature_fraction: float | tuple[float, float]
    low_rank: bool | None
    zeta_rule: GreedySearch | None
    search_start: bool
    rescale: bool
    rank: int


class HessianFreePreset(_Common, total=False):
    """The keyword arguments of presets of :class:`laplace_kf.optim.HessianFree`, for editors and type checkers."""

    recipe: str | Recipe
    termination: Progress | None
    penalty: str | None
    scale_sensitive: bool
    reduction: str
    hidden: Sequence[str] | None
    distance: str
    trust_radius: float | None
    curvature_fraction: float
    preconditioner: str | Preconditioner | None
    kappa: float | None
    exponent: float | None
    damping: str | None


class HessianFreeSettings(HessianFreePreset, total=False):
    """With the argument that a preset may also be given by position."""

    structural_damping: float | None
