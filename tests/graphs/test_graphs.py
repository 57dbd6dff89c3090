"""Graphs as examples: curvature, predictions, tuning, chaining and optimisers against references graph by graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laplace_kf as lk
from laplace_kf import batches
from tests.graphs.doubles import Graphs
from tests.graphs.problems import SIZES, C, Library, Nodes, Pooled, ggn, jacobian, net, one, randn, several

EXACT = 1e-12


@pytest.fixture(params=["double", "torch_geometric"])
def kind(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


def close(found: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def estimate(model: nn.Module, data: Any, structure: str = "full", **settings: Any) -> Any:
    return lk.curvature.estimate(model, "categorical", data, structure=structure, **settings)


def mask(*kept: int, size: int = 7) -> Tensor:
    found = torch.zeros(size, dtype=torch.bool)
    found[list(kept)] = True
    return found


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ one graph


@pytest.mark.parametrize("form", ["list", "alone", "with targets beside it", "with the graph as argument"])
def test_nodes_of_one_graph_are_positions(kind: Library, form: str) -> None:
    graph, model = one(kind), net()
    data: Any = {"alone": graph, "with targets beside it": [(graph, graph["y"].clone())]}.get(form, [graph])
    if form == "with the graph as argument":

        class Whole(Nodes):
            def forward(self, data: Any) -> Tensor:  # type: ignore[override]
                return super().forward(data["x"], data["edge_index"])

        whole = net(Whole)
        found = estimate(whole, data)
    else:
        found = estimate(model, data)
    assert found.n_data == 1
    wanted = ggn(model, [graph])
    close(found.total().dense(), wanted)
    close(estimate(model, [graph], "diag").total().diag(), wanted.diagonal())


def test_nodes_outside_the_training_mask_do_not_count(kind: Library) -> None:
    kept = mask(0, 3, 4)
    graph, model = one(kind, train_mask=kept), net()
    wanted = ggn(model, [graph], [kept])
    for structure in ("full", "diag"):
        close(estimate(model, [graph], structure).total().diag(), wanted.diagonal())
    marked = one(kind, y=torch.where(kept, graph["y"], -100))
    close(estimate(model, [marked]).total().dense(), wanted)
    for structure in ("kron", "ekfac"):
        close(estimate(model, [graph], structure).total().dense(), estimate(model, [marked], structure).total().dense())


def test_kronecker_factors_are_those_of_the_nodes_that_reach_a_counted_one(kind: Library) -> None:
    kept = mask(2)
    graph, model = one(kind, train_mask=kept), net()
    h, inputs, columns = graph["x"], [], []
    edge_index = graph["edge_index"]
    first = model.first(h).detach().requires_grad_()
    hidden = model.act(model.messages(first, edge_index))
    second = nn.functional.linear(hidden, model.second.weight, model.second.bias)
    z = model.messages(second, edge_index)
    p = z[2].softmax(-1).detach()
    hessian = torch.diag(p) - torch.outer(p, p)
    for a, site in ((h, first), (hidden.detach(), second)):
        j = torch.stack([torch.autograd.grad(z[2, c], site, retain_graph=True)[0] for c in range(C)])  # (C, T, O)
        rows = j.abs().sum((0, 2)) > 0
        assert 0 < int(rows.sum()) < 7  # the case is a case
        ones = torch.cat([a, torch.ones(7, 1, dtype=a.dtype)], 1)[rows]
        inputs.append(ones.T @ ones)
        columns.append(torch.einsum("ato,ab,btp->op", j[:, rows], hessian, j[:, rows]) / int(rows.sum()))
    blocks = estimate(model, [graph], "kron").total().entries
    for (block, matrix), a, g in zip(blocks, inputs, columns, strict=True):
        assert block.factorises
        close(matrix.dense(), torch.kron(g.contiguous(), a.contiguous()))  # over [W | b], row by row


def test_first_nodes_of_a_sampled_subgraph_count(kind: Library) -> None:
    graph, model = one(kind, batch_size=3), net()
    close(estimate(model, [graph]).total().dense(), ggn(model, [graph], [mask(0, 1, 2)]))
    posterior = lk.LaplacePosterior(model, "categorical").fit([graph])
    assert posterior.predict(graph).probs.shape == (1, 3, C)
    # which nodes count is the loader's choice, whatever the masks say
    masked = one(kind, batch_size=3, train_mask=mask(), val_mask=mask(5))
    close(estimate(model, [masked]).total().dense(), ggn(model, [graph], [mask(0, 1, 2)]))
    posterior.tune([masked], n_data=[1.0], prior_precision=[1.0], method="mc", samples=2)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"sampled neighbours.*input_nodes=data.train_mask"):
        estimate(model, [one(kind, batch_size=3, train_mask=mask(0, 1))])


def test_labelled_pairs_and_edges(kind: Library) -> None:
    pairs = torch.tensor([[0, 1, 2, 5], [3, 3, 6, 5]])

    class Pairs(Nodes):
        def forward(self, x: Tensor, edge_index: Tensor, edge_label_index: Tensor) -> Tensor:  # type: ignore[override]
            h = super().forward(x, edge_index)
            return h[edge_label_index[0]] * h[edge_label_index[1]]

    model = net(Pairs)
    graph = one(kind, edge_label_index=pairs, edge_label=torch.tensor([0, 2, 1, 0]))
    found = estimate(model, [graph])

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.inner(x, edge_index, pairs)

    close(found.total().dense(), ggn(Fixed(), [graph]))
    assert lk.LaplacePosterior(model, "categorical").fit([graph]).predict(graph).probs.shape == (1, 4, C)

    class Edges(Nodes):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            h = super().forward(x, edge_index)
            return h[edge_index[0]] * h[edge_index[1]]

    edges = one(kind, y=torch.arange(14) % C)
    close(estimate(net(Edges), [edges]).total().dense(), ggn(net(Edges), [edges]))


# ------------------------------------------------------------------------------------------------ several graphs


@pytest.mark.parametrize("level", ["graph", "node"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_of_graphs(kind: Library, level: str, batch_size: int) -> None:
    graphs, model = several(kind, level), net(Pooled if level == "graph" else Nodes)
    wanted = ggn(model, graphs)
    data = kind.loader(graphs, batch_size)
    found = estimate(model, data)
    assert found.n_data == len(SIZES)  # a graph is an example, however they are put together
    close(found.total().dense(), wanted)
    close(estimate(model, data, "diag").total().diag(), wanted.diagonal())
    close(estimate(model, data, "layer").total().diag(), wanted.diagonal())
    alone = [kind.batch.from_data_list([graph]) for graph in graphs]
    for structure in ("kron", "ekfac"):
        curvature = estimate(model, data, structure)
        assert all(block.factorises for block in curvature.blocks.values())
        close(curvature.total().dense(), estimate(model, alone, structure).total().dense())


@pytest.mark.pairs(
    level=["graph", "node"],
    estimator=["exact", "importance", "sampled", "projection", "empirical"],
    structure=["diag", "kron", "ekfac", "full", "lowrank", "layer", "isotropic"],
)
def test_every_structure_and_estimator_sees_the_same_in_any_batch(level: str, estimator: str, structure: str) -> None:
    kind = Library("double")
    graphs, model = several(kind, level), net(Pooled if level == "graph" else Nodes)
    drawn = {"importance": {"columns": 500.0}, "sampled": {"samples": 50}, "projection": {"samples": 50}}
    settings: dict[str, Any] = drawn.get(estimator, {})
    if structure == "lowrank":
        settings = {**settings, "rank": 4}
    try:
        found = estimate(model, kind.loader(graphs, 5), structure, estimator=estimator, generator=rng(), **settings)
    except lk.errors.IncompatiblePair:
        pytest.skip("no such pair")
    alone = estimate(model, kind.loader(graphs, 1), structure, estimator=estimator, generator=rng(), **settings)
    exact = estimator in ("exact", "empirical")
    assert found.n_data == alone.n_data == len(SIZES)
    close(found.total().diag(), alone.total().diag(), 1e-8 if exact else 0.25)
    if estimator == "empirical" and structure in ("full", "diag"):
        wanted = torch.zeros(())
        for graph in graphs:
            z, j = jacobian(model, graph)
            score = nn.functional.one_hot(graph["y"], C) - z.softmax(-1)
            wanted = wanted + torch.einsum("na,nap->p", score, j).square()
        close(found.total().diag(), wanted)


def test_targets_of_some_graphs_and_nodes_ignored(kind: Library) -> None:
    graphs, model = several(kind, "node"), net()
    kept = [torch.arange(nodes) % 2 == 0 for nodes in SIZES]
    kept[1] = torch.zeros(SIZES[1], dtype=torch.bool)
    for graph, which in zip(graphs, kept, strict=True):
        graph["y"] = torch.where(which, graph["y"], -100)
    found = estimate(model, kind.loader(graphs, 5))
    assert found.n_data == len(SIZES) - 1
    close(found.total().dense(), ggn(model, graphs, kept))
    part = estimate(model, kind.loader(graphs, 5), "kron").total().dense()
    close(part, estimate(model, kind.loader(graphs, 1), "kron").total().dense())


class Prototypes(Pooled):
    """Uses a parameter by a function without a rule, and one that all graphs share: gradients graph by graph."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:  # type: ignore[override]
        near = torch.cdist(self.first(x), self.points).tanh()
        return super().forward(torch.cat([x[:, :2], near], 1), edge_index, batch)


def test_parameters_without_a_rule_take_single_graphs(kind: Library) -> None:
    graphs, model = several(kind), net(Prototypes)
    before = Graphs.cuts
    found = estimate(model, kind.loader(graphs, 5))
    close(found.total().dense(), ggn(model, graphs))
    if kind.name == "double":
        assert Graphs.cuts > before
    kron = estimate(model, kind.loader(graphs, 2), "kron")
    assert not kron.blocks["points"].factorises
    close(kron.total().dense(), estimate(model, kind.loader(graphs, 1), "kron").total().dense())


def test_gradients_of_single_graphs_by_node(kind: Library) -> None:
    """A graph alone has fewer rows than in a batch, where it is padded to the largest."""

    class Scaled(Nodes):
        def __init__(self) -> None:
            super().__init__()
            self.points = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return super().forward(torch.cat([x[:, :2], torch.cdist(x, self.points).tanh()], 1), edge_index)

    graphs, model = several(kind, "node"), net(Scaled)
    wanted = ggn(model, graphs)
    for structure in ("full", "diag"):
        close(estimate(model, kind.loader(graphs, 5), structure).total().diag(), wanted.diagonal())
    posterior = lk.LaplacePosterior(model, "categorical", structure="full").fit(kind.loader(graphs, 2))
    inverse = torch.linalg.inv(posterior.precision.dense())
    found = posterior.functional_covariance(kind.batch.from_data_list(graphs))
    for k, graph in enumerate(graphs):
        j = jacobian(model, graph)[1].flatten(0, 1)
        close(found[k, : len(j), : len(j)], j @ inverse @ j.T, 1e-10)


def test_batch_that_cannot_be_cut_says_so() -> None:
    kind = Library("double")
    graphs = several(kind)

    class Uncut(Graphs):
        get_example = property()  # type: ignore[assignment]

    batch = Uncut.from_data_list(graphs)
    close(estimate(net(Pooled), [batch]).total().dense(), ggn(net(Pooled), graphs))  # where no cut is needed
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"Uncut.*no get_example.*from_data_list.*one graph at a time"):
        estimate(net(Prototypes), [batch])


def test_which_nodes_count_does_not_depend_on_the_largest_one(kind: Library) -> None:
    class Largest(Pooled):
        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:  # type: ignore[override]
            h = self.first(x)
            empty = h.new_zeros(int(batch.max()) + 1, 5)
            return self.second(empty.scatter_reduce(0, batch[:, None].expand_as(h), h, "amax", include_self=False))

    graphs, model = several(kind), net(Largest)
    block, matrix = estimate(model, kind.loader(graphs, 5), "kron").total().entries[0]
    assert block.name == "first"
    x = torch.cat([g["x"] for g in graphs])
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    a = inputs.T @ inputs  # all nodes: another one may be the largest at other weights
    found = matrix.dense()[:5, :5]  # a block of G ⊗ A
    close(found / found[0, 0], a / a[0, 0], 1e-10)


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_functional_covariance_graph_by_graph(kind: Library, structure: str) -> None:
    for level, model in (("graph", net(Pooled)), ("node", net())):
        graphs = several(kind, level)
        posterior = lk.LaplacePosterior(model, "categorical", structure=structure).fit(kind.loader(graphs, 2))
        inverse = torch.linalg.inv(posterior.precision.dense())
        found = posterior.functional_covariance(kind.batch.from_data_list(graphs))
        for k, graph in enumerate(graphs):
            j = jacobian(model, graph)[1].flatten(0, 1)
            close(found[k, : len(j), : len(j)], j @ inverse @ j.T, 1e-10)
            assert not bool(found[k, len(j) :].any())


@pytest.mark.parametrize("method", ["map", "mc", "linearized", "probit"])
def test_predictions_of_a_batch_are_those_of_its_graphs(kind: Library, method: str) -> None:
    for level, model in (("graph", net(Pooled)), ("node", net())):
        graphs = several(kind, level)
        batch = kind.batch.from_data_list(graphs)
        posterior = lk.LaplacePosterior(model, "categorical").fit(kind.loader(graphs, 2))
        found = posterior.predict(batch, method=method, generator=rng(1))
        assert len(found.probs) == len(found.entropy) == len(graphs)
        for k, graph in enumerate(graphs):
            alone = posterior.predict(kind.batch.from_data_list([graph]), method=method, generator=rng(1))
            rows = SIZES[k] if level == "node" else C
            close(found.probs[k][:rows], alone.probs[0][:rows], 1e-10)
            close(found.entropy[k], alone.entropy[0], 1e-10)  # nothing comes from the padding
            wanted = graph["y"][None] if level == "node" else graph["y"]
            if level == "graph":
                close(found.log_prob(batch["y"])[k], alone.log_prob(wanted)[0], 1e-10)
        if level == "node":
            targets = lk.graphs.padded(batch["y"], batch, fill=-100)
            each = [posterior.predict(g, method=method, generator=rng(1)).log_prob(g["y"][None])[0] for g in graphs]
            close(found.log_prob(targets), torch.stack(each), 1e-10)
            flat = lk.graphs.unpadded(found.probs, batch)
            assert flat.shape == (sum(SIZES), C)
            close(flat[SIZES[0] : SIZES[0] + SIZES[1]], found.probs[1, : SIZES[1]])
            close(lk.graphs.padded(flat, batch), lk.graphs.padded(lk.graphs.unpadded(found.probs, batch), batch))


def test_predictor_of_a_batch_has_no_entropy_in_the_padding(kind: Library) -> None:
    graphs, model = several(kind, "node"), net()
    posterior = lk.LaplacePosterior(model, "categorical").fit(kind.loader(graphs, 2))
    predictor = posterior.predictor(4, rng(2))
    found = predictor(kind.batch.from_data_list(graphs))
    for k, graph in enumerate(graphs):
        alone = predictor(graph)
        close(found.entropy[k], alone.entropy[0], 1e-10)
        close(found.mutual_information[k], alone.mutual_information[0], 1e-10)


def test_draws_of_activations_are_refused(kind: Library) -> None:
    graph = one(kind)
    posterior = lk.LaplacePosterior(net(), "categorical").fit([graph])
    with pytest.raises(lk.errors.IncompatiblePair, match=r"nodes of a graph share the weights.*weights"):
        posterior.predict(graph, method="mc", space="activations")


# ------------------------------------------------------------------------------------------------ tune, chain, optimise


def test_tune_looks_at_the_validation_mask(kind: Library) -> None:
    train, val = mask(0, 1, 2, 3), mask(4, 5, 6)
    graph, model = one(kind, train_mask=train, val_mask=val), net()
    posterior = lk.LaplacePosterior(model, "categorical").fit([graph])
    close(posterior.curvature.diag(), estimate(model, [one(kind, train_mask=train)], "kron").mean().diag())
    found = posterior.tune([graph], method="map", n_data=[1.0], prior_precision=[1.0])
    z = model(graph["x"], graph["edge_index"])
    wanted = float(nn.functional.cross_entropy(z[val], graph["y"][val], reduction="sum").detach())
    assert abs(found.best["objective"] - wanted) < 1e-10
    test = lk.graphs.masked(graph, "val_mask")
    assert "train_mask" not in test and "train_mask" in graph
    again = posterior.tune([test], method="map", n_data=[1.0], prior_precision=[1.0])
    assert abs(again.best["objective"] - wanted) < 1e-10
    with pytest.raises(lk.errors.ShapeMismatch, match=r"train_mask and no val_mask.*graphs.masked"):
        posterior.tune([one(kind, train_mask=train)])


@pytest.mark.parametrize("parameters", ["all", "last_layer"])
@pytest.mark.parametrize("method", ["mc", "linearized", "probit"])
def test_tune_on_batches_of_graphs(parameters: str, method: str) -> None:
    kind = Library("double")
    for level, model in (("graph", net(Pooled)), ("node", net())):
        graphs = several(kind, level)
        scores = []
        for size in (1, 5):
            posterior = lk.LaplacePosterior(model, "categorical", parameters=parameters).fit(kind.loader(graphs, 2))
            grid: dict[str, Any] = {"n_data": [5.0], "prior_precision": [1.0], "samples": 4, "generator": rng(1)}
            scores.append(posterior.tune(kind.loader(graphs, size), method=method, **grid).best["objective"])
        assert abs(scores[0] - scores[1]) < 1e-9


def test_accuracy_looks_at_the_test_mask(kind: Library) -> None:
    graph, model = one(kind, train_mask=mask(0), test_mask=mask(4, 5, 6)), net()
    right = model(graph["x"], graph["edge_index"]).argmax(-1) == graph["y"]
    assert abs(lk.continual.accuracy(model, [graph]) - float(right[4:].double().mean())) < 1e-12


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_chaining_adds_the_curvature_of_the_new_graphs(kind: Library, structure: str) -> None:
    graphs, model = several(kind), net(Pooled)
    first = lk.LaplacePosterior(model, "categorical", structure=structure).fit(kind.loader(graphs[:2], 2))
    second = first.update(kind.loader(graphs[2:], 2))
    curvature = estimate(model, kind.loader(graphs[2:], 1), structure).total().dense()
    close(second.precision.dense(), first.precision.dense() + curvature, 1e-10)
    assert second.n_data == len(SIZES)


@pytest.mark.parametrize("level", ["graph", "node"])
def test_optimiser_step_on_a_batch_of_graphs(kind: Library, level: str) -> None:
    graphs = several(kind, level)
    model = net(Pooled if level == "graph" else Nodes)
    batch = kind.batch.from_data_list(graphs)
    wanted = 0.0
    for graph in graphs:
        z, _ = jacobian(model, graph)
        wanted += float(nn.functional.cross_entropy(z, graph["y"], reduction="sum")) / len(graphs)
    for preset in (lk.optim.kfac, lk.optim.kflr, lk.optim.hessian_free):
        trained = copy.deepcopy(model)
        optimiser = preset(trained, "categorical", l2=0.0, generator=rng(), curvature_fraction=0.5)
        first = optimiser.step(batch)
        assert abs(float(first) - wanted) < 1e-10
        assert float(optimiser.step(batch)) < wanted


def test_gaussian_targets_of_nodes(kind: Library) -> None:
    graph, model = one(kind, y=randn(7, C, seed=9), train_mask=mask(1, 2)), net()
    likelihood = lk.likelihoods.Gaussian(0.5, ignore_index=-100)
    found = lk.curvature.estimate(model, likelihood, [graph], structure="full").total().dense()
    _, j = jacobian(model, graph)
    close(found, torch.einsum("nap,naq->pq", j[1:3], j[1:3]) / 0.25)
    posterior = lk.LaplacePosterior(model, "gaussian")
    with pytest.raises(lk.errors.IncompatiblePair, match=r"train_mask.*Gaussian\(ignore_index=-100\)"):
        posterior.fit([graph])
    whole = one(kind, y=randn(7, C, seed=9), val_mask=mask(1, 2))
    with pytest.raises(lk.errors.IncompatiblePair, match=r"ignore_index=-100"):
        posterior.fit([whole]).tune([whole])
    with pytest.raises(lk.errors.IncompatiblePair, match=r"ignore_index=-100"):
        lk.optim.kfac(copy.deepcopy(model), "gaussian").step(graph)


# ------------------------------------------------------------------------------------------------ refusals


def nodes_as_examples(model: nn.Module, graph: Any) -> Any:
    return model(graph["x"], graph["edge_index"]), graph["y"]


Refusal = tuple[Callable[[Library], Any], type[Exception], str]
REFUSALS: dict[str, Refusal] = {
    "nodes as examples": (
        lambda kind: estimate(net(), [one(kind)], forward=nodes_as_examples),
        lk.errors.UnsupportedLayer,
        r"7 rows for one graph.*neighbours.*forward=lambda model, batch: \(model\(batch.x, batch.edge_index\)\[None\]",
    ),
    "no targets": (
        lambda kind: estimate(net(), [kind.graph(x=randn(7, 4), edge_index=torch.zeros(2, 3, dtype=torch.long))]),
        lk.errors.ShapeMismatch,
        r"no targets 'y'.*set graph.y",
    ),
    "several splits": (
        lambda kind: estimate(net(), [one(kind, train_mask=torch.ones(7, 3, dtype=torch.bool))]),
        lk.errors.ShapeMismatch,
        r"mask must be bool of shape \(7,\).*train_mask\[:, 0\]",
    ),
    "mask of numbers": (
        lambda kind: estimate(net(), [one(kind, train_mask=torch.tensor([0, 3]))]),
        lk.errors.ShapeMismatch,
        r"mask must be bool of shape \(7,\), .*int64 \(2,\)",
    ),
    "targets of another length": (
        lambda kind: estimate(net(), [one(kind, y=torch.arange(5) % C)]),
        lk.errors.ShapeMismatch,
        r"7 rows, one a node, and the targets have shape \(5,\)",
    ),
    "rows of nothing": (
        lambda kind: lk.LaplacePosterior(net(Half), "categorical").fit([one(kind)]),
        lk.errors.ShapeMismatch,
        r"3 rows for 1 graph with 7 nodes and 14 edges",
    ),
    "no output axis": (
        lambda kind: lk.LaplacePosterior(net(Squeezed), "bernoulli").fit([one(kind)]),
        lk.errors.ShapeMismatch,
        r"shape \(7,\).*Keep the output axis",
    ),
    "unknown arguments": (
        lambda kind: estimate(net(Unknown), [one(kind)]),
        lk.errors.ShapeMismatch,
        r"Unknown.forward takes signal, positions.*\['edge_index', 'x', 'y'\].*forward=lambda",
    ),
    "masked without a mask": (
        lambda kind: lk.graphs.masked(one(kind), "test_mask"),
        lk.errors.ShapeMismatch,
        r"no 'test_mask'",
    ),
}


class Half(Nodes):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index)[:3]


class Squeezed(Nodes):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index)[:, 0]


class Unknown(Nodes):
    def forward(self, signal: Tensor, positions: Tensor) -> Tensor:
        return super().forward(signal, positions)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(kind: Library, name: str) -> None:
    attempt, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        attempt(kind)


def test_last_layer_with_nodes_as_examples_is_exact(kind: Library) -> None:
    """Where no single node is needed, ``forward=`` may count nodes."""
    graph = one(kind)

    class Last(Nodes):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.second(self.act(self.messages(self.first(x), edge_index)))

    model = net(Last)
    found = estimate(model, [graph], forward=nodes_as_examples, parameters="last_layer")
    assert found.n_data == 7
    names = [name for name, _ in model.named_parameters()]
    size = sum(p.numel() for n, p in model.named_parameters() if n.startswith("second"))
    assert names[-2:] == ["second.weight", "second.bias"]
    close(found.total().dense(), ggn(model, [graph])[-size:, -size:])


def test_heterogeneous_graphs_are_refused_by_name_and_work_with_forward() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graph = data.HeteroData()
    graph["paper"].x, graph["paper"].y = randn(5, 4), torch.tensor([0, 1, -100, 2, 0])
    graph["author"].x = randn(3, 4, seed=1)
    graph["author", "writes", "paper"].edge_index = torch.tensor([[0, 1, 2], [0, 1, 4]])

    class Hetero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.other = nn.Linear(4, C), nn.Linear(4, C)

        def forward(self, x_dict: Any, edge_index_dict: Any) -> Any:
            edges = edge_index_dict["author", "writes", "paper"]
            given = self.other(x_dict["author"])[edges[0]]
            own = self.own(x_dict["paper"])
            return {"paper": (own + torch.zeros_like(own).index_add(0, edges[1], given)).tanh()}

    model = net(Hetero)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"heterogeneous.*\['paper', 'author'\].*\['paper'\]\[None\]"):
        estimate(model, [graph])

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch.x_dict, batch.edge_index_dict)["paper"][None], batch["paper"].y[None]

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *_: Any) -> Tensor:
            return model(graph.x_dict, graph.edge_index_dict)["paper"]

    reference = Plain()
    kept = graph["paper"].y != -100
    found = estimate(model, [graph], forward=forward).total().dense()
    fixed = one(Library("double"))
    close(found, ggn(reference, [fixed], [kept]))


def test_graphs_in_plain_tensors_of_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of all graphs in one tensor and a number for each: exact, and Kronecker blocks, with no graph object."""
    kind = Library("double")
    graphs, model = several(kind), net(Pooled)
    batch = Graphs.from_data_list(graphs)
    data = [((batch["x"], batch["edge_index"], batch["batch"]), batch["y"])]
    close(estimate(model, data).total().dense(), ggn(model, graphs))
    kron = estimate(model, data, "kron")
    assert all(block.factorises for block in kron.blocks.values())
    close(kron.total().dense(), estimate(model, kind.loader(graphs, 1), "kron").total().dense())


def test_nothing_of_a_graph_is_changed(kind: Library) -> None:
    class Rude(Nodes):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return super().forward(x.mul_(1.0).add_(0.0), edge_index)

    graph = one(kind, train_mask=mask(0, 1), val_mask=mask(2))
    before = {name: value.clone() for name, value in graph}
    posterior = lk.LaplacePosterior(net(Rude), "categorical").fit([graph])
    posterior.tune([graph], n_data=[1.0], prior_precision=[1.0], method="mc", samples=2)
    posterior.predict(graph)
    assert set(graph.keys()) == set(before)
    for name, value in before.items():
        assert torch.equal(graph[name], value)


def test_parts_of_a_graph() -> None:
    graph = one(Library("double"), name="a graph")
    nest = {"first": [graph], "second": (1, randn(2))}
    assert list(batches.graphs_of(nest)) == [graph]
    assert len(list(batches.tensors_of(nest))) == 4


@pytest.mark.parametrize("level", ["graph", "node"])
def test_what_no_draw_changes_is_computed_once(level: str) -> None:
    """The last layer's posterior runs the rest of the network once, also where its rows are nodes, not graphs."""
    kind = Library("double")
    runs = [0]

    class Counted(Pooled if level == "graph" else Nodes):  # type: ignore[misc]
        def messages(self, h: Tensor, edge_index: Tensor) -> Tensor:
            runs[0] += 1
            return super().messages(h, edge_index)

    graphs, model = several(kind, level), net(Counted)
    batch = kind.batch.from_data_list(graphs)
    posterior = lk.LaplacePosterior(model, "categorical", parameters="last_layer").fit([batch])
    posterior.predict(batch, method="map")  # once: whether draws can be put into the network
    runs[0] = 0
    found = posterior.predict(batch, method="mc", space="weights", samples=30, generator=rng(1))
    assert runs[0] <= 2
    draws = posterior.sample(1, rng(1))
    assert found.probs.shape[0] == len(draws["second.weight"]) * len(SIZES)
    weights = posterior.predictor(30, rng(1))(batch)
    close(found.probs, weights.probs)


class Molecules(nn.Module):
    """Atoms and bonds are numbers of kinds; a bond is of the kind of its first atom."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.atoms, self.bonds, self.out, self.pooled = nn.Embedding(6, 4), nn.Embedding(3, 4), nn.Linear(4, C), pooled

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        number = (x[:, 0] * 10).long()
        h, bonds = self.atoms(number % 6), self.bonds(number[edge_index[0]] % 3)
        h = (h + torch.zeros_like(h).index_add(0, edge_index[1], torch.tanh(h[edge_index[0]] + bonds))).tanh()
        if self.pooled:
            h = h.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, h)
        return self.out(h)


@pytest.mark.parametrize("pooled", [True, False])
def test_embedded_kinds_of_nodes_and_edges(kind: Library, pooled: bool) -> None:
    graphs = several(kind, "graph" if pooled else "node")
    model = net(Molecules, pooled=pooled)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.inner(x, edge_index, torch.zeros(len(x), dtype=torch.long))

    wanted = ggn(Alone(), graphs)
    whole = kind.loader(graphs, 5)
    close(estimate(model, whole).total().dense(), wanted)
    close(estimate(model, whole, "diag").total().diag(), wanted.diagonal())
    kron, single = estimate(model, whole, "kron"), estimate(model, kind.loader(graphs, 1), "kron")
    assert kron.blocks["atoms"].one_hot and kron.blocks["bonds"].one_hot
    close(kron.total().dense(), single.total().dense())
    posterior = lk.LaplacePosterior(model, "categorical").fit(whole)
    scores = posterior.ood_score(kind.batch.from_data_list(graphs), "leverage", layers="all")
    close(scores, torch.cat([posterior.ood_score(g, "leverage", layers="all") for g in graphs]), 1e-10)
