"""Influence, self-influence, groups and rankings against dense per-example gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import laplace_kf as lk
from laplace_kf.attribution import pairs, scoring
from laplace_kf.errors import CorruptFile, IncompatiblePair, NotFitted, ShapeMismatch, UnknownName
from laplace_kf.tape import OuterSignals

STRUCTURES = ("diag", "kron", "ekfac", "full", "lowrank", "layer", "isotropic")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, QUERIES = labelled(30, 1), labelled(7, 2)


def rows(model: nn.Module, data: tuple[Tensor, Tensor], value) -> Tensor:
    """Gradients of ``value(outputs, targets)``, one example at a time, ``(N, P)``."""
    found = []
    for x, y in zip(*data, strict=True):
        grads = torch.autograd.grad(value(model(x[None]), y[None]), list(model.parameters()))
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(found)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    p = outputs.softmax(-1)[0, targets[0]]
    return (p / (1 - p)).log()


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return seeded(network)


@pytest.fixture(scope="module")
def posterior(model) -> lk.LaplacePosterior:
    return lk.LaplacePosterior(model, "categorical").fit(TRAIN)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_has_the_dense_scores(model, structure):
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(TRAIN)
    dense, train = posterior.precision.dense(), rows(model, TRAIN, loss)
    solved = torch.linalg.solve(dense, train.T)
    torch.testing.assert_close(
        lk.attribution.influence(posterior, TRAIN, QUERIES), rows(model, QUERIES, loss) @ solved, rtol=1e-9, atol=1e-12
    )
    expected = (train * solved.T).sum(1)
    torch.testing.assert_close(lk.attribution.self_influence(posterior, TRAIN), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("of", "value"),
    [("margin", margin), (lambda z, y: z[:, 1] ** 2, lambda z, y: z[0, 1] ** 2)],
    ids=["margin", "callable"],
)
def test_values_are_positive_where_an_example_raises_them(model, posterior, of, value):
    solved = torch.linalg.solve(posterior.precision.dense(), rows(model, TRAIN, loss).T)
    expected = -rows(model, QUERIES, value) @ solved
    torch.testing.assert_close(lk.attribution.influence(posterior, TRAIN, QUERIES, of), expected, rtol=1e-9, atol=1e-12)


def test_the_sign_is_that_of_leaving_the_example_out(model, posterior):
    """Positive = helpful: one Newton step without the example raises the loss of the query."""
    found = lk.attribution.influence(posterior, TRAIN, QUERIES)
    query, example = divmod(int(found.abs().argmax()), found.shape[1])
    step = torch.linalg.solve(posterior.precision.dense(), rows(model, TRAIN, loss)[example])
    moved = {name: p + 1e-3 * part[0].detach() for (name, p), part in zip(
        model.named_parameters(), posterior.curvature.layout.split(step[None]).values(), strict=True)}  # fmt: skip
    x, y = QUERIES[0][query : query + 1], QUERIES[1][query : query + 1]
    change = loss(torch.func.functional_call(model, moved, (x,)), y) - loss(model(x), y).detach()
    assert float(change.detach()) / 1e-3 == pytest.approx(float(found[query, example]), rel=0.05)


def test_damping_takes_the_place_of_the_prior(model, posterior):
    found = lk.attribution.influence(posterior, TRAIN, QUERIES, damping=7.0)
    dense = posterior.precision_at(posterior.n_data, 7.0).dense()
    expected = rows(model, QUERIES, loss) @ torch.linalg.solve(dense, rows(model, TRAIN, loss).T)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert posterior.prior_precision == 1.0


def test_the_mean_counts_not_the_weights_of_now(model):
    other = seeded(network)
    posterior = lk.LaplacePosterior(other, "categorical").fit(TRAIN)
    expected = lk.attribution.influence(posterior, TRAIN, QUERIES)
    with torch.no_grad():
        other[0].weight.add_(1.0)
    kept = other[0].weight.clone()
    torch.testing.assert_close(lk.attribution.influence(posterior, TRAIN, QUERIES), expected)
    assert torch.equal(other[0].weight, kept)
    assert other.training


@pytest.mark.parametrize("damping", ["exact", "factored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_terms_run_and_agree_with_directions(monkeypatch, damping, dtype):
    model = seeded(lambda: nn.Sequential(nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 3))).to(dtype)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(60, 90, generator=generator).to(dtype)
    y = torch.randint(3, (60,), generator=generator)
    posterior = lk.LaplacePosterior(model, "categorical", damping=damping).fit((x, y))
    used = []
    add = pairs.Terms.add
    monkeypatch.setattr(pairs.Terms, "add", lambda self, *rest: used.append(self.count) or add(self, *rest))
    found = lk.attribution.influence(posterior, (x, y), (x[:9], y[:9]))
    assert used  # the fast way was taken
    if damping == "factored":
        assert set(used) == {1}
    exact = max(used)
    used.clear()
    rough = lk.attribution.influence(posterior, (x, y), (x[:9], y[:9]), accuracy=1e-2)
    assert damping == "factored" or max(used) < exact
    monkeypatch.setattr(pairs, "MOST_TERMS", 0)
    used.clear()
    direct = lk.attribution.influence(posterior, (x, y), (x[:9], y[:9]))
    assert not used
    size = float(direct.norm() / direct.numel() ** 0.5)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, direct, rtol=tolerance, atol=tolerance * size)
    assert float((rough - direct).norm()) <= 1e-2 * size * direct.numel() ** 0.5


@pytest.mark.parametrize("tokens", [None, "queries", "train"])
def test_terms_of_many_columns_and_examples(monkeypatch, tokens):
    """Sequences in which one layer sees one vector an example, positions come after it; runs shorter than batches."""

    class OneVector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(40, 60), nn.Linear(60, 3 * 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))).reshape(-1, 3, 4)

    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(11, 40, generator=generator).double(), torch.randint(4, (11, 3), generator=generator)
    posterior = lk.LaplacePosterior(seeded(OneVector).double(), "categorical").fit((x, y))
    monkeypatch.setattr(pairs, "CACHED", 4)
    used = []
    add = pairs.Terms.add
    monkeypatch.setattr(pairs.Terms, "add", lambda self, *rest: used.append(self.count) or add(self, *rest))
    found = lk.attribution.influence(posterior, (x, y), (x[:5], y[:5]), tokens=tokens)
    assert used
    monkeypatch.setattr(pairs, "MOST_TERMS", 0)
    direct = lk.attribution.influence(posterior, (x, y), (x[:5], y[:5]), tokens=tokens)
    torch.testing.assert_close(found, direct, rtol=1e-8, atol=1e-11 * float(direct.abs().max()))


def test_cross_terms_are_as_accurate_as_asked():
    s, t = torch.logspace(-6, 3, 40, dtype=torch.float64), torch.logspace(-5, 2, 50, dtype=torch.float64)
    grid, weights = 1 / (s[:, None] * t + 1.0), (s.sqrt(), t.sqrt())
    u, v = pairs.cross_terms(grid, *weights, 1e-9)
    error = weights[0][:, None] * (grid - u.T @ v) * weights[1]
    assert float(error.norm() / (weights[0][:, None] * grid * weights[1]).norm()) <= 1e-9
    assert len(u) < 30  # of 40


def test_queries_in_several_passes_give_the_same(monkeypatch, posterior):
    whole = lk.attribution.influence(posterior, TRAIN, QUERIES)
    monkeypatch.setattr(scoring, "QUERY_BYTES", 3 * 8 * posterior.precision.size)  # three queries at a time
    torch.testing.assert_close(lk.attribution.influence(posterior, TRAIN, QUERIES), whole)
    with pytest.raises(IncompatiblePair, match="several passes"):
        lk.attribution.influence(posterior, iter([TRAIN]), QUERIES)


class Sequences(nn.Module):
    """Tokens in, a distribution over tokens at every position out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.recurrent, self.head = nn.Embedding(6, 4), nn.Linear(8, 5), nn.Linear(5, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        before = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], 1)
        return self.head(torch.tanh(self.recurrent(torch.cat([embedded, before], -1))))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "full"])
def test_tokens_of_sequences(structure):
    model = seeded(Sequences).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(6, (9, 4), generator=generator)
    y = torch.randint(6, (9, 4), generator=generator)
    y[2, 3] = -100
    train, queries = (x[:6], y[:6]), (x[6:], y[6:])
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(train)
    dense = posterior.precision.dense()

    def at(data, t):
        return rows(model, data, lambda z, y: loss(z[:, t : t + 1], y[:, t : t + 1]))

    whole = [sum(at(data, t) for t in range(4)) for data in (queries, train)]
    expected = whole[0] @ torch.linalg.solve(dense, whole[1].T)
    torch.testing.assert_close(lk.attribution.influence(posterior, train, queries), expected, rtol=1e-9, atol=1e-12)
    by_query = torch.stack([at(queries, t) @ torch.linalg.solve(dense, whole[1].T) for t in range(4)], 1)
    found = lk.attribution.influence(posterior, train, queries, tokens="queries")
    torch.testing.assert_close(found, by_query, rtol=1e-9, atol=1e-12)
    by_train = torch.stack([whole[0] @ torch.linalg.solve(dense, at(train, t).T) for t in range(4)], 2)
    found = lk.attribution.influence(posterior, train, queries, tokens="train")
    torch.testing.assert_close(found, by_train, rtol=1e-9, atol=1e-12)


class Attending(nn.Module):
    """A causal transformer of two layers: every position looks at all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(6, 4), nn.Parameter(torch.randn(5, 4))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(4, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, length = self.embedding(tokens) + self.places, tokens.shape[1]
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        for block in self.blocks:
            hidden = block(hidden, src_mask=ahead)
        return self.head(hidden)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_tokens_of_transformers_meet_every_example_once(structure, monkeypatch):
    """Against gradients of every token by ``torch.func``; an example's gradient is made once for all tokens."""
    model = seeded(Attending).double().eval()
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(6, (12, 5), generator=generator) for _ in range(2))
    train, queries = (x[:8], y[:8]), (x[8:], y[8:])
    posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(train)
    named = {name: p.detach() for name, p in model.named_parameters()}

    def losses(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(model, values, (x[None],))[0]
        return nn.functional.cross_entropy(z, y, reduction="none")  # (T,)

    def per_token(data: tuple[Tensor, Tensor]) -> Tensor:
        """``(N, T, P)``."""
        found = [torch.func.jacrev(losses)(named, *pair) for pair in zip(*data, strict=True)]
        return torch.stack([torch.cat([part.flatten(1) for part in one.values()], 1) for one in found])

    solved = torch.linalg.solve(posterior.precision.dense(), per_token(train).sum(1).T)
    by_positions: list[str] = []
    chosen = OuterSignals._gradients_first

    def watched(self, count):
        found = chosen(self, count)
        if self.g.shape[2] > 1 and not found:
            by_positions.append(self.block.name)
        return found

    monkeypatch.setattr(OuterSignals, "_gradients_first", watched)
    gradients: list[str] = []
    made = OuterSignals.gradients
    monkeypatch.setattr(
        OuterSignals, "gradients", lambda self, *rest: gradients.append(self.block.name) or made(self, *rest)
    )
    found = lk.attribution.influence(posterior, train, queries, tokens="queries")
    torch.testing.assert_close(found, per_token(queries) @ solved, rtol=1e-9, atol=1e-12)
    assert not by_positions
    assert gradients and all(gradients.count(name) == 2 for name in gradients)  # of the queries and of the examples


@pytest.mark.parametrize("parameters", ["last_layer", ["0.*"]])
def test_parts_of_a_network(model, parameters):
    posterior = lk.LaplacePosterior(model, "categorical", parameters=parameters).fit(TRAIN)
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    keep = torch.cat([torch.full((n,), name in posterior.mean) for name, n in zip(names, sizes, strict=True)])
    solved = torch.linalg.solve(posterior.precision.dense(), rows(model, TRAIN, loss)[:, keep].T)
    expected = rows(model, QUERIES, loss)[:, keep] @ solved
    torch.testing.assert_close(lk.attribution.influence(posterior, TRAIN, QUERIES), expected, rtol=1e-9, atol=1e-12)


def test_a_subnetwork(model):
    posterior = lk.LaplacePosterior(model, "categorical", "full", parameters=lk.Subnetwork(6)).fit(TRAIN)
    layout = posterior.precision.layout

    def part(data):
        parts, start = {}, 0
        flat = rows(model, data, loss)
        for name, p in model.named_parameters():
            parts[name] = flat[:, start : start + p.numel()].reshape(-1, *p.shape)
            start += p.numel()
        return layout.join(parts)

    expected = part(QUERIES) @ torch.linalg.solve(posterior.precision.dense(), part(TRAIN).T)
    torch.testing.assert_close(lk.attribution.influence(posterior, TRAIN, QUERIES), expected, rtol=1e-9, atol=1e-12)


def test_groups_add_up(posterior):
    groups = torch.arange(30) % 4 - 1
    each = lk.attribution.influence(posterior, TRAIN, QUERIES)
    found = lk.attribution.group_influence(posterior, TRAIN, QUERIES, groups)
    expected = torch.stack([each[:, groups == g].sum(1) for g in range(3)], 1)
    torch.testing.assert_close(found, expected)
    for wrong in (groups[:-1], torch.cat([groups, groups]), groups.double(), -torch.ones(30).long()):
        with pytest.raises(ShapeMismatch):
            lk.attribution.group_influence(posterior, TRAIN, QUERIES, wrong)


def test_rankings(posterior):
    own = lk.attribution.self_influence(posterior, TRAIN)
    losses = nn.functional.cross_entropy(posterior.model(TRAIN[0]), TRAIN[1], reduction="none").detach()
    for score, expected in (("self_influence", own), ("loss", losses), ("left_out", own + losses)):
        ranking = lk.attribution.mislabelled(posterior, TRAIN, score)
        torch.testing.assert_close(ranking.scores, expected)
        assert ranking.order.tolist() == expected.argsort(descending=True).tolist()


def test_an_ensemble_averages_and_keeps_its_scores(tmp_path, model, posterior):
    other = lk.LaplacePosterior(seeded(network), "categorical", prior_precision=5.0).fit(TRAIN)
    both = lk.attribution.Attribution([posterior, other])
    found = both.influence(TRAIN, QUERIES, of="margin")
    one, two = (lk.attribution.influence(p, TRAIN, QUERIES, "margin") for p in (posterior, other))
    torch.testing.assert_close(found, (one + two) / 2)
    assert not torch.allclose(one, two)
    own = both.self_influence(TRAIN)
    both.save(tmp_path / "scores.safetensors")
    back = lk.attribution.Attribution.load(tmp_path / "scores.safetensors")
    assert torch.equal(back.results["influence"], found)
    assert torch.equal(back.scores, own)
    posterior.save(tmp_path / "posterior.safetensors")
    with pytest.raises(CorruptFile):
        lk.attribution.Attribution.load(tmp_path / "posterior.safetensors")
    with pytest.raises(NotFitted):
        _ = lk.attribution.Attribution().scores


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(zip(*TRAIN, strict=True))


def test_what_cannot_be_told_is_refused(model, posterior):
    influence = lk.attribution.influence
    shuffled = DataLoader(TensorDataset(*TRAIN), batch_size=8, shuffle=True)
    ordered = DataLoader(TensorDataset(*TRAIN), batch_size=8)
    torch.testing.assert_close(influence(posterior, ordered, QUERIES), influence(posterior, TRAIN, QUERIES))
    with pytest.raises(IncompatiblePair, match="random order"):
        influence(posterior, shuffled, QUERIES)
    random = BatchSampler(RandomSampler(TensorDataset(*TRAIN)), 8, drop_last=False)
    with pytest.raises(IncompatiblePair, match=r"random order \(RandomSampler\)"):
        influence(posterior, DataLoader(TensorDataset(*TRAIN), batch_sampler=random), QUERIES)
    streamed = DataLoader(Streamed(), batch_size=8)
    torch.testing.assert_close(influence(posterior, streamed, QUERIES), influence(posterior, TRAIN, QUERIES))
    with pytest.raises(UnknownName):
        influence(posterior, TRAIN, QUERIES, "los")
    with pytest.raises(UnknownName):
        influence(posterior, TRAIN, QUERIES, tokens="positions")
    with pytest.raises(ShapeMismatch, match="positions"):
        influence(posterior, TRAIN, QUERIES, tokens="train")
    with pytest.raises(ShapeMismatch, match="one number"):
        influence(posterior, TRAIN, QUERIES, lambda z, y: z)
    with pytest.raises(ShapeMismatch, match="beside others"):
        influence(posterior, TRAIN, QUERIES, lambda z, y: z[:, 0] * z.sum())
    with pytest.raises(ValueError, match="accuracy"):
        influence(posterior, TRAIN, QUERIES, accuracy=1.0)
    with pytest.raises(ShapeMismatch, match="empty"):
        influence(posterior, [], QUERIES)
    with pytest.raises(NotFitted):
        influence(lk.LaplacePosterior(model, "categorical"), TRAIN, QUERIES)
    regression = lk.LaplacePosterior(model, "gaussian").fit((TRAIN[0], torch.zeros(30, 3).double()))
    with pytest.raises(IncompatiblePair, match="margin"):
        influence(regression, TRAIN, (QUERIES[0], torch.zeros(7, 3).double()), "margin")


def test_margins_stay_finite_and_bernoulli_has_its_own():
    posterior = lk.LaplacePosterior(seeded(lambda: nn.Linear(5, 1)).double(), "bernoulli")
    x, y = TRAIN[0], (TRAIN[1][:, None] > 0).double()
    posterior.fit((x, y))
    weight = torch.cat([x, torch.ones(30, 1)], 1)
    p = posterior.model(x).sigmoid().detach()
    sign = 2 * y[:4] - 1
    expected = -(sign * weight[:4]) @ torch.linalg.solve(posterior.precision.dense(), ((p - y) * weight).T)
    torch.testing.assert_close(
        lk.attribution.influence(posterior, (x, y), (x[:4], y[:4]), "margin"), expected, rtol=1e-9, atol=1e-12
    )
    sure = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    value = lk.attribution.values.margin(lk.likelihoods.Categorical(), sure, torch.tensor([0]))
    assert torch.isfinite(torch.autograd.grad(value.sum(), sure)[0]).all()
    with pytest.raises(IncompatiblePair):
        lk.attribution.influence(posterior, (x, y), (x[:4], y[:4] * 0.5), "margin")
