"""Fits, tuning and training over two and four processes against one process, and what happens when one fails."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import laplace_kf as lk
from laplace_kf.estimators import ESTIMATORS
from laplace_kf.structures import STRUCTURES
from tests.distributed import jobs
from tests.distributed.problems import SHARES, N, data
from tests.distributed.world import World, die

STRUCTURE_NAMES, ESTIMATOR_NAMES = sorted(STRUCTURES), sorted(ESTIMATORS)
OPTIONS = {"lowrank": {"rank": 3}}
EXACT = 1e-12
# Draws hang on the numbers of examples: shares with an index, or in order, have those of one process.
ORDERED = ("sampled", "subset", "pieces")
Case = tuple[str, str, str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


def case(structure: str, estimator: str, turn: int, kind: str = "net") -> Case:
    # those that take means, or choose, inside a minibatch need the same minibatches as one process
    by_minibatch = estimator in ("recursive", "importance", "auto")
    share = "batches" if by_minibatch else [*ORDERED, "batches"][turn % 4]
    return kind, share, structure, estimator, OPTIONS.get(structure, {})


def alone(given: Case, size: int) -> dict[str, Any]:
    """One process over all the data: the shares of ``size`` processes one after the other, where they have no index."""
    kind, share, structure, estimator, options = given
    x, y = data(kind)
    whole: Any = (x, y)
    if share == "batches":
        whole = [batch for rank in range(size) for batch in SHARES[share](x, y, rank, size)]
    return jobs.numbers(
        lk.curvature.estimate(
            jobs.network(kind), "categorical", whole, structure, estimator, generator=jobs.generator(), **options
        )
    )


def compare(world: World, cases: list[Case]) -> None:
    for given, *found in zip(cases, *world.run(jobs.swept, cases), strict=True):
        one = alone(given, world.size)
        for each in found:
            assert jobs.gap(each, one) < EXACT, given
            assert each == found[0], given  # bit by bit
        assert one["count"] == (N if given[0] == "net" else N - 1), given


def possible(structure: str, estimator: str) -> bool:
    return estimator != "recursive" or structure == "kron"


def sample() -> list[tuple[str, str]]:
    """Every structure and every estimator at least once."""
    rest = [name for name in ESTIMATOR_NAMES if name != "recursive"]
    pairs = [(structure, rest[k % len(rest)]) for k, structure in enumerate(STRUCTURE_NAMES)]
    return [*pairs, ("kron", "recursive"), ("ekfac", "sampled")]


def test_statistics_are_those_of_one_process(two: World, four: World) -> None:
    cases = [case(*pair, turn) for turn, pair in enumerate(sample())]
    compare(two, cases[::2])
    compare(four, cases[1::2])
    compare(four, [("tokens", "sampled", "kron", "sampled", {}), ("tokens", "pieces", "ekfac", "exact", {})])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["net", "norm", "tokens"])
def test_statistics_are_those_of_one_process_for_every_pair(two: World, four: World, kind: str) -> None:
    pairs = [pair for pair in itertools.product(STRUCTURE_NAMES, ESTIMATOR_NAMES) if possible(*pair)]
    pairs = [pair for pair in pairs if kind == "net" or pair[1] != "recursive"]
    for world in (two, four):
        for share in SHARES:
            cases = []
            for structure, estimator in pairs:
                given = case(structure, estimator, 0, kind)
                fixed = given[1] == "batches" or (share == "streamed" and ESTIMATORS[estimator].draws)
                cases.append(given if fixed else (kind, share, *given[2:]))
            compare(world, cases)


def test_all_processes_hold_the_same_posterior_as_one(two: World) -> None:
    for kind, share, settings, fit in (
        ("net", "sampled", {}, {"passes": 2}),
        ("experts", "batches", {"structure": "diag"}, {}),  # each expert is dead in one of the processes
        ("experts", "batches", {"structure": "full"}, {}),
        ("tokens", "pieces", {"parameters": "last_layer"}, {}),  # the second process has no minibatch
        ("net", "pieces", {"structure": "auto"}, {"n_data": 50}),
        ("net", "streamed", {"structure": "lowrank", "rank": 4}, {}),
        ("net", "pieces", {"parameters": lk.Subnetwork(9)}, {}),
        ("tokens", "pieces", {"parameters": lk.Subnetwork(9, by="magnitude", within="last_layer")}, {}),
        ("net", "sampled", {"estimator": "sampled", "structure": "ekfac"}, {}),
    ):
        found = two.run(jobs.fitted, kind, share, settings, fit)
        assert found[0] == found[1], (kind, share, settings)
        given = SHARES["batches"](*data(kind), 0, 1) if kind == "experts" else data(kind)
        one = jobs.posterior(kind, **settings).fit(given, generator=jobs.generator(), **fit)
        assert found[0]["n_data"] == one.n_data
        assert found[0]["evidence"] == pytest.approx(float(one.log_evidence()), rel=1e-11), (kind, share, settings)
        assert found[0]["names"] == list(one.mean)
        assert set(found[0]["blocks"]) == {block.name for block, _ in one.curvature.entries}


def test_wrapped_models_and_predictions_of_ones_own_part(two: World) -> None:
    found = two.run(jobs.wrapped)
    one = jobs.posterior("net").fit(data())
    assert [each["names"] for each in found] == [list(one.mean)] * 2
    whole = one.predict(data()[0]).probs
    for rank, each in enumerate(found):
        assert each["evidence"] == pytest.approx(float(one.log_evidence()), rel=1e-11)
        torch.testing.assert_close(torch.tensor(each["probs"], dtype=torch.float64), whole[rank::2])


def test_work_is_dealt_out_and_words_are_few(two: World) -> None:
    found = two.run(jobs.work_done)
    # two layers with two factors each, of sides 4, 5, 6 and 3: 6³ = 3³ + 4³ + 5³
    assert [each["eigh"] for each in found] == [1, 3]
    assert [each["all_reduce"] for each in found] == [1, 1]  # all sums in one bucket
    assert [each["broadcast"] for each in found] == [2, 2]  # each one's results, once


def test_tuning_makes_one_choice(two: World) -> None:
    for share, options in (
        ("sampled", {"n_data": [3.0, 30.0, 300.0], "prior_precision": [0.1, 1.0, 10.0], "method": "linearized"}),
        (
            "batches",
            {"objective": "brier", "n_data": [30.0], "prior_precision": [1.0, 9.0], "method": "mc", "samples": 4},
        ),
        ("sampled", {"objective": "evidence"}),
    ):
        found = two.run(jobs.tuned, share, options)
        assert found[0] == found[1], options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a best point at an edge
            one = jobs.posterior("net").fit(data()).tune(data("net", 30), generator=jobs.generator(), **options)
        for mine, theirs in zip(found[0]["table"], one.table, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)
        assert found[0]["best"] == pytest.approx(one.best, rel=1e-9)


@pytest.mark.nightly
def test_the_whole_competition_makes_one_choice(two: World, four: World) -> None:
    fitted = jobs.posterior("net").fit(data())
    one = fitted.tune(data("net", 30), generator=jobs.generator(), budget=None)
    for world in (two, four):
        found = world.run(jobs.tuned, "sampled", {"budget": None})
        assert all(each == found[0] for each in found)
        assert found[0]["method"] == one.method
        assert found[0]["best"] == pytest.approx(one.best, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("kflr", {}),
        ("kfac", {"estimator": "exact", "refresh": 4}),
        ("GaussNewton", {"estimator": "exact", "structure": "diag", "damping": "exact", "refresh": 3, "l2": 1e-2}),
        ("GaussNewton", {"estimator": "exact", "structure": "full", "damping": "exact", "adapt_zeta": True}),
    ],
    ids=["kflr", "kfac", "diag", "full"],
)
def test_training_takes_the_steps_of_one_process(two: World, name: str, settings: dict[str, Any]) -> None:
    found = two.run(jobs.trained, name, settings)
    assert found[0] == found[1]
    one = jobs.steps(0, 1, getattr(lk.optim, name), settings)
    for key in one:
        torch.testing.assert_close(
            *(torch.tensor(each[key]).double() for each in (found[0], one)), rtol=1e-9, atol=1e-12
        )


# -- failures ----------------------------------------------------------------------------------------------------------


MESSAGES = {
    "other_structure": ("IncompatiblePair", "structure is ('diag', {}) in process 0"),
    "other_weights": ("IncompatiblePair", "parameter 'last.bias'"),
    "other_buffers": ("IncompatiblePair", "torch.distributed.broadcast(tensor, 0)"),
    "one_sampler": ("IncompatiblePair", "read numbers [0, 0]"),
    "nothing": ("ShapeMismatch", "the data are empty"),
    "ignored": ("ShapeMismatch", "all targets of the data are ignored"),
    "dead": ("UnsupportedLayer", "two.weight"),
    "no_validation": ("ShapeMismatch", "processes [1] have no validation examples"),
    "by_one_number": ("IncompatiblePair", "one number for all examples"),
    "hessian_free": ("IncompatiblePair", "lk.optim.kfac(model, likelihood, process_group=...)"),
    "two_passes": ("IncompatiblePair", "structure='ekfac'"),
    "wrapped": ("IncompatiblePair", "process_group=model.process_group"),
    "state_between": ("IncompatiblePair", "optimizer.synchronize()"),
}


def test_mistakes_are_refused_alike_in_all_processes(two: World) -> None:
    for name, (kind, words) in MESSAGES.items():
        found = two.run(jobs.refused, name)
        assert [each[0] for each in found] == [kind] * 2, (name, found)
        assert all(words in each[1] for each in found), (name, found)
    assert any("same minibatch" in message for message in two.run(jobs.same_data_everywhere)[0])


def test_an_error_in_one_process_is_told_to_the_others(two: World, four: World) -> None:
    for name, own in (("nan_here", "NonFinite"), ("no_minibatch", "NotFitted")):
        other, mine = two.run(jobs.refused, name)
        assert mine[0] == own
        assert other[0] == "DistributedFailure" and "process 1 of 2 failed" in other[1] and own in other[1]
    for at in (1, 6, 14, 17):
        found = four.run(jobs.interrupted, 2, at, jobs.hurt)
        assert [each[0] for each in found] == ["DistributedFailure"] * 2 + ["NonFinite", "DistributedFailure"], at
        assert all(unchanged for _, _, unchanged in found)
        assert all("process 2 of 4 failed" in found[k][1] for k in (0, 1, 3))
    # and the group is as good as before
    cases = [case("kron", "exact", 0)]
    compare(two, cases)
    compare(four, cases)


def killed(victim: int, at: int, size: int = 3) -> None:
    world = World(size, timeout=20)
    try:
        world.send(jobs.interrupted, victim, at, die)
        found = world.results(range(size), seconds=60)
        assert victim not in found, "it has to be dead"
        for rank in set(range(size)) - {victim}:
            kind, message, unchanged = found[rank]
            assert kind == "DistributedFailure", (rank, found[rank])
            assert unchanged and "cannot be used again" in message
    finally:
        world.close()


@pytest.mark.parametrize(("victim", "at"), [(0, 9), (1, 17)], ids=["in the data", "at the sums"])
def test_a_process_that_dies_makes_the_others_fail(victim: int, at: int) -> None:
    killed(victim, at)


@pytest.mark.nightly
def test_a_process_that_dies_anywhere_makes_the_others_fail() -> None:
    places = random.Random(0)
    for _ in range(20):
        killed(places.randrange(3), places.randrange(1, 20))


def test_a_process_that_does_not_come_is_not_waited_for_longer_than_the_timeout() -> None:
    world = World(2, timeout=2)
    try:
        found = world.run(jobs.stayed_away, 1)
        assert found[0][0] == "DistributedFailure" and found[0][2]
        assert "timeout" in found[0][1]
    finally:
        world.close()
