"""What every combination of layer rule × likelihood × estimator × structure owes, checked on the rules' own examples.

A new rule needs no line here: its examples come from its registration. The references are dense: Jacobians by plain
autograd, output curvature as the Hessian of ``-log_prob`` (or the root's product, where it may be indefinite).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf.errors import IncompatiblePair, NotPositiveDefinite, UnsupportedLayer
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.layers import rule_names
from laplace_kf.likelihoods import LIKELIHOODS
from laplace_kf.structures import STRUCTURES
from tests.checks import close

__all__ = ["FACTORS", "Combination", "choices", "owes", "problem", "taken"]

# The structures whose matrix is a plain function of the dense Gauss-Newton matrix and of the blocks' flat positions.
TRUTHS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "full": lambda ggn, blocks: ggn,
    "diag": lambda ggn, blocks: torch.diag(ggn.diagonal()),
    "layer": lambda ggn, blocks: _block_diagonal(ggn, blocks),
    "isotropic": lambda ggn, blocks: ggn.diagonal().mean() * torch.eye(len(ggn), dtype=ggn.dtype),
}
DRAWS = 150  # copies of every example, for what holds in expectation only
SPREAD = 0.3  # relative error of such a mean, three times what is seen


def _block_diagonal(ggn: Tensor, blocks: list[Tensor]) -> Tensor:
    out = torch.zeros_like(ggn)
    for index in blocks:
        out[index[:, None], index] = ggn[index[:, None], index]
    return out


def choices() -> dict[str, dict[str, Callable[[], Any]]]:
    """Factor → test id → thunk of what to try. The id starts with the registered name.

    An entry that cannot be tried is there too, with a thunk that says so.
    """
    return {
        "layer": _numbered({name: _layer_examples(name, rule) for name, rule in rule_names().items()}),
        "likelihood": _numbered({name: _examples("likelihood", name, entry) for name, entry in LIKELIHOODS.items()}),
        "estimator": _numbered({name: _examples("estimator", name, entry) for name, entry in ESTIMATORS.items()}),
        "structure": _numbered({name: _examples("structure", name, entry) for name, entry in STRUCTURES.items()}),
    }


def _numbered(found: Mapping[str, list[Callable[[], Any]]]) -> dict[str, Callable[[], Any]]:
    return {
        name if len(thunks) == 1 else f"{name}.{k}": thunk
        for name, thunks in found.items()
        for k, thunk in enumerate(thunks)
    }


def _layer_examples(name: str, rule: Any) -> list[Callable[[], Any]]:
    return list(rule.examples) or [
        _without(f"layer rule {name!r} has no examples: give its constructor examples=(...)")
    ]


def _examples(kind: str, name: str, entry: Any) -> list[Callable[[], Any]]:
    try:
        count = len(entry.examples())
    except Exception as error:  # whatever its constructor says
        count, said = 0, repr(error)
    else:
        said = "it has none"
    if not count:
        return [_without(f"{kind} {name!r} has no examples ({said}): give it a classmethod examples()")]
    return [functools.partial(_one, entry, k) for k in range(count)]


def _one(entry: Any, k: int) -> Any:
    return entry.examples()[k]


def _without(message: str) -> Callable[[], Any]:
    def fail() -> Any:
        raise AssertionError(message)

    return fail


FACTORS = choices()


class Network(nn.Module):
    """The layer, a nonlinearity, and a head with as many outputs as the likelihood takes."""

    def __init__(self, layer: nn.Module, x: Tensor, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer(x).flatten(1).shape[1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)  # already (N, features): nothing in between, so that a chain stays one
        return self.head(torch.tanh(hidden if hidden.dim() == 2 else hidden.flatten(1)))


@dataclass
class Combination:
    """One problem: a float64 network, its data, and the four rules."""

    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: Any
    estimator: Any
    structure: Any

    def estimate(
        self, part: slice = slice(None), repeats: int = 1, estimator: Any = None, structure: Any = None
    ) -> Any:
        x, y = (torch.cat([t[part]] * repeats) for t in (self.x, self.y))
        return lk.curvature.estimate(
            self.model, self.likelihood, [(x, y)], structure=structure or self.structure,
            estimator=estimator or self.estimator, generator=torch.Generator().manual_seed(5),
        )  # fmt: skip

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """(N, C, P) in flat parameter order, one backward pass for every output of every example."""
        weights = list(self.model.parameters())
        with torch.enable_grad():
            outputs = self.model(self.x)
            rows = [torch.autograd.grad(out, weights, retain_graph=True) for out in outputs.flatten()]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).reshape(*outputs.shape, -1)

    @functools.cached_property
    def curvature(self) -> Tensor:
        """(N, C, C): what the likelihood's output curvature has to be."""
        with torch.no_grad():
            outputs = self.model(self.x)
        if self.likelihood.natural:
            with torch.enable_grad():
                z = outputs.clone().requires_grad_()
                slope = torch.autograd.grad(-self.likelihood.log_prob(z, self.y).sum(), z, create_graph=True)[0]
                rows = [torch.autograd.grad(each.sum(), z, retain_graph=True)[0] for each in slope.unbind(1)]
            return torch.stack(rows, 1)
        root = self.likelihood.hessian_root(outputs, self.y)
        return torch.einsum("vnc,vnd->ncd", root, root)

    @functools.cached_property
    def ggn(self) -> Tensor:
        """(P, P), the mean over examples."""
        return torch.einsum("ncp,ncd,ndq->pq", self.jacobian, self.curvature, self.jacobian) / len(self.x)


def plainest(names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The first example of the plainest rule of every kind, out of the test ids of each kind."""
    rules = {"layer": "linear", "likelihood": "categorical", "estimator": "exact", "structure": "kron"}
    return {kind: next(each for each in names[kind] if each.split(".")[0] == rule) for kind, rule in rules.items()}


def problem(layer: str, likelihood: str, estimator: str, structure: str) -> Combination:
    """The combination of four test ids of :data:`FACTORS`."""
    factors = choices()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module, x = factors["layer"][layer]()
        rule, count = factors["likelihood"][likelihood]()
        x = x.double() if x.is_floating_point() else x
        model = Network(module.double(), x, count).double().eval()
        with torch.no_grad():
            outputs = model(x)
    y = rule.sample(outputs, generator=torch.Generator().manual_seed(11))
    return Combination(model, x, y, rule, factors["estimator"][estimator](), factors["structure"][structure]())


def taken(made: Combination) -> Any:
    """Statistics of a combination, or ``None`` where it is refused (typed, by name)."""
    try:
        return made.estimate()
    except (IncompatiblePair, UnsupportedLayer) as error:
        words = (made.estimator.name, made.structure.name, type(made.likelihood).__name__, "layer", "head")
        if not any(word in str(error) for word in words):
            raise AssertionError(f"the refusal names nothing of the combination: {error}") from error
        return None


def owes(made: Combination, folder: Path) -> str:
    """Everything a combination owes; says whether it was kept or is refused."""
    statistics = taken(made)
    if statistics is None:
        return "refused"
    mean = statistics.mean()
    _curvature(made, statistics, mean)
    _posterior(made, statistics, mean.dense(), folder)
    return "kept"


def _curvature(made: Combination, statistics: Any, mean: Any) -> None:
    dense = mean.dense()
    close(dense, dense.T)
    largest = float(dense.abs().max())
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-10 * largest, (
        "the mean curvature is not positive semi-definite"
    )
    close(mean.diag(), dense.diagonal())
    v = torch.randn(len(dense), 2, dtype=dense.dtype, generator=torch.Generator().manual_seed(1))
    close(mean.matvec(v), dense @ v)
    assert statistics.n_data == len(made.x)
    close(statistics.scale(0.5).mean().dense(), dense)
    if not (made.estimator.draws or made.estimator.averages or made.structure.several_passes):
        both = made.estimate(slice(0, 2)) + made.estimate(slice(2, None))
        close(both.mean().dense(), dense, 1e-9)
    truth = TRUTHS.get(made.structure.name)
    if truth is None or not made.estimator.is_ggn:
        return
    layout = statistics.layout
    wanted = truth(made.ggn, [layout.positions(block) for block in statistics.blocks.values()])
    if not made.estimator.draws and not made.estimator.averages:
        close(dense, wanted, 1e-9)
    elif made.estimator.draws and made.likelihood.natural:  # else drawn targets estimate the Fisher, another matrix
        several = made.estimate(repeats=DRAWS).mean().dense()
        assert float((several - wanted).norm() / wanted.norm()) < SPREAD, "its mean is not the Gauss-Newton matrix"


def _posterior(made: Combination, statistics: Any, mean: Tensor, folder: Path) -> None:
    posterior = lk.LaplacePosterior(
        made.model, made.likelihood, structure=made.structure, estimator=made.estimator, prior_precision=0.7
    ).adopt(statistics)
    posterior.n_data = n = 2.0 * len(made.x)
    size = len(mean)
    wanted = n * mean + 0.7 * torch.eye(size, dtype=mean.dtype)
    _matrix(posterior.precision, wanted)
    covariance = made.jacobian @ torch.linalg.inv(wanted) @ made.jacobian.mT
    close(posterior.functional_covariance(made.x), covariance, 1e-7)
    _penalty(made, posterior, wanted)
    theta = torch.cat([p.detach().reshape(-1) for p in made.model.parameters()])
    with torch.no_grad():
        fit = n / len(made.x) * made.likelihood.log_prob(made.model(made.x), made.y).sum()
    evidence = fit - 0.5 * (torch.logdet(wanted) - size * math.log(0.7)) - 0.35 * theta @ theta
    close(posterior.log_evidence().detach().double(), evidence, 1e-9)
    for method in ("map", "mc", "linearized"):
        prediction = posterior.predict(made.x, method=method, samples=8, generator=torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(prediction.log_prob(made.y)).all()), method
    _probit(made, posterior)
    try:
        chained = posterior.update([(made.x, made.y)], generator=torch.Generator().manual_seed(5))
    except IncompatiblePair as error:
        if made.structure.name not in str(error) and "block" not in str(error):
            raise AssertionError(f"the refusal to chain names neither structure nor block: {error}") from error
        chained = None
    if chained is not None and not made.structure.several_passes:
        again = wanted + len(made.x) * mean  # the same data once more, the same draws
        close(chained.precision.matvec(theta), again @ theta, 1e-7)
        close(chained.functional_covariance(made.x), made.jacobian @ torch.linalg.inv(again) @ made.jacobian.mT, 1e-6)
    for kept in filter(None, (posterior, chained)):
        _saved(made, kept, folder)


def _probit(made: Combination, posterior: Any) -> None:
    """The probit approximation, or a refusal that names the likelihood where it has none."""
    if "probit" in made.likelihood.links():
        assert bool(torch.isfinite(posterior.predict(made.x, method="probit").log_prob(made.y)).all())
        return
    with pytest.raises(IncompatiblePair, match=type(made.likelihood).__name__):
        posterior.predict(made.x, method="probit")


def _matrix(matrix: Any, wanted: Tensor) -> None:
    """Every operation of a precision against its dense form."""
    close(matrix.dense(), wanted, 1e-9)
    v = torch.randn(len(wanted), 2, dtype=wanted.dtype, generator=torch.Generator().manual_seed(2))
    close(matrix.matvec(v), wanted @ v, 1e-9)
    close(matrix.solve(v), torch.linalg.solve(wanted, v), 1e-7)
    close(matrix.quadratic(v), v.T @ torch.linalg.solve(wanted, v), 1e-7)
    close(matrix.logdet().detach(), torch.logdet(wanted), 1e-9)
    draws = matrix.sample(4000, generator=torch.Generator().manual_seed(4))
    assert draws.shape == (4000, len(wanted))
    white = draws @ torch.linalg.cholesky(wanted)  # standard normal, if the draws have covariance wanted⁻¹
    assert abs(float(white.square().mean()) - 1) < 0.05
    assert float(white.mean(0).abs().max()) < 0.1


def _penalty(made: Combination, posterior: Any, wanted: Tensor) -> None:
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.1)
        try:
            found = posterior.penalty()
        finally:
            for p in made.model.parameters():
                p.sub_(0.1)
    step = torch.full((len(wanted),), 0.1, dtype=wanted.dtype)
    close(found.detach().double(), 0.5 * step @ wanted @ step, 1e-6)


def _saved(made: Combination, posterior: Any, folder: Path) -> None:
    path = folder / "posterior.safetensors"
    posterior.save(path)
    try:
        again = lk.LaplacePosterior.load(path, made.model, likelihood=made.likelihood)
    except NotPositiveDefinite as error:  # pragma: no cover (would be a fault)
        raise AssertionError("a saved posterior cannot be loaded") from error
    v = torch.ones(len(posterior.precision.diag()), dtype=torch.float64)
    close(again.precision.matvec(v), posterior.precision.matvec(v), 1e-12)
