"""What is supported, printed from the registries."""

from __future__ import annotations

import inspect

from laplace_kf.estimators import ESTIMATORS
from laplace_kf.layers import rule_names
from laplace_kf.layers.base import AffineRule, MatrixRule
from laplace_kf.likelihoods import LIKELIHOODS
from laplace_kf.operators import DAMPINGS
from laplace_kf.structures import STRUCTURES

__all__ = ["support_table"]


def _first_line(entry: object) -> str:
    module = inspect.getmodule(entry)
    text = inspect.cleandoc((module.__doc__ if module else None) or "")
    return text.split("\n\n")[0].replace("\n", " ").split(": ", 1)[-1].rstrip(".")


def support_table() -> str:
    """A markdown table of layers, likelihoods, estimators, structures and dampings, as registered (a string)."""
    rows = []
    for name, rule in rule_names().items():
        block = "Kronecker pair, diagonal, full" if isinstance(rule, MatrixRule) else "diagonal or small dense block"
        assert isinstance(rule, (MatrixRule, AffineRule))
        rows.append(("layer", f"`{name}`", f"{', '.join(f'`{m}`' for m in rule.modules)}: {block}"))
    rows.append(("layer", "any other", "per-example gradients: diagonal or small dense block inside a Kronecker one"))
    rows += [("likelihood", f"`{name}`", _summary(entry)) for name, entry in LIKELIHOODS.items()]
    rows.append(("likelihood", "`FromDistribution(fn)`", "any `torch.distributions.Distribution` of the outputs"))
    rows += [("estimator", f"`{name}`", _first_line(entry)) for name, entry in ESTIMATORS.items()]
    rows += [("structure", f"`{name}`", _first_line(entry)) for name, entry in STRUCTURES.items()]
    rows += [("damping", f"`{name}`", _summary(entry)) for name, entry in DAMPINGS.items()]
    lines = ["| kind | name | what |", "|---|---|---|"]
    lines += [f"| {kind} | {name} | {what.replace('|', chr(92) + '|')} |" for kind, name, what in rows]
    return "\n".join(lines)


def _summary(entry: object) -> str:
    return inspect.cleandoc(entry.__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
