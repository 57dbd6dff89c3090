"""A temperature on noise that the network predicts: what it is for classes, for the heteroscedastic likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import laplace_kf as lk
from laplace_kf.likelihoods import Gaussian, HeteroscedasticGaussian


class TooSure(nn.Module):
    """Means of a line and a noise that is a third of what the data have."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, generator=rng, dtype=torch.float64)
    spread = (0.2 * x - 1.0).exp()
    return x, 2.0 * x + spread * torch.randn(count, 1, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="module")
def posterior() -> lk.LaplacePosterior:
    model = TooSure().double()
    with torch.no_grad():
        model.line.weight.copy_(torch.tensor([[2.0], [0.4]]))
        model.line.bias.copy_(torch.tensor([0.0, -2.0 - 2 * math.log(3.0)]))
    return lk.LaplacePosterior(model, "heteroscedastic_gaussian", structure="full").fit(data(2000, 0))


def density(model: nn.Module, x: torch.Tensor, y: torch.Tensor, temperature: float) -> torch.Tensor:
    mean, log_variance = model(x).detach().unbind(-1)
    return torch.distributions.Normal(mean, temperature * (log_variance / 2).exp()).log_prob(y[:, 0])


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 2), (5, 2, 3, 4)])
def test_the_predicted_deviation_is_multiplied(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    axis = 1 if len(shape) > 3 else -1
    mean, log_variance = outputs.unbind(axis)
    y = torch.randn_like(mean).unsqueeze(axis)
    likelihood = HeteroscedasticGaussian()
    tempered = likelihood.tempered(outputs, 1.7)
    assert tempered.shape == outputs.shape
    wanted = torch.distributions.Normal(mean, 1.7 * (log_variance / 2).exp()).log_prob(y.squeeze(axis))
    found = likelihood.predict(tempered[None]).log_prob(y)
    torch.testing.assert_close(found.reshape(5, -1).sum(1), wanted.reshape(5, -1).sum(1))
    torch.testing.assert_close(likelihood.tempered(outputs, 1.0), outputs)


def test_the_channel_of_sequences_with_channels_first() -> None:
    outputs = torch.randn(4, 2, 6, dtype=torch.float64)
    tempered = HeteroscedasticGaussian().with_layout("channels_first").tempered(outputs, 3.0)
    torch.testing.assert_close(tempered[:, 0], outputs[:, 0])
    torch.testing.assert_close(tempered[:, 1], outputs[:, 1] + 2 * math.log(3.0))


def test_tune_finds_the_factor_that_the_noise_lacks(posterior: lk.LaplacePosterior) -> None:
    """The candidate's objective is the best of all factors by hand, its gain that over MAP; auto takes it here."""
    x, y = data(300, 1)
    result = posterior.tune((x, y), generator=torch.Generator().manual_seed(0))
    found = {each["method"]: each for each in result.candidates}
    assert list(found) == ["map", "temperature", "linearized", "mc"]
    factors = torch.linspace(0.5, 8.0, 1501).tolist()
    best = min(factors, key=lambda t: float(-density(posterior.model, x, y, t).mean()))
    assert found["temperature"]["temperature"] == pytest.approx(best, abs=0.01)
    assert 2.5 < best < 3.5
    by_hand = float(-density(posterior.model, x, y, best).mean())
    assert found["temperature"]["objective"] == pytest.approx(by_hand, abs=1e-5)
    gain = float(-density(posterior.model, x, y, 1.0).mean()) - by_hand
    assert found["temperature"]["gain"] == pytest.approx(gain, abs=1e-5)
    assert result.method == posterior.method == "temperature"  # the weights are known well: their spread is no noise
    fresh = data(50, 2)
    wanted = density(posterior.model, *fresh, posterior.temperature)
    torch.testing.assert_close(posterior.predict(fresh[0]).log_prob(fresh[1]), wanted)


def test_the_temperature_goes_with_the_file_and_the_mixture(posterior: lk.LaplacePosterior, tmp_path) -> None:
    posterior.temperature = 2.0
    posterior.save(tmp_path / "p.safetensors")
    loaded = lk.LaplacePosterior.load(tmp_path / "p.safetensors", posterior.model)
    x, y = data(40, 3)
    wanted = density(posterior.model, x, y, 2.0)
    torch.testing.assert_close(loaded.predict(x, method="temperature").log_prob(y), wanted)
    other = TooSure().double()
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), posterior.model.parameters(), strict=True):
            mine.copy_(theirs + 0.1)
    second = lk.LaplacePosterior(other, "heteroscedastic_gaussian", structure="full").fit(data(200, 0))
    mixture = lk.Mixture([posterior, second])
    result = mixture.tune(data(300, 1), method="temperature", generator=torch.Generator().manual_seed(0))
    assert "temperature" in {each["method"] for each in result.candidates}
    each = [density(model, x, y, mixture.temperature).exp() for model in (posterior.model, other)]
    torch.testing.assert_close(mixture.predict(x).log_prob(y), (sum(each) / 2).log())


def test_a_noise_scale_is_no_temperature() -> None:
    """A Gaussian's scale is tuned itself; there is nothing that a temperature could change."""
    x, y = data(30, 4)
    fitted = lk.LaplacePosterior(nn.Linear(1, 1).double(), Gaussian()).fit((x, y))
    fitted.temperature = 2.0
    with pytest.raises(lk.errors.IncompatiblePair, match=r"no logits .* predicts no noise"):
        fitted.predict(x, method="temperature")
