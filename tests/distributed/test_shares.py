"""What processes need no processes for: who does what, which examples are whose, and what is drawn for them."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset, TensorDataset

import laplace_kf as lk
from laplace_kf.distributed import assigned, merged
from laplace_kf.distributed.ranks import _buckets
from laplace_kf.draws import ExampleDraws, RowDraws, bernoulli, categorical, mixed, normal, signs
from laplace_kf.posterior.shared_validation import interleaved
from laplace_kf.shards import Shard
from tests.distributed import jobs
from tests.distributed.problems import data

# -- work --------------------------------------------------------------------------------------------------------------


def test_work_goes_to_whoever_has_least() -> None:
    assert assigned([216, 125, 64, 27], 2) == [0, 1, 1, 1]
    assert assigned([1, 1, 1], 5) == [0, 1, 2]
    assert assigned([], 3) == []


def test_work_is_done_within_four_thirds_of_the_best_time() -> None:
    numbers = random.Random(0)
    for _ in range(60):
        ranks, costs = numbers.randint(2, 3), [numbers.randint(0, 9) ** 3 for _ in range(numbers.randint(1, 7))]
        owners = assigned(costs, ranks)
        time = max(sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks))
        best = min(
            max(sum(c for c, o in zip(costs, other, strict=True) if o == rank) for rank in range(ranks))
            for other in itertools.product(range(ranks), repeat=len(costs))
        )
        assert time <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9
        assert owners == assigned(list(costs), ranks)


def test_work_of_no_size_is_refused() -> None:
    for costs, ranks in (([1.0], 0), ([-1.0], 2), ([math.nan], 2)):
        with pytest.raises(ValueError, match="must"):
            assigned(costs, ranks)


def test_tensors_travel_in_buckets_of_one_type_and_size() -> None:
    large = torch.zeros(2**27, device="meta")
    assert _buckets([torch.zeros(10), torch.zeros(5, dtype=torch.float64), large, torch.zeros(3)]) == [
        [0],
        [1],
        [2],
        [3],
    ]
    assert _buckets([torch.zeros(4), torch.zeros(2, dtype=torch.float64), torch.zeros(3)]) == [[0, 2], [1]]
    assert _buckets([]) == []


# -- shares ------------------------------------------------------------------------------------------------------------


def read(shard: Shard) -> list[int]:
    """The examples of a share, whose value is their index."""
    return [int(value) for batch in shard.data for value in batch[0].flatten()]


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_every_example_counts_once_whatever_a_sampler_repeats(shuffle: bool) -> None:
    for length, size, batch in itertools.product((1, 2, 5, 8, 9), (2, 3, 4, 7), (1, 3)):
        dataset = TensorDataset(torch.arange(length))
        seen: Counter[int] = Counter()
        for rank in range(size):
            sampler: Any = DistributedSampler(dataset, size, rank, shuffle=shuffle, seed=3)
            sampler.set_epoch(2)
            plain = DataLoader(dataset, batch, sampler=sampler)
            own = DataLoader(dataset, batch_sampler=BatchSampler(sampler, batch, False))
            items = DataLoader(dataset, None, sampler=sampler)
            found = [read(Shard(loader, numbered)) for loader in (plain, own) for numbered in (False, True)]
            assert sum(len(each[0]) for each in plain) == len(sampler)  # the user's own loader is as it was
            found.append([int(item[0]) for item in Shard(items).data])
            assert all(each == found[0] for each in found)
            assert set(found[0]) <= set(sampler)
            seen.update(found[0])
        assert seen == Counter(range(length)), (length, size)


def test_a_sampler_that_drops_is_left_alone() -> None:
    dataset = TensorDataset(torch.arange(9))
    loaders = [DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, rank, drop_last=True)) for rank in (0, 1)]
    assert all(Shard(loader).data is loader for loader in loaders)


def test_samplers_that_repeat_by_an_unknown_rule_are_refused() -> None:
    class Own(DistributedSampler[Any]):
        def __iter__(self) -> Any:
            return iter([0, 0, 0, 1, 2][: self.num_samples])

    class BatchSamplerShard(BatchSampler):
        even_batches = True

    dataset = TensorDataset(torch.arange(9))
    for loader, words in (
        (DataLoader(dataset, 2, sampler=Own(dataset, 2, 0)), "drop_last=True"),
        (DataLoader(dataset, batch_sampler=BatchSamplerShard(range(9), 2, False)), "even_batches=False"),
    ):
        with pytest.raises(lk.errors.IncompatiblePair, match=words):
            Shard(loader)


def test_numbers_of_examples_are_their_index_or_their_place() -> None:
    dataset = TensorDataset(torch.arange(10, 20))

    def numbers(shards: list[Shard]) -> list[list[list[int]]]:
        told = [shard.description(shard.data) for shard in shards]
        found = []
        for rank, shard in enumerate(shards):
            shard.settle(told, rank)
            shard.start()
            found.append([shard.numbers(len(batch[0])).tolist() for batch in shard.data])
        return found

    sampled = [
        Shard(DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 3, rank, shuffle=False)), True)
        for rank in range(3)
    ]
    assert numbers(sampled) == [[[0, 3], [6, 9]], [[1, 4], [7]], [[2, 5], [8]]]
    nested = [Shard(DataLoader(Subset(Subset(dataset, range(2, 10)), range(k, 8, 2)), 3), True) for k in (0, 1)]
    assert numbers(nested) == [[[2, 4, 6], [8]], [[3, 5, 7], [9]]]
    own = [Shard(DataLoader(TensorDataset(torch.zeros(size)), 2), True) for size in (3, 2)]
    assert numbers(own) == [[[0, 1], [2]], [[3, 4]]]
    listed = [Shard([(torch.zeros(size), torch.zeros(size))] * 2, True) for size in (3, 1)]
    assert numbers(listed) == [[[0, 1, 2], [3, 4, 5]], [[6], [7]]]
    (shuffled,) = numbers([Shard(DataLoader(dataset, 4, shuffle=True), True)])
    assert sorted(index for batch in shuffled for index in batch) == list(range(10))
    workers = Shard(DataLoader(dataset, 4, num_workers=1), True)
    assert numbers([workers]) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]


def test_a_share_that_is_fitted_alone_is_warned_of() -> None:
    x, y = data()
    dataset = TensorDataset(x, y)
    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 2, 0))
    for call in (
        lambda: jobs.posterior("net").fit(loader),
        lambda: lk.curvature.estimate(jobs.network(), "categorical", loader),
        lambda: jobs.posterior("net").fit(x, y).tune(loader, n_data=[10.0], prior_precision=[1.0]),
    ):
        with pytest.warns(UserWarning, match="1 of 2 shares"):
            call()


def test_groups_that_are_none_are_refused() -> None:
    for group in ("gloo", 3, True):
        with pytest.raises(lk.errors.IncompatiblePair, match="init_process_group"):
            jobs.posterior("net").fit(data(), process_group=group)


def test_blocks_of_different_forms_are_refused() -> None:
    def seen(**options: Any) -> Any:
        found = lk.curvature.estimate(jobs.network(), "categorical", data(), "kron", **options)
        known = (found.count, True, float(found.log_likelihood), found.terms, [])
        from laplace_kf.distributed import Seen

        return Seen(found.blocks, found.layout, [], *known)

    one, other = seen(), seen()
    block = other.blocks["first"]
    other.blocks["first"] = type(block)(**{**vars(block), "one_hot": True})
    with pytest.raises(lk.errors.IncompatiblePair, match="processes 0 and 1 use 'first' in different ways"):
        merged([one, other])
    assert merged([one, one]).count == 2 * one.count


# -- scores ------------------------------------------------------------------------------------------------------------


def test_the_first_examples_are_the_first_of_every_share() -> None:
    for counts in ([3, 1, 5], [4, 4], [1, 9]):
        order = interleaved(counts)
        assert sorted(order) == [(rank, k) for rank, count in enumerate(counts) for k in range(count)]
        for size in range(len(order)):
            taken = Counter(rank for rank, _ in order[:size])
            for rank, count in enumerate(counts):
                assert {k for r, k in order[:size] if r == rank} == set(range(taken[rank]))
                assert abs(taken[rank] - size * count / len(order)) <= 1.0


# -- draws -------------------------------------------------------------------------------------------------------------


def test_numbers_are_hashed_as_on_paper() -> None:
    """splitmix64 (Steele, Lea, Flood 2014) of plain integers, one at a time."""

    def plain(key: int, more: int) -> int:
        z = (key + (more + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    keys = [0, 1, 2**62, -1, -(2**63), 12345]
    for more in (0, 1, 7, 2**20, 2**62 + 5, -3):
        wanted = [plain(key, more) for key in keys]
        for found in (mixed(torch.tensor(keys), more), mixed(torch.tensor(keys), torch.tensor(more))):
            assert [n % 2**64 for n in found.tolist()] == wanted
        other = mixed(more, torch.tensor(keys))
        assert [n % 2**64 for n in other.tolist()] == [plain(more, key) for key in keys]


def test_draws_are_spread_as_they_should_be() -> None:
    keys = ExampleDraws(3, torch.arange(40_000)).rows(torch.ones(40_000, 1, dtype=torch.bool))
    uniform = keys.uniform(2)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    for k in range(1, 5):
        assert uniform.pow(k).mean(0).tolist() == pytest.approx([1 / (k + 1)] * 2, abs=0.006)
    assert float(torch.corrcoef(uniform.T)[0, 1]) == pytest.approx(0, abs=0.02)
    assert float(torch.corrcoef(torch.stack([uniform[1:, 0], uniform[:-1, 0]]))[0, 1]) == pytest.approx(0, abs=0.02)
    noise = normal((40_000, 3), keys, torch.float64)
    for k, moment in enumerate((0.0, 1.0, 0.0, 3.0), 1):
        assert float(noise.pow(k).mean()) == pytest.approx(moment, abs=0.08)
    assert float(torch.cov(noise.T)[0, 1]) == pytest.approx(0, abs=0.02)
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    chosen = torch.bincount(categorical(p.expand(40_000, 4), keys), minlength=4) / 40_000
    assert chosen.tolist() == pytest.approx(p.tolist(), abs=0.01) and chosen[1] == 0
    assert float(bernoulli(torch.full((40_000, 2), 0.2), keys).mean()) == pytest.approx(0.2, abs=0.01)
    found = signs((40_000, 70), keys, torch.float64)
    assert set(found.unique().tolist()) == {-1.0, 1.0} and found.shape == (40_000, 70)
    gram = found.T @ found / 40_000
    assert float((gram - torch.eye(70)).abs().max()) < 0.025


def test_draws_of_an_example_hang_on_nothing_but_its_number() -> None:
    kept = torch.ones(6, 3, dtype=torch.bool)
    index = torch.tensor([5, 17, 2**45, 3, 8, 0])
    whole = ExampleDraws(1, index).rows(kept).uniform(2).reshape(6, 3, 2)
    part = ExampleDraws(1, index[[4, 1]]).rows(kept[:2]).uniform(2).reshape(2, 3, 2)
    assert torch.equal(whole[[4, 1]], part)
    fewer = kept.clone()
    fewer[:, 1] = False  # a position that does not count does not shift the others
    assert torch.equal(ExampleDraws(1, index).rows(fewer).uniform(2).reshape(6, 2, 2), whole[:, :2])
    others = [ExampleDraws(2, index), ExampleDraws(1, index, 1), ExampleDraws(1, index + 1)]
    assert all(not torch.equal(other.rows(kept).uniform(2).reshape(6, 3, 2), whole) for other in others)
    draws = ExampleDraws(1, index)
    assert not torch.equal(draws.rows(kept).uniform(2), draws.rows(kept).uniform(2))  # samples differ


def test_likelihoods_without_draws_by_row_use_a_generator_for_every_row() -> None:
    likelihood = lk.likelihoods.Poisson()
    outputs = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(6, 2)
    targets = torch.ones_like(outputs)
    index = torch.arange(6)
    whole = likelihood.drawn_score(outputs, targets, ExampleDraws(4, index))
    part = likelihood.drawn_score(outputs[[5, 2]], targets[:2], ExampleDraws(4, index[[5, 2]]))
    assert torch.equal(whole[[5, 2]], part)
    many = torch.stack([likelihood.drawn_score(outputs, targets, ExampleDraws(s, index)) for s in range(200)])
    spread = many.square().mean(0) / outputs.exp()  # of a score: the Fisher information, the rate
    assert spread.flatten().tolist() == pytest.approx([1.0] * 12, abs=0.7)


def _poisson(outputs: torch.Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Poisson(outputs.exp())


def _counts(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.exp() - targets * outputs).sum(-1)


def _two_counts(outputs: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return _counts(outputs, torch.stack(targets, -1))


def _pair(outputs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.poisson(outputs.exp(), generator=generator)
    return drawn[:, 0], drawn[:, 1]


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (lk.likelihoods.Poisson(), torch.ones(6, 2)),
        (lk.likelihoods.FromDistribution(_poisson, curvature="hessian"), torch.ones(6, 2)),
        (lk.likelihoods.FromLoss(_counts, sample=lambda z, g: torch.poisson(z.exp(), generator=g)), torch.ones(6, 2)),
        (lk.likelihoods.FromLoss(_two_counts, sample=_pair), (torch.ones(6), torch.ones(6))),
    ],
    ids=["poisson", "distribution", "loss", "loss of pairs"],
)
def test_targets_drawn_row_by_row_are_scored_as_if_alone(likelihood: Any, targets: Any) -> None:
    """Of independent counts, whichever way they are written down: the score is count minus rate."""
    outputs = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(6, 2)
    index = torch.arange(6) + 3
    found = likelihood.drawn_score(outputs, targets, ExampleDraws(4, index))
    for b in range(6):
        own = tuple(t[b : b + 1] for t in targets) if isinstance(targets, tuple) else targets[b : b + 1]
        alone = likelihood.drawn_score(outputs[b : b + 1], own, ExampleDraws(4, index[b : b + 1]))
        torch.testing.assert_close(found[b : b + 1], alone, rtol=1e-12, atol=1e-12)
    counts = found + outputs.exp()
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert len(set(counts.flatten().tolist())) > 2


class Doubled(lk.likelihoods.Bernoulli):
    """A user's own way to draw in a class that inherits draws by row."""

    def _draw(self, z: Any, shape: Any, generator: Any) -> Any:
        return torch.bernoulli(torch.sigmoid(z), generator=generator).reshape(tuple(shape))


@pytest.mark.parametrize("likelihood", [lk.likelihoods.Categorical(), Doubled(), lk.likelihoods.Gaussian(0.5)], ids=str)
@pytest.mark.parametrize("estimator", ["sampled", "projection"])
def test_a_fit_hangs_on_no_order_of_the_data(likelihood: Any, estimator: str) -> None:
    x, y = data()
    targets = y if isinstance(likelihood, lk.likelihoods.Categorical) else torch.eye(3, dtype=torch.float64)[y]
    dataset = TensorDataset(x, targets)
    found = []
    for loader in (
        (x, targets),
        DataLoader(dataset, 5, shuffle=True),
        DataLoader(dataset, 22, shuffle=True, num_workers=0),
    ):
        before = torch.get_rng_state()
        statistics = lk.curvature.estimate(
            jobs.network(), likelihood, loader, "diag", estimator, generator=jobs.generator(), samples=2
        )
        assert torch.equal(before, torch.get_rng_state())
        found.append(statistics.mean().diag())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-14)
    other = lk.curvature.estimate(jobs.network(), likelihood, (x, targets), "diag", estimator, samples=2)
    assert not torch.allclose(other.mean().diag(), found[0])
    assert isinstance(ExampleDraws(0, torch.arange(2)).rows(torch.ones(2, 1, dtype=torch.bool)), RowDraws)


def test_sharded_parameters_are_refused_with_the_line_that_gathers_them() -> None:
    class DTensor_(torch.nn.Parameter):
        pass

    DTensor_.__name__ = "DTensor"
    model = jobs.network()
    model.last.weight = DTensor_(model.last.weight.detach())
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"'last.weight'.*get_model_state_dict\(model"):
        lk.LaplacePosterior(model, "categorical")
