"""What is supported, printed from the registries."""

from __future__ import annotations

import inspect

from laplace_kf.estimators import ESTIMATORS
from laplace_kf.layers import rule_names
from laplace_kf.layers.base import AffineRule, MatrixRule
from laplace_kf.likelihoods import LIKELIHOODS
from laplace_kf.operators import DAMPINGS
from laplace_kf.structures import STRUCTURES

__all__ = ["support_table"]

ARCHITECTURES = (
    ("attention", "`nn.MultiheadAttention` (packed or separate projections, masks, cross-attention), transformer "
     "encoders and decoders, models of `transformers` (tested: BERT, DistilBERT, GPT-2, ViT, Llama): a Kronecker pair "
     "for every projection; rows of a packed weight that read other inputs are blocks of their own"),
    ("recurrent", "`nn.RNN`, `nn.GRU`, `nn.LSTM` cell by cell, weights shared over time; packed sequences: exact "
     "diagonal"),
    ("shared weights", "positions and repeated calls: `sharing=\"expand\"` or `\"reduce\"`; a weight tied to another "
     "module or to its own transpose (embedding and output matrix): one block, contributions added"),
    ("parametrised", "weight norm and other parametrisations: exact diagonal of the original parameters; LoRA modules "
     "and frozen base weights as any layer"),
    ("wrapped", "compiled, `DataParallel` and `DistributedDataParallel` models are unwrapped; scripted, lazy, sharded, "
     "quantised, complex and meta models are refused with the way out"),
    ("numbers", "float64, float32, bfloat16 and float16; sums in float32 at least; autocast"),
)  # fmt: skip
CONVENTIONS = (
    ("padding", "targets equal to `ignore_index`, and positions that reach no counted target, are in no factor, count, "
     "evidence, prediction or step"),
    ("labels", "batches of transformers' collators as they are (causal, encoder-decoder); soft, one-hot and smoothed "
     "targets; where a model's own loss differs from the likelihood's, the batch is refused with the line to paste"),
    ("layouts", "channels last, or torch's `(N, C, ...)` with any number of spatial axes; T = C asks for `layout=`"),
    ("embeddings", "`padding_idx` rows are constants; `scale_grad_by_freq`, `sparse`, `max_norm`, bags"),
    ("weights and noise", "weights of classes and examples, NaN as a missing regression target, noise per output or "
     "per example, any loss (`FromLoss`)"),
    ("graphs", "torch-geometric `Data`, `Batch`, sampled subgraphs: a graph is an example, or its nodes are positions"),
    ("sparse inputs", "as their dense form; nested tensors are refused: pad them"),
    ("parameters that take no part", "an error that names them, or `unused=\"prior\"`: their prior stays"),
    ("weights reached another way", "through a list, a closure, a cached copy: refused by parameter name, everywhere"),
    ("batches of another form", "`inputs=`, `targets=`, `forward=`; numpy arrays, `fit(x, y)`, `predict(loader)`; "
     "fewer rows than inputs are refused"),
    ("clipping and scaling", "Synaptic Intelligence takes the loss's own gradient (`record`), or the call is refused"),
    ("threads", "any number of them may predict from one posterior at a time; fits are for one"),
)  # fmt: skip
SELECTIONS = (
    ('"all"', "every parameter that requires a gradient"),
    ('"last_layer"', "the parametric module that runs last"),
    ('["head.*", ...]', "name patterns"),
    (
        "lk.Subnetwork(size, by=)",
        'single weights: the largest (`"magnitude"`) or the most uncertain (`"variance"`), dense',
    ),
)


def _first_line(entry: object) -> str:
    module = inspect.getmodule(entry)
    text = inspect.cleandoc((module.__doc__ if module else None) or "")
    return text.split("\n\n")[0].replace("\n", " ").split(": ", 1)[-1].rstrip(".")


def support_table() -> str:
    """A markdown table of layers, likelihoods, estimators, structures and dampings, as registered (a string)."""
    rows = []
    for name, rule in rule_names().items():
        block = "Kronecker pair, diagonal, full" if isinstance(rule, MatrixRule) else "diagonal or small dense block"
        assert isinstance(rule, (MatrixRule, AffineRule))
        rows.append(("layer", f"`{name}`", f"{', '.join(f'`{m}`' for m in rule.modules)}: {block}"))
    rows.append(("layer", "any other", "per-example gradients: diagonal or small dense block inside a Kronecker one"))
    rows += [("architecture", name, what) for name, what in ARCHITECTURES]
    rows += [("convention", name, what) for name, what in CONVENTIONS]
    rows += [("parameters", f"`{name}`", what) for name, what in SELECTIONS]
    rows += [("likelihood", f"`{name}`", _summary(entry)) for name, entry in LIKELIHOODS.items()]
    rows.append(("likelihood", "`FromDistribution(fn)`", "any `torch.distributions.Distribution` of the outputs"))
    rows += [("estimator", f"`{name}`", _first_line(entry)) for name, entry in ESTIMATORS.items()]
    rows += [("structure", f"`{name}`", _first_line(entry)) for name, entry in STRUCTURES.items()]
    rows += [("damping", f"`{name}`", _summary(entry)) for name, entry in DAMPINGS.items()]
    lines = ["| kind | name | what |", "|---|---|---|"]
    lines += [f"| {kind} | {name} | {what.replace('|', chr(92) + '|')} |" for kind, name, what in rows]
    return "\n".join(lines)


def _summary(entry: object) -> str:
    return inspect.cleandoc(entry.__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
