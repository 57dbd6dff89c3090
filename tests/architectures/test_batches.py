"""Every form of batch and output: what the model takes, what it gives, and what is refused with a way out."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import laplace_kf as lk
from laplace_kf import batches
from tests.cases import build, labels, normal, rng

N, D, C = 5, 3, 4
STRUCTURES = ["diag", "kron", "full"]


class Net(nn.Module):
    """A small classifier whose parameters are the same for every way of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def net(kind: type[nn.Module] = Net) -> nn.Module:
    return build(kind)


def data() -> tuple[Tensor, Tensor]:
    return normal(N, D), labels(C, N)


def dense(model: nn.Module, train: Any, structure: str = "full", **options: Any) -> Tensor:
    return lk.curvature.estimate(model, "categorical", train, structure, **options).mean().dense()


def reference(structure: str = "full") -> Tensor:
    return dense(net(), [data()], structure)


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


def works(model: nn.Module, batch: Any, inputs: Any, forward: Any = None) -> None:
    """Fits, tunes and predicts on a batch that says the same as ``data()``."""
    for structure in STRUCTURES:
        same(dense(model, [batch], structure, forward=forward), reference(structure))
    posterior = lk.LaplacePosterior(model, "categorical", forward=forward).fit([batch])
    plain = lk.LaplacePosterior(net(), "categorical").fit([data()])
    x, y = data()
    for method in ("map", "mc"):
        expected = plain.predict(x, method=method, samples=3, generator=rng(1)).probs
        same(posterior.predict(inputs, method=method, samples=3, generator=rng(1)).probs, expected)
    grid: dict[str, Any] = {"n_data": [5.0], "prior_precision": [1.0], "samples": 3}
    mine = posterior.tune([batch], generator=rng(1), **grid).best["objective"]
    assert abs(mine - plain.tune([(x, y)], generator=rng(1), **grid).best["objective"]) < 1e-12


# ------------------------------------------------------------------------------------------------ mappings


class Keyword(Net):
    def forward(self, features: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(features * scale)


class Anything(Net):
    def forward(self, **inputs: Any) -> Tensor:
        assert set(inputs) == {"features", "note"}
        return super().forward(inputs["features"])


def test_mapping_with_entries_that_the_model_does_not_take() -> None:
    x, y = data()
    batch = {"features": x, "labels": y, "idx": torch.arange(N), "text": ["a"] * N}
    works(net(Keyword), batch, batch)
    works(net(Keyword), batch, {"features": x})
    works(net(Keyword), OrderedDict(batch), OrderedDict(batch))


def test_model_that_takes_any_keyword_gets_every_entry() -> None:
    x, y = data()
    works(net(Anything), {"features": x, "note": "n", "labels": y}, {"features": x, "note": "n"})


def test_whole_mapping_is_cut_into_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    monkeypatch.setattr(batches, "BATCH_SIZE", 2)
    whole = {"features": x, "labels": y}
    assert len(list(batches.as_batches(whole))) == 3
    same(dense(net(Keyword), whole), reference())


def test_mapping_without_labels_is_refused() -> None:
    x, y = data()
    with pytest.raises(lk.errors.ShapeMismatch, match=r"labels.*inputs=lambda.*features.*targets=lambda.*\"target\""):
        dense(net(Keyword), [{"features": x, "target": y}])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"one batch, not data"):
        dense(net(Keyword), {"features": x})


def test_models_that_take_a_mapping_as_one_argument() -> None:
    class Whole(Net):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"])

    x, y = data()
    for batch in ({"x": x, "y": y}, {"x": x, "labels": y}):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"'batch' is a mapping: inputs=lambda batch: \(batch,\)\)"):
            dense(build(Whole), [batch])
    found = dense(build(Whole), [{"x": x, "y": y}], inputs=lambda batch: (batch,), targets=lambda batch: batch["y"])
    same(found, reference())


def test_mapping_whose_keys_the_model_does_not_know_is_refused() -> None:
    x, y = data()
    with pytest.raises(lk.errors.ShapeMismatch, match=r"Keyword.forward.*lack \['features'\].*inputs=lambda"):
        dense(net(Keyword), [{"inputs": x, "labels": y}])


def test_transformers_containers() -> None:
    transformers = pytest.importorskip("transformers")
    x, y = data()

    class Structured(Net):
        def forward(self, features: Tensor, attention_mask: Tensor | None = None) -> Any:
            output = transformers.modeling_outputs.SequenceClassifierOutput
            return output(logits=super().forward(features), hidden_states=(features,))

    batch = transformers.BatchEncoding({"features": x, "labels": y, "attention_mask": torch.ones(N, D)})
    works(net(Structured), batch, batch)
    # the container that forward= sees is the user's own kind, with its attributes
    works(net(Structured), batch, batch, lambda m, b: (m(b.features).logits, b.labels))
    output = transformers.modeling_outputs.ModelOutput(features=x, labels=y)
    works(net(Structured), output, output)


# ------------------------------------------------------------------------------------------------ tuples and classes


class Two(Net):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return super().forward(torch.cat([first, second], 1))


Pair = namedtuple("Pair", ["x", "y"])
Triple = namedtuple("Triple", ["x", "weight", "y"])


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Tensor
    y: Tensor | None
    names: list[str] = dataclasses.field(default_factory=list)
    length: int = dataclasses.field(init=False, default=-1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.x.shape[0])


def test_tuples_of_inputs() -> None:
    x, y = data()
    parts = (x[:, :1], x[:, 1:])
    works(net(Two), (parts, y), parts)
    works(net(Two), [list(parts), y], list(parts))
    works(net(Two), ({"first": parts[0], "second": parts[1]}, y), {"first": parts[0], "second": parts[1]})


def test_named_tuples() -> None:
    x, y = data()
    works(net(), Pair(x, y), x)
    batch = Triple(x, torch.ones(N), y)
    works(net(), batch, batch, lambda m, b: (m(b.x), b.y))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"Triple of 3.*inputs=lambda batch: batch.x, targets=.*batch.y$"):
        dense(net(), [batch])


def test_dataclasses_go_through_forward() -> None:
    x, y = data()
    batch = Sample(x, y, ["n"] * N)
    works(net(), batch, Sample(x, None), lambda m, b: (m(b.x), b.y))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"got Sample.*inputs=lambda batch: batch.x, targets"):
        dense(net(), [batch])


def pasted(batch: Any, model: nn.Module) -> Any:
    """What the line of a refusal makes of the batch."""
    with pytest.raises(lk.errors.ShapeMismatch, match="inputs=lambda batch") as caught:
        dense(model, [batch])
    line = str(caught.value).partition("inputs=")[2]
    inputs, targets = eval(f"dict(inputs={line})").values()
    return inputs(batch), targets(batch)


def test_lines_to_paste_give_the_model_all_that_it_takes() -> None:
    """A line that leaves out a mask, or takes it for the targets, would be wrong without a word."""
    x, y = data()
    first, second = x[:, :1], x[:, 1:]
    Named, Halves = (
        namedtuple("Named", ["first", "second", "idx", "targets"]),
        namedtuple("Halves", ["first", "second"]),
    )
    made = dataclasses.make_dataclass("Made", ["second", "targets", "first", "names"])
    idx = torch.arange(N)
    for batch in (
        Named(first, second, idx, y),
        made(second, y, first, ["n"] * N),
        {"first": first, "second": second, "idx": idx, "targets": y},
    ):
        inputs, targets = pasted(batch, net(Two))
        assert targets is y and set(inputs) == {"first", "second"}
        assert inputs["first"] is first and inputs["second"] is second
    inputs, targets = pasted((first, first, y), net(Two))  # tokens and their mask
    assert targets is y and inputs[0] is first and inputs[1] is first and len(inputs) == 2
    works(net(Two), ((first, second), y), Halves(first, second))


def test_the_line_that_picks_one_of_two_heads_can_be_pasted() -> None:
    class Heads(Net):
        def forward(self, first: Tensor, second: Tensor) -> Any:
            z = super().forward(torch.cat([first, second], 1))
            return {"one": z, "two": z[:, :2]}

    x, y = data()
    inputs = {"first": x[:, :1], "second": x[:, 1:]}
    for batch in ({**inputs, "labels": y, "idx": y}, (inputs, y), (tuple(inputs.values()), y)):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"pick it.*forward=lambda") as caught:
            dense(net(Heads), [batch])
        line = str(caught.value).partition("forward=")[2].partition(", and give")[0]
        same(dense(net(Heads), [batch], forward=eval(line)), reference())


def test_lists_and_texts_for_tensors_are_named() -> None:
    x, y = data()

    class Looks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(x.shape))

    for given in ([[1.0, 2.0]] * N, ["a text"] * N):
        with pytest.raises(lk.errors.ShapeMismatch, match=r'holds a list where.*return_tensors="pt"\)'):
            dense(net(Looks), [{"x": given, "labels": y}])
    posterior = lk.LaplacePosterior(net(Looks), "categorical").fit([{"x": x, "labels": y}])
    with pytest.raises(lk.errors.ShapeMismatch, match="a list of batches is no batch"):
        posterior.predict([{"x": x}])

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward([x].nothing)  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="nothing"):  # of the model's own
        dense(net(Broken), [[x, y]])


def test_an_example_in_the_place_of_a_batch() -> None:
    x, y = data()
    for label in (y[0], int(y[0])):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"'labels' of a mapping batch is one number.*DataLoader\("):
            dense(net(), [{"x": x[0], "labels": label}])


def test_nested_inputs() -> None:
    x, y = data()

    class Nested(Net):
        def forward(self, nodes: dict[str, Any], scales: list[Any]) -> Tensor:
            return super().forward(nodes["left"]["x"] * scales[0] + nodes["right"][0][1] * scales[1])

    def batch(y: Tensor | None) -> dict[str, Any]:
        nested = {"nodes": {"left": {"x": x / 2}, "right": [(None, x / 2)]}, "scales": [1.0, torch.ones(N, 1)]}
        return nested if y is None else {**nested, "labels": y}

    works(net(Nested), batch(y), batch(None))


def test_extra_fields_name_the_way_out() -> None:
    x, y = data()
    loader = DataLoader(TensorDataset(x, y, torch.arange(N)), batch_size=2)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"of 3 \(with weights=True.*inputs=lambda batch: batch\[0\]"):
        dense(net(), loader)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"of 4; .*inputs=lambda batch: batch\[0\], targets="):
        dense(net(), [(x, y, x, y)])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"a tensor \(5, 3\) \(several.*fit\(\[\(x, y, w\)\]\)"):
        dense(net(), (x, y, torch.arange(N)))
    with pytest.raises(lk.errors.ShapeMismatch, match=r"of 4 pairs \(of batches give one; examples become"):
        dense(net(), DataLoader(TensorDataset(x, y), batch_size=4, collate_fn=list))
    for source in (loader, iter(loader)):
        with pytest.raises(lk.errors.ShapeMismatch, match=r"which brings batches: for batch in loader"):
            lk.optim.kfac(net(), "categorical").step(source)
    same(dense(net(), loader, inputs=lambda batch: batch[0], targets=lambda batch: batch[1]), reference())


def test_every_container_is_mapped_into() -> None:
    """Copies, moves and single examples reach the tensors inside, and the user's own objects stay as they are."""
    x, y = data()
    structures: list[Any] = [
        (x, y), [x, y], Pair(x, y), {"a": {"b": [x, (y,)]}}, OrderedDict(a=x, b=y), Sample(x, y, ["n"]),
        (Sample(x, y), {"s": Sample(y, x)}),
    ]  # fmt: skip
    for structure in structures:
        copied = batches.private(structure)
        assert type(copied) is type(structure)
        mine, theirs = list(batches.tensors_of(copied)), list(batches.tensors_of(structure))
        assert len(mine) == len(theirs) > 1
        assert all(torch.equal(a, b) and a is not b for a, b in zip(mine, theirs, strict=True))
        first = batches.map_examples(structure, N, lambda t: t[:1])
        assert all(t.shape[0] == 1 for t in batches.tensors_of(first))
        assert all(t.shape[0] == N for t in batches.tensors_of(structure))
        meta = batches.to_device(structure, torch.device("meta"))
        assert all(t.is_meta for t in batches.tensors_of(meta))
    assert batches.private(Sample(x, y, ["n"])).length == N


def test_dataclass_batches_in_the_per_example_fallback() -> None:
    """A parameter without a rule needs single examples, taken out of whatever the batch is."""

    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    x, y = data()
    forward = lambda m, b: (m(b.x), b.y)  # noqa: E731
    same(dense(build(Odd), [Sample(x, y)], forward=forward), dense(build(Odd), [(x, y)]))


# ------------------------------------------------------------------------------------------------ data


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data()
        return iter(list(zip(x, y, strict=True)))


def test_iterable_data_sets() -> None:
    same(dense(net(), DataLoader(Stream(), batch_size=2)), reference())
    same(dense(net(), ((x[None], y[None]) for x, y in Stream())), reference())


class Dealt(Stream):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return iter([*super().__iter__()][worker.id :: worker.num_workers])


def test_a_stream_that_every_worker_reads_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="minibatches of 2 workers are the same.*get_worker_info") as found:
        assert lk.curvature.estimate(net(), "categorical", DataLoader(Stream(), 2, num_workers=2)).count == 2 * N
    assert __file__ in {warning.filename for warning in found}  # torch has its own if there are fewer processors
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*workers are the same")
        same(dense(net(), DataLoader(Dealt(), batch_size=2, num_workers=2)), reference())


def test_a_data_set_without_a_loader_is_refused() -> None:
    with pytest.raises(lk.errors.ShapeMismatch, match=r"TensorDataset; wrap it.*DataLoader"):
        dense(net(), TensorDataset(*data()))


# ------------------------------------------------------------------------------------------------ outputs


class Sequence(Net):
    """Every position on its own, so that an example of T positions is T examples of the plain net."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x)


def positions() -> tuple[Tensor, Tensor, Tensor]:
    x, y = normal(N, 3, D), labels(C, N, 3)
    y[0, 2] = y[1, 1:] = -100
    return x, y, y != -100


@pytest.mark.parametrize("parameters", ["all", "last_layer"])
def test_padded_positions_contribute_nothing(parameters: str) -> None:
    x, y, keep = positions()
    found = dense(net(Sequence), [(x, y)], parameters=parameters) * N
    same(found, dense(net(), [(x[keep], y[keep])], parameters=parameters) * int(keep.sum()))
    wild = x.clone()
    wild[~keep] = 1e3  # whatever the padding holds
    same(dense(net(Sequence), [(wild, y)], parameters=parameters) * N, found)


def test_pixel_outputs() -> None:
    class Pixels(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    x, y = normal(N, D, 2, 2), labels(C, N, 2, 2)
    y[0, 0, 1] = -100
    keep = y != -100
    found = dense(net(Pixels), [(x, y)]) * N
    same(found, dense(net(), [(x.permute(0, 2, 3, 1)[keep], y[keep])]) * int(keep.sum()))
    posterior = lk.LaplacePosterior(net(Pixels), "categorical").fit([(x, y)])
    assert posterior.predict(x, method="mc", samples=2).probs.shape == (N, C, 2, 2)


class Heads(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits[:, :2], {"other": logits[:, 2:]}


def test_several_outputs_through_forward() -> None:
    def joined(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        left, rest = model(batch[0])
        return torch.cat([left, rest["other"]], 1), batch[1]

    x, y = data()
    works(net(Heads), (x, y), (x, y), joined)
    with pytest.raises(lk.errors.ShapeMismatch, match=r"returned tuple of 2.*forward=lambda"):
        dense(net(Heads), [(x, y)])
    posterior = lk.LaplacePosterior(net(Heads), "categorical", forward=lambda m, b: joined(m, (b["x"], b["y"])))
    posterior.fit([{"x": x, "y": y}])
    with pytest.raises(lk.errors.ShapeMismatch, match=r"whole batch of the same form"):
        posterior.predict({"x": x})


def test_packed_sequences() -> None:
    """Rows of a packed sequence are interleaved: fitted where no single example is needed, refused where one is."""
    x, y, _ = positions()
    lengths = torch.tensor([3, 3, 2, 1, 1])

    class Packed(Net):
        def forward(self, x: Any) -> Tensor:
            padded, _ = pad_packed_sequence(x, batch_first=True)
            return super().forward(padded)

    packed = pack_padded_sequence(x, lengths, batch_first=True)
    mask = torch.arange(3) < lengths[:, None]
    targets = torch.where(mask, y, -100)

    def forward(m: nn.Module, b: Any) -> tuple[Tensor, Tensor]:
        return m(b["packed"]), b["y"]

    found = dense(net(Packed), [{"packed": packed, "y": targets}], forward=forward)
    same(found, dense(net(Sequence), [(torch.where(mask[..., None], x, 0.0), targets)]))
    with pytest.raises(lk.errors.UnsupportedLayer, match=r"PackedSequence.*padded"):
        batches.map_examples({"packed": packed}, 5, lambda t: t[:1])


# ------------------------------------------------------------------------------------------------ FromDistribution


def bernoulli(outputs: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Bernoulli(logits=outputs)


def categorical(outputs: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Categorical(logits=outputs)


@pytest.mark.parametrize("method", ["log_prob", "score", "hessian", "curvature", "position_root", "prediction"])
@pytest.mark.parametrize(
    ("make", "builtin"), [(categorical, lk.likelihoods.Categorical()), (bernoulli, lk.likelihoods.Bernoulli())]
)
def test_from_distribution_ignores_positions(method: str, make: Callable[[Tensor], Any], builtin: Any) -> None:
    rule = lk.likelihoods.FromDistribution(make, ignore_index=-100)
    z = normal(N, 3, C)
    y = labels(C, N, 3) if make is categorical else (normal(N, 3, C, seed=2) > 0).double()
    y[0, 2] = y[1] = -100
    if method == "prediction":
        draws = torch.stack([z, -z])
        same(rule.predict(draws).log_prob(y), builtin.predict(draws).log_prob(y))
        return
    mine, theirs = getattr(rule, method)(z, y), getattr(builtin, method)(z, y)
    if method == "position_root":
        mine, theirs = (torch.einsum("kntc,kntd->ntcd", root, root) for root in (mine, theirs))
    assert float((mine - theirs).abs().max()) < 1e-10
    assert rule.terms(y) == builtin.terms(y)


def test_from_distribution_leaves_out_whole_positions_only() -> None:
    rule = lk.likelihoods.FromDistribution(bernoulli, ignore_index=-100)
    y = torch.zeros(N, C, dtype=torch.float64)
    y[0, 0] = -100
    with pytest.raises(ValueError, match="as a whole"):
        rule.log_prob(normal(N, C), y)
    with pytest.raises(ValueError, match="outside the support"):
        lk.likelihoods.FromDistribution(bernoulli).log_prob(normal(N, C), torch.full_like(y, -100))
