"""The training loop and its parts: reproducible, and blind to the caller's random numbers."""

import pytest
import torch
from torch import nn

from experiments.common import training
from experiments.ood import variational
from laplace_kf.errors import ShapeMismatch
from laplace_kf.predictive import mc_dropout


def problem(seed=0, count=60):
    rng = training.generator(seed)
    inputs = torch.rand(count, 6, generator=rng)
    return inputs, (inputs[:, 0] > 0.5).long()


def fit(seed, epochs=3, **options):
    model = training.mlp([6, 8, 2], dropout=0.3, seed=seed)
    batches = training.Batches(*problem(), 16, training.generator(seed), transform=training.binarise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = training.train(model, batches, optimizer, epochs, seed=seed, **options)
    return model, history


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, history = fit(1)
    torch.rand(3)  # whatever the caller draws in between does not matter
    second, again = fit(1)
    assert history == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.set_rng_state(before)
    fit(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_leaves_the_model_in_eval_mode_and_learns():
    model, history = fit(0, epochs=40)
    assert not model.training
    assert history[-1] < history[0]


@pytest.mark.parametrize("schedule", [False, True])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, schedule):
    def run(kept=None, break_at=None):
        model = training.mlp([6, 8, 2], dropout=0.3, seed=1)
        batches = training.Batches(*problem(), 16, training.generator(1), transform=training.binarise)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) if schedule else None
        steps = []

        def interrupt():
            steps.append(1)
            if len(steps) == break_at:
                raise KeyboardInterrupt

        history = training.train(
            model, batches, optimizer, 5, seed=1, scheduler=scheduler, after_step=interrupt, kept=kept
        )
        return model, history, len(steps)

    whole, losses, _ = run()
    path = tmp_path / "networks" / "one.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path, break_at=10)  # in the third of five epochs of four steps
    resumed, again, steps = run(path)
    assert steps == 12
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    _, finished, steps = run(path)
    assert steps == 0 and finished == losses
    assert [file.name for file in path.parent.iterdir()] == ["one.pt"]


def test_penalty_and_after_step_are_used():
    seen = []
    _, plain = fit(0, epochs=1)
    _, penalised = fit(0, epochs=1, penalty=lambda: torch.tensor(2.0), after_step=lambda: seen.append(1))
    assert penalised[0] == pytest.approx(plain[0] + 2.0, rel=1e-5)
    assert len(seen) == 4


def test_training_ends_where_it_is_told_to():
    model, modes = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), []
    batches = training.Batches(torch.randn(8, 2), torch.zeros(8, dtype=torch.long), 4, training.generator(0))

    def over():
        modes.append(model.training)
        return len(modes) == 3

    history = training.train(model, batches, torch.optim.SGD(model.parameters(), 0.1), 10, over=over)
    assert len(history) == 3 and modes == [False] * 3 and not model.training


def test_a_loss_that_is_not_finite_stops_training():
    with pytest.raises(FloatingPointError, match="epoch 1"):
        fit(0, penalty=lambda: torch.tensor(float("nan")))


def test_batches_cover_every_example_once_and_draw_anew():
    inputs = torch.full((10, 4), 0.5)
    batches = training.Batches(inputs, torch.arange(10), 4, training.generator(0), transform=training.binarise)
    first, second = (list(batches) for _ in range(2))
    assert [len(y) for _, y in first] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(torch.cat([y for _, y in first]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in second]))
    with pytest.raises(ValueError, match="10 inputs but 9 targets"):
        training.Batches(inputs, torch.arange(9), 4, training.generator(0))


def test_binarise_has_the_grey_level_as_mean():
    grey = torch.tensor([0.0, 0.25, 1.0]).expand(20000, 3)
    drawn = training.binarise(grey, training.generator(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), grey[0], atol=0.01, rtol=0)


def test_mc_dropout_without_dropping_is_the_network_itself():
    model = training.mlp([6, 8, 3], dropout=0.5, seed=0).train()
    model[3].p = 0.0
    inputs = problem()[0]
    with pytest.warns(UserWarning, match="nothing to drop"):
        probs = mc_dropout(model, "categorical", 4, training.generator(0))(inputs).probs
    torch.testing.assert_close(probs, model.eval()(inputs).softmax(-1))


def test_a_mean_field_network_learns_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    inputs, targets = problem(count=200)
    model = variational.mean_field_mlp([6, 8, 2], sigma=0.05, seed=0)
    batches = training.Batches(inputs, targets, 20, training.generator(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training.train(model, batches, optimizer, 20, penalty=lambda: variational.kl(model, 1e-2) / 200)
    probs = variational.predict(model, inputs, 20)
    torch.testing.assert_close(probs.sum(1), torch.ones(200))
    assert (probs.argmax(1) == targets).float().mean() > 0.9
    assert torch.equal(torch.get_rng_state(), before)


def test_mc_dropout_averages_the_masked_network():
    """One hidden unit: the mask has two values, so the average is known."""
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(1, 2)).eval()
    inputs = torch.tensor([[1.0]])
    kept, gone = (model[1](inputs * scale).softmax(-1) for scale in (1 / 0.75, 0.0))
    probs = mc_dropout(model, "categorical", 5000, training.generator(0))(inputs).probs
    torch.testing.assert_close(probs, 0.75 * kept + 0.25 * gone, atol=0.01, rtol=0)


def test_mc_dropout_leaves_no_trace():
    model = training.mlp([6, 8, 3], dropout=0.5, seed=0).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    inputs = problem()[0]
    first = mc_dropout(model, "categorical", 5, training.generator(1))(inputs).probs
    assert torch.equal(first, mc_dropout(model, "categorical", 5, training.generator(1))(inputs).probs)
    assert not torch.equal(first, mc_dropout(model, "categorical", 5, training.generator(2))(inputs).probs)
    with pytest.raises(ShapeMismatch):
        mc_dropout(model, "categorical", 5, training.generator(1))(torch.zeros(2, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_mean_field_layer_has_the_mean_and_variance_of_random_weights(mode):
    layer = variational.MeanFieldLinear(nn.Linear(3, 2).double(), 0.3, training.generator(0)).train(mode)
    inputs = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    draws = 200000 if mode else 1
    with torch.no_grad():
        drawn = torch.cat([layer(inputs.expand(draws, 3)) for _ in range(20000 // draws or 1)])
    mean = inputs @ layer.weight.T + layer.bias
    variance = 0.09 * (inputs[0].square().sum() + 1)
    torch.testing.assert_close(drawn.mean(0), mean.detach()[0], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.var(0), variance.expand(2), atol=0.03, rtol=0)


def test_kl_is_that_of_torch_distributions():
    model = variational.mean_field_mlp([3, 4, 2], sigma=0.2, seed=0)
    prior = torch.distributions.Normal(0.0, 0.5**-0.5)
    truth = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(mean, nn.functional.softplus(rho)), prior).sum()
        for layer in model
        if isinstance(layer, variational.MeanFieldLinear)
        for mean, rho in ((layer.weight, layer.weight_rho), (layer.bias, layer.bias_rho))
    )
    torch.testing.assert_close(variational.kl(model, 0.5), truth, rtol=1e-5, atol=1e-4)
