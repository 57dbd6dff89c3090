"""Mixtures of posteriors against plain float64 loops over their components."""

import copy
import math

import pytest
import torch

import laplace_kf as lk

DATA = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, dtype=torch.float64, generator=DATA)
Y = X[:, :1].sin() + 0.1 * torch.randn(24, 1, dtype=torch.float64, generator=DATA)
TARGETS = {
    "gaussian": (1, Y),
    "heteroscedastic_gaussian": (2, Y),
    "categorical": (3, (X[:, 0] > 0).long() + (X[:, 1] > 0).long()),
    "bernoulli": (2, (X[:, :2] > 0).double()),
    "poisson": (1, (3 * Y.abs()).round()),
}


def rng():
    return torch.Generator().manual_seed(3)


def networks(outputs, count=3):
    found = []
    for seed in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(
                torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)).double()
            )
    return found


def members(name, count=3):
    outputs, y = TARGETS[name]
    return [lk.LaplacePosterior(m, name, structure="diag").fit((X, y)) for m in networks(outputs, count)], y


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("weights", ["equal", "evidence"])
def test_density_and_moments_are_those_of_the_mixture(name, weights):
    posteriors, y = members(name)
    mixture = lk.Mixture(posteriors, weights=weights)
    logs = [float(p.log_evidence()) for p in posteriors]
    share = [math.exp(v - max(logs)) for v in logs] if weights == "evidence" else [1.0] * 3
    share = [v / sum(share) for v in share]
    torch.testing.assert_close(mixture.weights, torch.tensor(share, dtype=torch.float64))
    parts = [p.predict(X, "map") for p in posteriors]
    found = mixture.predict(X, "map")
    if name == "bernoulli":  # every output is a variable of its own
        p = sum(w * part.probs for w, part in zip(share, parts, strict=True))
        wanted = (y * p.log() + (1 - y) * (1 - p).log()).sum(1)
    else:
        wanted = sum(w * part.log_prob(y).exp() for w, part in zip(share, parts, strict=True)).log()
    torch.testing.assert_close(found.log_prob(y), wanted)
    for value in ("probs", "mean"):
        if value in found.values:
            torch.testing.assert_close(
                found.values[value], sum(w * p.values[value] for w, p in zip(share, parts, strict=True))
            )
    if "variance" in found.values:
        second = sum(w * (p.variance + p.mean**2) for w, p in zip(share, parts, strict=True))
        torch.testing.assert_close(found.variance, second - found.mean**2)
    assert (found.mutual_information >= 0).all()
    assert found.mutual_information.max() > 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_equal_map_mixture_is_the_prediction_of_the_stacked_outputs(name):
    posteriors, y = members(name)
    stacked = torch.stack([p.model(X).detach() for p in posteriors])
    wanted, found = posteriors[0].likelihood.predict(stacked), lk.Mixture(posteriors).predict(X, "map")
    for what in ("entropy", "mutual_information"):
        torch.testing.assert_close(getattr(found, what), getattr(wanted, what), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(found.log_prob(y), wanted.log_prob(y))


def test_sequences_are_mixed_position_by_position():
    z = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=rng())
    y = torch.randint(3, (4, 5), generator=rng())
    y[0, :2] = -100
    likelihood = lk.likelihoods.Categorical(class_weights=torch.tensor([1.0, 2.0, 0.5]))
    found = lk.likelihoods.mixed(likelihood, [likelihood.predict(one[None]) for one in z], [0.5, 0.5])
    torch.testing.assert_close(found.log_prob(y), likelihood.predict(z).log_prob(y))


@pytest.mark.parametrize("name", ["gaussian", "heteroscedastic_gaussian"])
def test_intervals_are_quantiles_of_the_mixture(name):
    posteriors, _ = members(name)
    low, high = lk.Mixture(posteriors).predict_interval(X, 0.8, method="linearized")
    parts = [p.predict(X, "linearized") for p in posteriors]
    for end, wanted in ((low, 0.1), (high, 0.9)):
        below = sum(torch.special.ndtr((end - p.mean) / p.variance.sqrt()) for p in parts) / 3
        torch.testing.assert_close(below, torch.full_like(below, wanted))


def test_samples_are_shared_out_and_reproducible():
    posteriors, _ = members("categorical")
    mixture = lk.Mixture(posteriors)
    one, two = (mixture.predict(X, "mc", 10, generator=rng(), keep_samples=True) for _ in range(2))
    assert one.samples.shape == (10, 24, 3)
    assert torch.equal(one.samples, two.samples)
    predictor = mixture.predictor(10, rng())
    assert predictor(X, keep_samples=True).samples.shape == (10, 24, 3)


@pytest.mark.parametrize("name", ["gaussian", "heteroscedastic_gaussian", "categorical"])
def test_tuned_together_saved_and_loaded(name, tmp_path):
    posteriors, y = members(name)
    before = [(p.n_data, p.prior_precision, p.method) for p in posteriors]
    mixture = lk.Mixture(posteriors)
    result = mixture.tune((X, y), generator=rng(), samples=4)
    assert result.cost <= 15
    assert mixture.n_data == result.best["n_data"]
    assert mixture.method == result.method
    assert [(p.n_data, p.prior_precision, p.method) for p in posteriors] == before
    at_map = -lk.Mixture(posteriors).predict(X, "map").log_prob(y).mean()
    if name != "gaussian":  # whose MAP is at its best noise
        assert result.map_objective == pytest.approx(float(at_map))
    mixture.calibrate((X, y), generator=rng())
    mixture.save(tmp_path / "m.safetensors")
    again = lk.Mixture.load(tmp_path / "m.safetensors", networks(TARGETS[name][0]))
    assert torch.equal(again.predict(X, generator=rng()).log_prob(y), mixture.predict(X, generator=rng()).log_prob(y))
    for kind in ("entropy", "mutual_information", "variance", "leverage", "direction", "auto"):
        assert mixture.ood_score(X, kind, generator=rng()).shape == (24,)
    with pytest.raises(lk.errors.ShapeMismatch, match="3 posteriors"):
        lk.Mixture.load(tmp_path / "m.safetensors", networks(TARGETS[name][0], 2))
    with pytest.raises(lk.errors.CorruptFile, match="mixture"):
        lk.LaplacePosterior.load(tmp_path / "m.safetensors", networks(TARGETS[name][0])[0])


def test_tuned_objective_is_that_of_the_mixture():
    posteriors, y = members("categorical")
    mixture = lk.Mixture(posteriors)
    result = mixture.tune((X, y), method="probit", n_data=[10.0, 100.0], prior_precision=[1.0, 3.0], extend=0)
    for row in result.table:
        mixture.n_data, mixture.prior_precision = row["n_data"], row["prior_precision"]
        assert row["objective"] == pytest.approx(-float(mixture.predict(X, "probit").log_prob(y).mean()))


def test_what_does_not_go_together_is_refused():
    (a, *_), y = members("gaussian")
    other = members("categorical")[0][0]
    with pytest.raises(lk.errors.IncompatiblePair, match="likelihood"):
        lk.Mixture([a, other])
    two = lk.LaplacePosterior(networks(2)[0], "gaussian").fit((X, Y.expand(-1, 2)))
    with pytest.raises(lk.errors.IncompatiblePair, match="2 outputs"):
        lk.Mixture([a, two])
    with pytest.raises(lk.errors.NotFitted, match="component 1"):
        lk.Mixture([a, lk.LaplacePosterior(networks(1)[0], "gaussian")])
    few = lk.LaplacePosterior(networks(1)[1], "gaussian").fit((X[:9], y[:9]))
    with pytest.raises(lk.errors.IncompatiblePair, match="same rows"):
        lk.Mixture([a, few], weights="evidence")
    with pytest.raises(lk.errors.UnknownName):
        lk.Mixture([a], weights="evidenz")
    model = copy.deepcopy(a.model)
    head = [lk.LaplacePosterior(model, "gaussian", parameters="last_layer").fit((X, y))]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    head.append(lk.LaplacePosterior(model, "gaussian", parameters="last_layer").fit((X, y)))
    with pytest.raises(lk.errors.IncompatiblePair, match="deepcopy"):
        lk.Mixture(head)


def test_refit_keeps_the_settings():
    posterior = lk.LaplacePosterior(networks(1)[0], "gaussian", structure="full").fit((X[:16], Y[:16]))
    posterior.tune((X[16:], Y[16:]), generator=rng(), samples=4)
    kept = (posterior.n_data, posterior.prior_precision, posterior.likelihood.noise_scale, posterior.method)
    called = []
    posterior.refit((X, Y), train=lambda model, data: called.append(len(data[0])))
    assert called == [24]
    assert kept == (posterior.n_data, posterior.prior_precision, posterior.likelihood.noise_scale, posterior.method)
    assert posterior.counted_data == 24
    scaled = lk.likelihoods.Gaussian(scale=kept[2])
    fresh = lk.LaplacePosterior(posterior.model, scaled, structure="full").fit((X, Y))
    torch.testing.assert_close(posterior.curvature.dense(), fresh.curvature.dense())


def test_evidence_training_finds_noise_and_maximum():
    model = networks(1)[0]
    posterior = lk.evidence_training(
        model, "gaussian", (X, Y), epochs=60, burn_in=20, every=20, optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        structure="full", per_block=False,
    )  # fmt: skip
    assert posterior.likelihood.noise_scale < 0.6
    best = float(posterior.log_evidence())
    for factor in (0.8, 1.25):
        assert float(posterior.evidence(prior_precision=posterior.prior_precision * factor).total) < best
    with pytest.raises(lk.errors.IncompatiblePair, match="weight decay"):
        lk.evidence_training(model, "gaussian", (X, Y), epochs=1, optimizer=lambda p: torch.optim.AdamW(p))


def test_evidence_stops_and_goes_back_to_the_best_weights():
    model = networks(1)[0]
    training = lk.EvidenceTraining(model, "gaussian", burn_in=1, every=1, patience=1).start((X, Y))
    assert not training.after_epoch((X, Y))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = sum(
        0.5 * training.posterior.prior_precision[name] * p.square().sum() for name, p in weights.items()
    ) / 24  # fmt: skip
    torch.testing.assert_close(training.penalty().detach(), penalty)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(3.0)
    assert training.after_epoch((X, Y))
    training.finish()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
