"""The same numbers from laplace-torch and from this package, where both compute the same thing (docs/migrating.md).

A network of 4-8-3 (or 4-8-2) in float64, 60 examples, λ = 0.7. Kronecker factors are compared without biases too:
laplace-torch gives a bias a block of its own, here it is a column of its weight (methods 4.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kf as lk

PRIOR = 0.7
KINDS = {"classification": ("categorical", 3), "regression": ("gaussian", 2)}
CASES = [
    (kind, parameters, structure, bias)
    for kind in KINDS
    for parameters in ("all", "last_layer")
    for structure, bias in (("full", True), ("diag", True), ("kron", False), ("kron", True))
]
ALIKE = 1e-9


def network(outputs: int, bias: bool) -> nn.Sequential:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, last = (nn.Linear(i, o, bias, dtype=torch.float64) for i, o in ((4, 8), (8, outputs)))
        return nn.Sequential(first, nn.Tanh(), last)


def problem(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training inputs ``(60, 4)``, targets, and test inputs ``(5, 4)``."""
    rng = torch.Generator().manual_seed(0)
    x, new = torch.randn(60, 4, generator=rng).double(), torch.randn(5, 4, generator=rng).double()
    if kind == "classification":
        return x, torch.randint(3, (60,), generator=rng), new
    return x, torch.randn(60, 2, generator=rng).double(), new


def ours(kind: str, parameters: str, structure: str, bias: bool) -> tuple[float, Tensor]:
    """Log evidence, and the covariances ``(5, C, C)`` of the linearised outputs."""
    likelihood, outputs = KINDS[kind]
    x, y, new = problem(kind)
    posterior = lk.LaplacePosterior(
        network(outputs, bias), likelihood, structure, parameters=parameters, prior_precision=PRIOR
    ).fit(x, y)
    return float(posterior.log_evidence()), posterior.functional_covariance(new)


def theirs(kind: str, parameters: str, structure: str, bias: bool) -> tuple[float, Tensor]:
    """The same from laplace-torch.

    Raises:
        ImportError: if it is not installed.
    """
    from laplace import Laplace

    x, y, new = problem(kind)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # its matrices are made in torch's default type
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = network(KINDS[kind][1], bias)
            posterior = Laplace(
                model, kind, subset_of_weights=parameters, hessian_structure=structure, prior_precision=PRIOR
            )
            posterior.fit(loader)
            return float(posterior.log_marginal_likelihood()), posterior._glm_predictive_distribution(new)[1].detach()
    finally:
        torch.set_default_dtype(default)


def run(rounds: int = 1, peer: Callable[[str, str, str, bool], tuple[float, Tensor]] = theirs) -> dict[str, Any]:
    """Evidence and the first variance by both, and the relative difference of all covariances, case by case."""
    cases = []
    for case in CASES:
        (evidence, covariance), (their_evidence, their_covariance) = ours(*case), peer(*case)
        difference = float((covariance - their_covariance).norm() / covariance.norm())
        cases.append({
            "kind": case[0], "parameters": case[1], "structure": case[2], "bias": case[3],
            "evidence": evidence, "variance": float(covariance[0, 0, 0]),
            "their_evidence": their_evidence, "their_variance": float(their_covariance[0, 0, 0]),
            "difference": difference, "alike": difference < ALIKE and abs(evidence / their_evidence - 1) < ALIKE,
        })  # fmt: skip
    return {"workload": "4-8-3 and 4-8-2, 60 examples, λ = 0.7, float64", "peer": "laplace-torch 0.3", "cases": cases}


def text(result: dict[str, Any]) -> str:
    """The result as a few lines."""
    lines = [result["workload"]]
    for case in result["cases"]:
        name = f"{case['kind']}, {case['parameters']}, {case['structure']}{'' if case['bias'] else ', no biases'}"
        lines.append(f"{name:45} {case['evidence']:12.6f} {case['their_evidence']:12.6f} {case['difference']:.1e}")
    return "\n".join(lines)
