"""One call from a fitted posterior to a page: how good its predictions are, and what the posterior looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_kf.batches import as_batches, inputs_of, run, to_device
from laplace_kf.errors import ShapeMismatch
from laplace_kf.graphs import of_role
from laplace_kf.likelihoods import Prediction
from laplace_kf.models import preserved
from laplace_kf.posterior import LaplacePosterior, TuningResult
from laplace_kf.posterior.summary import Summary
from laplace_kf.reports import metrics, plots
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["report"]

MAP, POSTERIOR = "MAP", "posterior"
METHOD_OF = {MAP: "map", POSTERIOR: "mc"}
SHOWN_POINTS = 300
"""Test points drawn into pictures of the prediction."""
TUNING_ROWS = 12
"""Best grid points that the tuning table shows; the whole grid is in ``result.json``."""


@dataclass(frozen=True)
class _Scored:
    """Predictions for a whole loader by one method: fields of predictions, targets and log densities, concatenated."""

    values: Mapping[str, Tensor]
    targets: Tensor
    log_prob: Tensor
    entropy: Tensor
    inputs: Tensor | None


def report(
    posterior: LaplacePosterior,
    test_loader: Iterable[Any] | tuple[Any, Tensor],
    ood_loader: Iterable[Any] | tuple[Any, Tensor] | None = None,
    out: str | Path | None = None,
    *,
    tuning: TuningResult | None = None,
    samples: int = 100,
    seed: int = 0,
    title: str = "Laplace posterior",
) -> Report:
    """Compares the posterior's predictions with those of its mean weights, and puts everything on one page.

    Classifiers get accuracy, likelihood, calibration and selective prediction, with out-of-distribution detection by
    entropy if there is a loader for it; regressions get likelihood, error and interval coverage. The page also holds
    the blocks of the posterior, the tuning table and all settings and versions.

    Args:
        posterior: fitted; left as it is.
        test_loader: loader, iterable of batches, or a pair of tensors ``(x (N, ...), y (N, ...))``.
        ood_loader: the same for inputs of another kind; their targets are not looked at.
        out: folder for ``report.html``, ``result.json`` and PNG files; None writes nothing.
        tuning: what ``posterior.tune`` returned, to be shown.
        samples: Monte Carlo samples of every prediction; the same random numbers for every batch.
        seed: of these samples.
        title: of the page.

    Returns:
        The :class:`~laplace_kf.reports.html.Report`, whose ``metrics`` are the numbers by method.

    Raises:
        NotFitted: before ``fit``.
        ShapeMismatch: for an empty loader, or predictions that are neither of classes nor of numbers.
    """
    summary = posterior.summary()
    other = None
    with preserved(posterior.model):  # loaders draw random numbers
        test = {name: _score(posterior, test_loader, method, samples, seed) for name, method in METHOD_OF.items()}
        if ood_loader is not None:
            other = {name: _entropy(posterior, ood_loader, method, samples, seed) for name, method in METHOD_OF.items()}
    first = test[POSTERIOR]
    if "probs" in first.values:
        found, pictures = _classes(test, other)
    elif "variance" in first.values:
        found, pictures = _numbers(test)
    else:
        raise ShapeMismatch(
            f"no report for predictions of {', '.join(sorted(first.values))}; only for classes and means"
        )
    pictures += _drawn(posterior, first, samples, seed)
    effective = sum(row.effective for row in summary)
    pictures.append(
        Picture("effective", plots.effective_parameters(summary),
                f"Effective parameters, tr(N C̄ (N C̄ + λ)⁻¹), by block: {effective:.1f} in all.")
    )  # fmt: skip
    tables = [_metric_table(found), _block_table(summary)]
    if tuning is not None:
        tables.append(_tuning_table(tuning))
        if len({row["n_data"] for row in tuning.table}) > 1 and len({r["prior_precision"] for r in tuning.table}) > 1:
            caption = f"Search over (N, λ) by {tuning.objective}."
            pictures.append(Picture("tuning", plots.tuning_map(tuning), caption))
    result = Report(
        title=title,
        summary=(
            f"{summary.title}. Tested on {len(first.log_prob)} examples with {samples} Monte Carlo samples; MAP is the "
            "prediction of the mean weights."
        ),
        seed=seed,
        config=_settings(posterior, samples),
        metrics=found,
        tables=tables,
        pictures=pictures,
        details={"tuning": None if tuning is None else {"best": tuning.best, "at_edge": tuning.at_edge,
                                                        "objective": tuning.objective, "table": tuning.table},
                 "blocks": [{"name": row.name, "size": row.size, "effective": row.effective} for row in summary]},
        device=str(next(iter(posterior.mean.values())).device),
    )  # fmt: skip
    if out is not None:
        result.save(Path(out))
    return result


def _score(posterior: LaplacePosterior, loader: Any, method: str, samples: int, seed: int) -> _Scored:
    device = next(iter(posterior.mean.values())).device
    parts: dict[str, list[Tensor]] = {}
    targets, log_prob, entropy, inputs = [], [], [], []
    for batch in as_batches(loader, posterior.model):
        batch = of_role(to_device(batch, device), "test_mask")
        with preserved(posterior.model), torch.no_grad():
            wanted = run(posterior.model, batch, posterior.forward)[1]
        plain = posterior.forward is None and isinstance(batch, tuple | list)
        # one seed for all batches: where weights are drawn they see the same ones
        generator = torch.Generator().manual_seed(seed)
        prediction: Prediction = posterior.predict(
            batch[0] if plain else batch, method=method, samples=samples, generator=generator
        )
        if plain and isinstance(batch[0], Tensor) and batch[0].dim() == 2 and batch[0].shape[1] <= 2:
            inputs.append(batch[0].cpu())  # few enough to draw
        for name, value in prediction.values.items():
            parts.setdefault(name, []).append(value.detach().cpu())
        raw = (
            batch["labels"]
            if posterior.forward is None and isinstance(batch, Mapping) and "labels" in batch
            else wanted
        )
        log_prob.append(prediction.log_prob(raw).detach().cpu())  # in the batch's own convention
        if "probs" in prediction.values:  # what is ignored has no label, whichever number stands for it
            wanted = wanted.where(prediction.kept(wanted), -1)
        targets.append(wanted.cpu())
        entropy.append(prediction.entropy.detach().cpu())
    if not targets:
        raise ShapeMismatch(
            "the loader yielded no batch, so there is nothing to report; a generator that was read before is empty: "
            "give a list or a DataLoader"
        )
    values = {name: torch.cat(value) for name, value in parts.items()}
    seen = torch.cat(inputs) if inputs else None
    return _Scored(values, torch.cat(targets), torch.cat(log_prob), torch.cat(entropy), seen)


def _entropy(posterior: LaplacePosterior, loader: Any, method: str, samples: int, seed: int) -> Tensor:
    """Entropy ``(N,)`` of predictions at inputs whose targets, if there are any, may be of other classes."""
    found = []
    for batch in as_batches(loader, posterior.model):
        generator = torch.Generator().manual_seed(seed)
        inputs = inputs_of(batch, posterior.forward)
        found.append(posterior.predict(inputs, method=method, samples=samples, generator=generator).entropy)
    if not found:
        raise ShapeMismatch(
            "the out-of-distribution loader yielded no batch, so there is nothing to report; a generator that was "
            "read before is empty: give a list or a DataLoader"
        )
    return torch.cat(found).detach().cpu()


def _labelled(scored: _Scored) -> tuple[Tensor, Tensor]:
    """Class probabilities ``(M, C)`` and labels ``(M,)`` of every prediction that has a target."""
    probs, targets = scored.values["probs"], scored.targets
    if probs.dim() > 3:  # images, volumes: the channel is second
        probs = probs.movedim(1, -1)
        targets = targets.movedim(1, -1) if targets.dim() == probs.dim() else targets
    if targets.shape == probs.shape:  # independent binary outputs
        flat = probs.reshape(-1)
        probs, targets = torch.stack([1 - flat, flat], 1), targets.reshape(-1)
    else:
        probs, targets = probs.reshape(-1, probs.shape[-1]), targets.reshape(-1)
        if probs.shape[1] == 1:
            probs = torch.cat([1 - probs, probs], 1)
    keep = targets >= 0
    return probs[keep], targets[keep].long()


def _classes(
    test: Mapping[str, _Scored], other: Mapping[str, Tensor] | None
) -> tuple[dict[str, dict[str, float]], list[Picture]]:
    pairs = {name: _labelled(scored) for name, scored in test.items()}
    found: dict[str, dict[str, float]] = {}
    doubts = {}
    for name, (probs, labels) in pairs.items():
        doubts[name] = (metrics.entropy(probs), (probs.argmax(1) != labels).double())
        found[name] = {**metrics.classification(probs, labels), **metrics.selective_prediction(*doubts[name])}
        if other is not None:
            found[name] |= {
                "entropy_in": float(test[name].entropy.mean()),
                "entropy_out": float(other[name].mean()),
                **metrics.out_of_distribution(test[name].entropy, other[name]),
            }
    pictures = [
        Picture("reliability", plots.reliability_diagram(pairs), f"Reliability. {plots.RELIABILITY_KEY}"),
        Picture("risk_coverage", plots.risk_coverage(doubts),
                "Error rate of the inputs that are kept when those of largest predictive entropy are declined. AURC is "
                "the area under the curve."),
    ]  # fmt: skip
    inside = {name: scored.entropy for name, scored in test.items()}
    classes = next(iter(pairs.values()))[0].shape[1]
    single = {len(scored.entropy) == len(pairs[name][1]) for name, scored in test.items()} == {True}
    known = classes if single else None  # entropies of several positions or outputs add up
    figure, axes = plots.panels(1, 1 if other is None else 2, width=5.4, height=4.2)
    plots.inverse_entropy_cdf(inside, axis=axes[0], title="test inputs", classes=known)
    if other is not None:
        plots.inverse_entropy_cdf(other, axis=axes[1], title="out-of-distribution inputs", classes=known)
    plots.legend_below(figure)
    pictures.append(Picture("entropy", figure, "Share of inputs whose predictive entropy is above a threshold."))
    return found, pictures


def _numbers(test: Mapping[str, _Scored]) -> tuple[dict[str, dict[str, float]], list[Picture]]:
    found, triples = {}, {}
    for name, scored in test.items():
        mean, variance = scored.values["mean"], scored.values["variance"]
        found[name] = {
            **metrics.regression(mean, variance, scored.targets, scored.log_prob),
            "epistemic_sd": float(scored.values["epistemic_variance"].sqrt().mean()),
        }
        triples[name] = (mean, variance, scored.targets)
    caption = "How often targets fall into central predictive intervals, against how often they should."
    return found, [Picture("intervals", plots.interval_calibration(triples), caption)]


def _drawn(posterior: LaplacePosterior, scored: _Scored, samples: int, seed: int) -> list[Picture]:
    """The prediction itself, where inputs are one or two numbers."""
    x, mean, y = scored.inputs, scored.values.get("mean"), scored.targets
    if x is None:
        return []
    device, few = next(iter(posterior.mean.values())), slice(0, SHOWN_POINTS)

    def predict(inputs: Tensor) -> Prediction:
        generator = torch.Generator().manual_seed(seed)
        return posterior.predict(inputs.to(device.device, x.dtype), method="mc", samples=samples, generator=generator)

    margin = 0.25 * (x.amax(0) - x.amin(0))
    low, high = x.amin(0) - margin, x.amax(0) + margin
    note = f"{min(len(x), SHOWN_POINTS)} of the test inputs are shown."
    if x.shape[1] == 2 and mean is None and y.dim() == 1:
        bounds = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
        figure = plots.decision_map(predict, (bounds[0], bounds[1]), points=(x[few], y[few]), title=POSTERIOR)
        caption = f"The most probable class, paler where it is less probable, and the predictive entropy. {note}"
        return [Picture("map", figure, caption)]
    if x.shape[1] == 1 and mean is not None and mean.shape[1:] == (1,):
        grid = torch.linspace(float(low[0]), float(high[0]), 200)
        q = predict(grid[:, None])
        curves = [v.detach().cpu()[:, 0] for v in (q.mean, q.epistemic_variance.sqrt(), q.variance.sqrt())]
        points = (x[few, 0], y[few, 0])
        figure = plots.regression_band(grid, *curves, points=points, points_label="test data", title=POSTERIOR)
        return [Picture("band", figure, f"Predictive mean and bands. {note}")]
    return []


_PERCENT = "{:.2f} %"
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", lambda v: _PERCENT.format(100 * v)),
    "nll": ("NLL", "{:.4f}".format),
    "brier": ("Brier", "{:.4f}".format),
    "ece": ("ECE", lambda v: _PERCENT.format(100 * v)),
    "aurc": ("AURC ‰", lambda v: f"{1000 * v:.2f}"),
    "e_aurc": ("E-AURC ‰", lambda v: f"{1000 * v:.2f}"),
    "entropy_in": ("entropy test", "{:.3f}".format),
    "entropy_out": ("entropy OOD", "{:.3f}".format),
    "auroc": ("AUROC", "{:.4f}".format),
    "aupr": ("AUPR", "{:.4f}".format),
    "fpr95": ("FPR95", lambda v: _PERCENT.format(100 * v)),
    "rmse": ("RMSE", "{:.4g}".format),
    "inside_95": ("inside 95 % interval", lambda v: _PERCENT.format(100 * v)),
    "sharpness": ("mean sd", "{:.4g}".format),
    "epistemic_sd": ("mean epistemic sd", "{:.4g}".format),
}


def _metric_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    keys = [key for key in _SHOWN if key in next(iter(found.values()))]
    rows = [[name, *(_SHOWN[key][1](row[key]) for key in keys)] for name, row in found.items()]
    note = "NLL and entropies in nats, means over examples; smaller is better but for accuracy, AUROC and AUPR."
    return Table("Predictions", ["method", *(_SHOWN[key][0] for key in keys)], rows, note)


def _block_table(summary: Summary) -> Table:
    rows = [
        [row.name or "(root)", " × ".join(map(str, row.shape)), row.structure,
         ", ".join(f"{value:.2g}" for value in row.condition), f"{row.effective:.1f}", str(row.size)]
        for row in summary
    ]  # fmt: skip
    total = sum(row.effective for row in summary), sum(row.size for row in summary)
    rows.append(["all", "", "", "", f"{total[0]:.1f}", str(total[1])])
    columns = ["block", "groups × outputs × inputs", "structure", "condition numbers", "effective", "parameters"]
    note = "Condition numbers are those of A and G for Kronecker blocks; inputs include the 1 of a bias."
    return Table("Posterior", columns, rows, note)


def _tuning_table(tuning: TuningResult) -> Table:
    ordered = sorted(tuning.table, key=lambda row: row["objective"] if math.isfinite(row["objective"]) else math.inf)
    rows = [
        [str(k), f"{row['n_data']:.4g}", _prior(row["prior_precision"]), f"{row['objective']:.5g}"]
        for k, row in enumerate(ordered[:TUNING_ROWS], 1)
    ]
    edge = " The best value lies on the edge of the grid." if tuning.at_edge else ""
    note = f"The best {len(rows)} of {len(ordered)} points.{edge}"
    return Table("Tuning", ["rank", "N", "λ", tuning.objective], rows, note)


def _prior(value: float | Mapping[str, float]) -> str:
    return f"{len(value)} values" if isinstance(value, Mapping) else f"{value:.4g}"


def _settings(posterior: LaplacePosterior, samples: int) -> dict[str, Any]:
    prior = posterior.prior_precision
    parameters = posterior.parameters
    return {
        "model": type(posterior.model).__name__,
        "likelihood": repr(posterior.likelihood),
        "structure": posterior.structure.name,
        "estimator": posterior.estimator.name,
        "damping": posterior.damping,
        "options": {**posterior.structure.options(), **posterior.estimator.options()},
        "parameters": list(parameters) if isinstance(parameters, Sequence) and not isinstance(parameters, str)
        else parameters,
        "n_data": posterior.n_data,
        "prior_precision": float(prior.detach()) if isinstance(prior, Tensor) else prior,
        "samples": samples,
    }  # fmt: skip
