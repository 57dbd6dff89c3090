"""Predictions from many threads: right numbers, and nobody ever sees the model changed."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import replica
from tests.cases import labels, normal, rng
from tests.checks import close

SWITCH = 1e-5


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    yield
    sys.setswitchinterval(before)


class Entangled(nn.Module):
    """A model that reaches its modules in every way a double has to follow."""

    def __init__(self, kind: str = "all") -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)
        self.middle, self.last = nn.Linear(7, 7), nn.Linear(7, 3)
        self.steps = [self.first, self.norm, self.drop]
        self.by_name = {"middle": (self.middle,)}
        self.helper = type("Helper", (), {})()
        self.helper.module = self.last
        self.seen: Any = None
        self.middle.register_forward_hook(self.keep)
        self.again: Callable[[Tensor], Tensor] = lambda h: self.drop(h).tanh()

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        x = self.again(x)
        self.by_name["middle"][0](x)
        return self.helper.module(self.seen.relu())


def problem(**options: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = Entangled().double()
    x = normal(24, 4, seed=1)
    posterior = lk.LaplacePosterior(model, "categorical", **options).fit((x, labels(3, 24)))
    model.train()
    return model, posterior, x


def together(jobs: list[Callable[[], None]], watch: Callable[[], bool] | None = None) -> None:
    """All jobs at once; ``watch`` must hold all the time."""
    errors: list[Any] = []
    done = threading.Event()

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    def look() -> None:
        while not done.is_set():
            if watch is not None and not watch():
                errors.append("the model was seen changed")
                return

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    watcher = threading.Thread(target=look)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not errors, errors[:3]


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "probit": lambda p, x: p.predict(x, method="probit").probs,
    "linearized": lambda p, x: p.predict(x, method="linearized", generator=rng(0)).probs,
    "map": lambda p, x: p.predict(x, method="map").probs,
    "mc": lambda p, x: p.predict(x, method="mc", samples=5, space="weights", generator=rng(0)).probs,
    "activations": lambda p, x: p.predict(x, method="mc", samples=5, space="activations", generator=rng(0)).probs,
    "samples": lambda p, x: p.predict(x, method="mc", samples=4, keep_samples=True, generator=rng(0)).samples,
    "sobol": lambda p, x: p.predict(x, method="mc", samples=4, draws="sobol", generator=rng(0)).probs,
    "covariance": lambda p, x: p.functional_covariance(x),
    "joint": lambda p, x: p.functional_covariance(x, joint=True),
    "summary": lambda p, x: torch.tensor([len(str(p.summary()))]),
}


@pytest.mark.parametrize("parameters", ["all", "last_layer", ["middle.*", "last.*"]], ids=str)
def test_every_way_at_once(parameters: Any) -> None:
    """Different inputs, methods and threads over one posterior: each gives what it gives alone."""
    model, posterior, x = problem(parameters=parameters)
    parts = [x[:3], x[8:9]]
    expected = {(name, k): way(posterior, part) for name, way in WAYS.items() for k, part in enumerate(parts)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def job(start: int) -> None:
        for name, k in [*expected][start:] + [*expected][:start]:
            close(WAYS[name](posterior, parts[k]), expected[name, k])

    def unchanged() -> bool:
        modes = all(module.training for module in model.modules())
        return modes and all(isinstance(p, nn.Parameter) for p in model.last._parameters.values())

    together([lambda s=s: job(s) for s in (0, 6, 13)], unchanged)  # type: ignore[misc]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("kept", [True, False])
def test_one_predictor_for_all_threads(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from laplace_kf.predictive import weights

    if not kept:
        monkeypatch.setattr(weights, "KEEP_BYTES", 0)
    for draws in ("independent", "sobol"):
        model, posterior, x = problem()
        make = lambda p=posterior, d=draws: p.predictor(6, rng(0), draws=d)  # noqa: E731
        expected = [make()(x[k : k + 4]).probs for k in range(4)]
        shared = make()

        def job(start: int, shared: Any = shared, expected: Any = expected, x: Tensor = x) -> None:
            for k in [(start + i) % 4 for i in range(8)]:
                close(shared(x[k : k + 4]).probs, expected[k])

        together([lambda s=s: job(s) for s in range(3)], lambda m=model: m.training)  # type: ignore[misc]


def test_two_posteriors_over_one_model_and_a_search() -> None:
    model, posterior, x = problem()
    other = lk.LaplacePosterior(model, "categorical", structure="diag", parameters="last_layer").fit((x, labels(3, 24)))
    expected = [WAYS["probit"](p, x) for p in (posterior, other)]
    third = lk.LaplacePosterior(model, "categorical", structure="diag").fit((x, labels(3, 24)))

    def job(p: Any, wanted: Tensor) -> None:
        for _ in range(6):
            close(WAYS["probit"](p, x), wanted)

    def search() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            third.tune((x, labels(3, 24)), samples=4, n_data=[24.0], prior_precision=[1.0, 10.0], generator=rng(0))

    jobs = [lambda: job(posterior, expected[0]), lambda: job(other, expected[1]), search]
    together(jobs, lambda: model.training and model.drop.training)


GLOBAL: nn.Module


def test_a_forward_that_reads_the_model_from_a_global_variable_is_locked() -> None:
    """It cannot be given a double; predictions run one after another, and are right."""
    global GLOBAL
    GLOBAL, _, x = problem()
    forward = lambda m, b: (GLOBAL(b[0] if isinstance(b, tuple) else b), b[1] if isinstance(b, tuple) else None)  # noqa: E731
    with pytest.raises(replica._Unfaithful, match="GLOBAL"):
        replica.replica(GLOBAL, forward)
    posterior = lk.LaplacePosterior(GLOBAL, "categorical", forward=forward).fit([(x, labels(3, 24))])
    expected = [WAYS["mc"](posterior, x[k : k + 3]) for k in range(3)]

    def job(start: int) -> None:
        for k in [(start + i) % 3 for i in range(6)]:
            close(WAYS["mc"](posterior, x[k : k + 3]), expected[k])

    together([lambda s=s: job(s) for s in range(3)])  # type: ignore[misc]
    assert GLOBAL.training


@pytest.mark.parametrize("way", list(WAYS))
def test_inputs_and_targets_are_safe_as_well(way: str) -> None:
    model, _, x = problem()
    said: dict[str, Any] = {"inputs": lambda b: b[0], "targets": lambda b: b[1]}
    posterior = lk.LaplacePosterior(model, "categorical", **said).fit([(x, labels(3, 24), None)])
    expected = [WAYS[way](posterior, x[k : k + 3]) for k in range(3)]

    def job(start: int) -> None:
        for k in [(start + i) % 3 for i in range(4)]:
            close(WAYS[way](posterior, x[k : k + 3]), expected[k])

    together([lambda s=s: job(s) for s in range(3)])  # type: ignore[misc]


def test_a_double_follows_every_reference() -> None:
    """It gives the eval outputs, and shares parameters but no module, buffer or container."""
    model = problem()[0]
    twin, forward = replica.replica(model, lambda m, b: (model(b), None))
    x = normal(5, 4, seed=3)
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.append(module))
    try:
        found = twin(x)
        close(forward(twin, x)[0], found)
    finally:
        handle.remove()
    assert not {id(module) for module in calls} & {id(module) for module in model.modules()}
    assert replica.original(twin) is model
    assert model.training
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    close(found, model.eval()(x))


def test_renormalised_embeddings_are_not_written_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 2)).double()
    x = torch.randint(0, 5, (8, 2))
    posterior = lk.LaplacePosterior(model, "categorical", parameters="last_layer").fit((x, labels(2, 8)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    version = model[0].weight._version
    posterior.predict(x, method="probit")
    assert model[0].weight._version == version


def test_compiled_code_is_left_as_it_was() -> None:
    """A setting of the whole process is put back by the last thread that needs it."""
    events: list[str] = []

    class Setting:
        def __enter__(self) -> None:
            events.append("on")

        def __exit__(self, *_: object) -> None:
            events.append("off")

    shared = replica.Shared(Setting)
    first, second = shared(), shared()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert events == ["on"]
    second.__exit__(None, None, None)
    assert events == ["on", "off"]
