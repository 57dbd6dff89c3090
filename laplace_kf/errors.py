"""Typed errors: every refusal says what was given, what is allowed and what to do.

All derive from :class:`LaplaceKFError`, so ``except lk.errors.LaplaceKFError`` catches everything the package
raises on purpose.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CorruptFile",
    "IncompatiblePair",
    "InvalidTarget",
    "LaplaceKFError",
    "NonFinite",
    "NotFitted",
    "NotPositiveDefinite",
    "ShapeMismatch",
    "UnknownName",
    "UnknownOption",
    "UnsupportedLayer",
]


# What neighbours and torch call the same things.
NAMES: dict[str, str | tuple[str, ...]] = {
    "classification": "categorical",
    "multiclass": "categorical",
    "softmax": "categorical",
    "cross_entropy": "categorical",
    "crossentropy": "categorical",
    "ce": "categorical",
    "categorical_crossentropy": "categorical",
    "crossentropyloss": "categorical",
    "nllloss": "categorical",
    "binary": "bernoulli",
    "binary_classification": "bernoulli",
    "multilabel": "bernoulli",
    "bce": "bernoulli",
    "bceloss": "bernoulli",
    "bcewithlogitsloss": "bernoulli",
    "regression": "gaussian",
    "mse": ("gaussian", "squared"),
    "mseloss": "gaussian",
    "normal": "gaussian",
    "squared_error": ("gaussian", "squared"),
    "count": "poisson",
    "counts": "poisson",
    "heteroscedastic_regression": "heteroscedastic_gaussian",
    "gaussiannllloss": "heteroscedastic_gaussian",
    "poissonnllloss": "poisson",
    "kfac": ("kron", "kronecker"),
    "kronecker": "kron",
    "diagonal": "diag",
    "dense": "full",
    "gp": "full",
    "block": "layer",
    "blockdiag": "layer",
    "block_diag": "layer",
    "block_diagonal": "layer",
    "low_rank": "lowrank",
    "scalar": "isotropic",
    "ggn": ("exact", "curvature"),
    "fisher": ("sampled", "curvature"),
    "mc": "sampled",
    "ef": "empirical",
    "empirical_fisher": ("empirical", "diagonal"),
    "emp_fisher": "empirical",
    "glm": "linearized",
    "nn": "mc",
    "sampling": "mc",
    "sample": "mc",
    "samples": "mc",
    "mean": "map",
    "monte_carlo": "mc",
    "marglik": "evidence",
    "gridsearch": "nll",
    "last": "last_layer",
    "l2": "squared",
    "quadratic": "squared",
    "euclidean": "squared",
    "kl": "cross_entropy",
    "matching": "cross_entropy",
    "matching_loss": "cross_entropy",
    "jacobi": "diagonal",
    "martens": ("diagonal", "original"),
    "martens2010": "original",
    "sutskever": "recurrent",
    "tikhonov": ("factored", "identity"),
    "levenberg": "identity",
    "levenberg_marquardt": "identity",
    "marquardt": "diagonal",
    "gauss_newton": ("exact", "curvature"),
    "pi": "balanced",
}
# Names of what is chosen by another argument, or is a function of its own.
ELSEWHERE = {
    "last_layer": 'parameters="last_layer"',
    "subnetwork": "parameters=lk.Subnetwork(size)",
    "bridge": 'method="linearized", link="bridge"',
    "dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "mc_dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "ensemble": "lk.Mixture([posterior, ...])",
}
ARGUMENTS = {
    "hessian_structure": "structure",
    "subset_of_weights": "parameters",
    "prior_prec": "prior_precision",
    "prior_precision_diag": "prior_precision",
    "sigma_noise": "likelihood=lk.likelihoods.Gaussian(scale=...)",
    "n_samples": "samples",
    "num_data": "posterior.n_data = ...",
    "weight_decay": "prior_precision",
    "pred_type": "predict(method=...)",
    "link_approx": "predict(method=...)",
    "backend": "estimator",
    "last_layer_name": "parameters=[patterns]",
    "subnetwork_indices": "parameters=lk.Subnetwork(size)",
    "temperature": "posterior.n_data = ...",
}


def nearest(name: object, allowed: Iterable[str]) -> str | None:
    """The allowed name that is meant by another one: what neighbours call so, else the most similar."""
    allowed = tuple(allowed)
    word = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    known = NAMES.get(word.lower().replace("-", "_").replace(" ", "_"), ())
    for meant in (known,) if isinstance(known, str) else known:
        if meant in allowed:
            return meant
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.4)
    return near[0] if near else None


class LaplaceKFError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnsupportedLayer(LaplaceKFError):
    """A selected parameter, or the way a module uses it, that no rule covers; names the module path and a way out."""


class UnknownName(LaplaceKFError, ValueError):
    """A name that is not registered; lists the registered names and the nearest one."""

    def __init__(self, kind: str, name: object, allowed: Iterable[str]) -> None:
        self.kind, self.name, self.allowed = kind, name, tuple(sorted(allowed))
        other = ELSEWHERE.get(name.lower()) if isinstance(name, str) else None
        near = None if other else nearest(name, self.allowed)
        hint = f" Did you mean {other or repr(near)}?" if other or near else ""
        super().__init__(f"Unknown {kind} {name!r}; registered: {', '.join(map(repr, self.allowed))}.{hint}")


class UnknownOption(LaplaceKFError, TypeError):
    """An argument that nothing takes; lists those that are taken and the nearest one."""

    def __init__(self, name: str, taken: str, allowed: Iterable[str], meant: str | None = None) -> None:
        self.name, self.taken, self.allowed = name, taken, tuple(sorted(allowed))
        near = meant or ARGUMENTS.get(name) or nearest(name, self.allowed)
        hint = f" Did you mean {near if '=' in near else near + '='}?" if near else ""
        super().__init__(f"option {name!r} is taken {taken}.{hint}")


class IncompatiblePair(LaplaceKFError, ValueError):
    """Two choices that are each valid but do not work together; says which pair and what to use instead."""


class NotFitted(LaplaceKFError, RuntimeError):
    """Something that needs a fitted posterior was called before ``fit``."""


class NotPositiveDefinite(LaplaceKFError, ArithmeticError):
    """A matrix that has to be positive definite is not; names the block, its smallest eigenvalue and the knob."""

    def __init__(self, block: str, smallest: float, advice: str) -> None:
        self.block, self.smallest = block, smallest
        super().__init__(
            f"The precision of block {block!r} is not positive definite (smallest eigenvalue {smallest:.3g}). {advice}"
        )


class NonFinite(LaplaceKFError, ArithmeticError):
    """NaN or infinity in data, outputs, curvature or factors; says which batch (by index) and which tensor."""


class ShapeMismatch(LaplaceKFError, ValueError):
    """Shapes that do not fit each other; gives both shapes and what was expected."""


class InvalidTarget(LaplaceKFError, ValueError):
    """A target, a class probability or a weight of an example that cannot be: says which one, and what is allowed."""


class CorruptFile(LaplaceKFError, OSError):
    """A file that is truncated, altered or not one of ours."""
