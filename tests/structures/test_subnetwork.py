"""``parameters=lk.Subnetwork(...)``: the dense posterior over single weights against submatrices of the dense GGN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import laplace_kf as lk
from laplace_kf import subnetwork
from tests import oracles
from tests.cases import BY_NAME, CASES, Case, Problem, rng, tagged, truth
from tests.checks import close

over_core = pytest.mark.parametrize("case", tagged("core"), ids=str)


def wanted(case: Case, size: int, by: str, names: list[str] | None = None) -> Tensor:
    """Flat positions among all parameters, by their definition: sorted one after the other, ties in model order."""
    t, problem = truth(case), case.make()
    index = oracles.flat_index(problem.model, problem.names)
    allowed = torch.cat([index[name].reshape(-1) for name in names or problem.names]).tolist()
    score = t.theta.abs() if by == "magnitude" else -t.ggn.diagonal()
    return torch.tensor(sorted(sorted(allowed, key=lambda i: -float(score[i]))[:size]))


def fitted(problem: Problem, **options: Any) -> Any:
    return lk.LaplacePosterior(problem.model, problem.likelihood.build(lk), **options).fit(problem.uneven())


@pytest.mark.parametrize("by", ["variance", "magnitude"])
@over_core
def test_precision_evidence_and_penalty(case: Case, by: str) -> None:
    problem, t = case.make(), truth(case)
    size = min(9, problem.size - 1)
    where = wanted(case, size, by)
    posterior = fitted(problem, parameters=lk.Subnetwork(size, by=by), prior_precision=1.7)
    dense = problem.n * t.ggn[where[:, None], where] + 1.7 * torch.eye(size, dtype=torch.float64)
    precision = posterior.precision
    close(precision.dense(), dense)
    close(precision.diag(), dense.diagonal())
    v = torch.randn(size, 2, generator=rng(1), dtype=torch.float64)
    close(precision.matvec(v), dense @ v)
    close(precision.solve(v), torch.linalg.solve(dense, v), 1e-8)
    close(precision.quadratic(v), v.T @ torch.linalg.solve(dense, v), 1e-8)
    close(precision.logdet(), torch.logdet(dense), 1e-8)
    prior = torch.full((size,), 1.7, dtype=torch.float64)
    evidence = oracles.log_evidence(dense, prior, t.theta[where], t.log_likelihood)
    assert float(posterior.log_evidence()) == pytest.approx(evidence, rel=1e-9)
    assert posterior.penalty().item() == 0.0
    shift = 0.3 * torch.randn(problem.size, generator=rng(2), dtype=torch.float64)
    with torch.no_grad():
        for name, index in oracles.flat_index(problem.model, problem.names).items():
            problem.model.get_parameter(name).add_(shift[index])
    close(posterior.penalty().detach(), oracles.penalty(dense, shift[where], 0 * shift[where]))


@over_core
def test_samples_move_the_chosen_weights_only(case: Case, tmp_path: Path) -> None:
    problem, t = case.make(), truth(case)
    size = min(6, problem.size - 1)
    where = wanted(case, size, "variance")
    posterior = fitted(problem, parameters=lk.Subnetwork(size), prior_precision=0.8)
    index = oracles.flat_index(problem.model, problem.names)
    touched = [name for name in problem.names if bool(torch.isin(index[name], where).any())]
    assert list(posterior.mean) == touched
    for name, value in posterior.mean.items():
        assert torch.equal(value, problem.model.get_parameter(name))
    draws = posterior.sample(4000, generator=rng(3))
    flat = torch.cat([draws[name].reshape(4000, -1) for name in touched], 1)
    positions = torch.cat([index[name].reshape(-1) for name in touched])
    chosen = torch.isin(positions, where)
    assert torch.equal(flat[:, ~chosen], t.theta[positions[~chosen]].expand(4000, -1))
    covariance = torch.linalg.inv(problem.n * t.ggn[where[:, None], where] + 0.8 * torch.eye(size, dtype=torch.float64))
    off = flat[:, chosen] - t.theta[where]
    spread = ((covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2) / 4000).sqrt()
    assert float(((off.T @ off / 4000 - covariance) / spread).abs().max()) < 5.5

    path = tmp_path / "p"
    posterior.save(path)
    fresh = case.make()
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.add_(0.1)  # the file, not the model, knows the mean
    loaded = lk.LaplacePosterior.load(path, fresh.model, likelihood=problem.likelihood.build(lk))
    assert torch.equal(loaded.precision.dense(), posterior.precision.dense())
    assert all(torch.equal(loaded.mean[name], value) for name, value in posterior.mean.items())
    assert loaded.parameters == posterior.parameters
    one, two = (p.sample(2, generator=rng(4)) for p in (loaded, posterior))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.share(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of weights and biases of every layer family, embeddings and parameters without a rule included."""
    problem = case.make()
    where = torch.arange(1, problem.size, 3)
    constant = [  # entries of a padding row are no weights
        torch.isin(torch.arange(problem.size), oracles.flat_index(problem.model)[f"{path}.weight"][module.padding_idx])
        for path, module in problem.model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
    ]
    where = where[~torch.stack(constant).any(0)[where]] if constant else where
    scores = torch.zeros(problem.size)
    scores[where] = 1.0
    layout_of = subnetwork.CRITERIA["magnitude"]
    monkeypatch.setitem(subnetwork.CRITERIA._entries, "magnitude", lambda job: (layout_of(job)[0], scores))
    selection = lk.Subnetwork(len(where), by="magnitude")
    likelihood = problem.likelihood.build(lk)
    matrix = lk.curvature.estimate(problem.model, likelihood, [problem.batch()], parameters=selection).mean()
    close(matrix.dense(), truth(case).ggn[where[:, None], where])


@pytest.mark.parametrize("by", ["variance", "magnitude"])
@pytest.mark.parametrize(
    ("within", "names"), [("last_layer", ["2.weight", "2.bias"]), (["0.*"], ["0.weight", "0.bias"])], ids=["last", "0"]
)
def test_within(within: Any, names: list[str], by: str) -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    where = wanted(case, 5, by, names)
    posterior = fitted(case.make(), parameters=lk.Subnetwork(5, by=by, within=within))
    close(posterior.curvature.dense(), truth(case).ggn[where[:, None], where])


def test_variance_takes_the_prior_into_account() -> None:
    """With a prior that differs, the variance is 1 / (N d + λ)."""
    case = BY_NAME["tanh-mlp-categorical"]
    problem, t = case.make(), truth(case)
    prior = torch.full((problem.size,), 1e3, dtype=torch.float64)
    index = oracles.flat_index(problem.model)
    prior[index["2.weight"]] = 1e-3
    size = index["2.weight"].numel()
    assert not torch.equal(wanted(case, size, "variance"), index["2.weight"].reshape(-1))
    values = {"2.weight": 1e-3, "*": 1e3}
    posterior = fitted(problem, parameters=lk.Subnetwork(size), prior_precision=values)
    where = index["2.weight"].reshape(-1)
    close(posterior.curvature.dense(), t.ggn[where[:, None], where])


def test_all_weights_are_the_full_posterior() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem = case.make()
    posterior = fitted(problem, parameters=lk.Subnetwork(10**6))
    close(posterior.curvature.dense(), truth(case).ggn)
    assert posterior.structure.name == "full"


def test_predictions_tuning_and_summary() -> None:
    case = BY_NAME["tanh-mlp-categorical"]
    problem, t = case.make(), truth(case)
    posterior = fitted(problem, parameters=lk.Subnetwork(7, by="magnitude"), prior_precision=0.5)
    where = wanted(case, 7, "magnitude")
    covariance = torch.linalg.inv(problem.n * t.ggn[where[:, None], where] + 0.5 * torch.eye(7, dtype=torch.float64))
    noise = torch.randn(3000, 7, generator=rng(5), dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    weights = t.theta.repeat(3000, 1)
    weights[:, where] += noise
    index = oracles.flat_index(problem.model)
    draws = {name: weights[:, at] for name, at in index.items()}
    with torch.no_grad():
        outputs = torch.vmap(lambda w: functional_call(problem.model, w, (problem.x,)))(draws)
    probs = outputs.softmax(-1)
    prediction = posterior.predict(problem.x, method="mc", samples=3000, generator=rng(6))
    error = (2 * probs.var(0) / 3000).sqrt()
    assert float(((prediction.probs - probs.mean(0)) / error).abs().max()) < 5
    with torch.no_grad():
        close(posterior.predict(problem.x, method="map").probs, problem.model(problem.x).softmax(-1))
    posterior.tune(
        (problem.x, problem.y), n_data=[2.0, 5.0, 9.0], prior_precision=[0.1, 1.0, 3.0], method="mc", samples=3
    )
    posterior.tune(objective="evidence", n_data=[5.0], prior_precision=[0.1, 1.0, 30.0])
    (row,) = posterior.summary().rows
    assert row.size == 7 and "7" in str(posterior.summary())
    assert 0 < row.effective < 7


@pytest.mark.parametrize("structure", ["diag", "layer", "ekfac", "lowrank", "isotropic"])
def test_other_structures_are_refused(structure: str) -> None:
    with pytest.raises(lk.errors.IncompatiblePair, match="dense"):
        lk.LaplacePosterior(nn.Linear(2, 2), "gaussian", structure, parameters=lk.Subnetwork(2))


@pytest.mark.parametrize("structure", ["full", "auto", "kron"])
def test_structures_that_mean_the_dense_matrix(structure: str) -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    assert fitted(problem, structure=structure, parameters=lk.Subnetwork(3)).precision.dense().shape == (3, 3)


def test_bad_subnetworks() -> None:
    with pytest.raises(ValueError, match="positive"):
        lk.Subnetwork(0)
    with pytest.raises(lk.errors.UnknownName, match="variance"):
        lk.Subnetwork(3, by="variances")
    with pytest.raises(lk.errors.UnknownName, match="no_such"):
        lk.LaplacePosterior(nn.Linear(2, 2), "gaussian", parameters=lk.Subnetwork(2, within=["no_such"]))
    with pytest.raises(lk.errors.IncompatiblePair, match="damping"):
        lk.LaplacePosterior(nn.Linear(2, 2), "gaussian", parameters=lk.Subnetwork(2), damping="factored")
    problem = BY_NAME["tanh-mlp-categorical"].make()
    for selection in (lk.Subnetwork(3), lk.Subnetwork(3, by="magnitude", within="last_layer")):
        posterior = lk.LaplacePosterior(problem.model, "categorical", parameters=selection)
        with pytest.raises(lk.errors.ShapeMismatch, match="only once"):
            posterior.fit(iter(problem.uneven()))
    lk.LaplacePosterior(problem.model, "categorical", parameters=lk.Subnetwork(3, by="magnitude")).fit(
        iter(problem.uneven())
    )


def test_sums_over_data() -> None:
    problem = BY_NAME["tanh-mlp-categorical"].make()
    selection = lk.Subnetwork(6, by="magnitude")
    parts = [
        lk.curvature.estimate(problem.model, "categorical", [batch], parameters=selection) for batch in problem.uneven()
    ]
    whole = lk.curvature.estimate(problem.model, "categorical", problem.uneven(), parameters=selection)
    close((parts[0] + parts[1]).mean().dense(), whole.mean().dense())
    other = lk.curvature.estimate(
        problem.model, "categorical", problem.uneven(), parameters=lk.Subnetwork(7, by="magnitude")
    )
    with pytest.raises(lk.errors.IncompatiblePair):
        _ = whole + other
