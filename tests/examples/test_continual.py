"""The example of docs/chaining.md: both forms run, do the same, and keep the first task."""

import inspect

import torch

from examples import continual as example
from laplace_kf import continual


def test_the_penalty_keeps_the_first_task(capsys):
    found = example.main(epochs=80)
    lost = float(found["no protection"][0][0] - found["no protection"][1][0])
    kept = float(found["online Laplace"][0][0] - found["online Laplace"][1][0])
    assert lost > 0.3  # two classes: the first task is forgotten altogether
    assert kept < 0.2
    assert float(found["online Laplace"][1].mean()) > float(found["no protection"][1].mean()) + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_hooks_train_the_same_network_as_the_loop():
    """Of a penalty in the loss and of one that is back-propagated after it."""
    found = []
    for loop in (example.plain_loop, example.with_callbacks):
        for method in (continual.OnlineLaplace, continual.SynapticIntelligence):
            model = example.network()
            learner = method(model, "categorical", prior_precision=0.01)
            loop(model, example.tasks(count=100), learner, 5)
            assert learner.tasks == 2
            found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=2e-4)
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=2e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3  # the methods do differ


def test_the_loop_is_as_short_as_it_says():
    body = [line for line in inspect.getsource(example.plain_loop).splitlines() if line.strip()]
    assert len(body) < 20
