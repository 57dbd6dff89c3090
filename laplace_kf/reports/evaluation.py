"""How well a posterior knows what it does not know: out-of-distribution detection and selective prediction, as a page.

The numbers are OpenOOD's (Yang et al. 2022): AUROC, AUPR-in and AUPR-out (average precision with the in-distribution or
the out-of-distribution inputs as the positive class), and FPR95, the share of in-distribution inputs that are flagged
at the strictest threshold that flags 95 % of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_kf.batches import as_batches, inputs_of, run, to_device
from laplace_kf.errors import IncompatiblePair, NotFitted, ShapeMismatch
from laplace_kf.files import require_room
from laplace_kf.graphs import of_role
from laplace_kf.models import preserved
from laplace_kf.ood import KINDS
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.reports import metrics, plots
from laplace_kf.reports.html import Picture, Report, Table

__all__ = ["evaluate"]

SPLITS = (1.0, 0.95, 0.9, 0.8, 0.5)
"""Coverages of the table of selective prediction: shares of the least strange inputs that are kept."""
PERCENT = ("auroc", "aupr_in", "aupr_out", "fpr95")


@dataclass(frozen=True)
class _Inside:
    """Scores by kind ``(N,)``, and entropies and wrong predictions ``(N,)`` of a classifier with labels."""

    scores: Mapping[str, Tensor]
    entropy: Tensor
    wrong: Tensor | None


def evaluate(
    posterior: LaplacePosterior,
    inside: Iterable[Any] | tuple[Any, Tensor] | Tensor,
    outside: Mapping[str, Iterable[Any] | tuple[Any, Tensor] | Tensor],
    out: str | Path | None = None,
    *,
    kinds: Sequence[str] | None = None,
    layers: str | None = None,
    samples: int = 100,
    seed: int = 0,
    title: str = "Out-of-distribution evaluation",
) -> Report:
    """Scores in-distribution and out-of-distribution inputs by every kind of score, and puts the numbers on one page.

    Args:
        posterior: fitted; tuned or calibrated on other data for the kind ``"auto"``.
        inside: in-distribution test data: loader, iterable of batches, a pair ``(x (N, ...), y (N, ...))``, or inputs
            alone. With class labels the page also tells right from wrong predictions and what declining is worth.
        outside: the same by name, for inputs of other kinds; targets are not looked at.
        out: folder for ``report.html``, ``result.json`` and PNG files; None writes nothing.
        kinds: kinds of scores; default: all that this posterior has.
        layers: of leverages, ``"last"`` or ``"all"``; ``None`` for what each kind takes by default.
        samples: weight draws, for kinds that take them; the same random numbers for every batch.
        seed: of these draws.
        title: of the page.

    Returns:
        The report; ``metrics["ood"][name][kind]`` has ``auroc``, ``aupr_in``, ``aupr_out`` and ``fpr95``,
        ``metrics["selective"][kind]`` ``accuracy``, ``auroc_wrong``, ``aurc`` and ``accuracy`` by coverage.

    Raises:
        NotFitted: before ``fit``; for ``kinds`` with ``"auto"`` before ``tune`` or ``calibrate``.
        UnknownName: for another kind.
        IncompatiblePair: for a kind among ``kinds`` that the posterior does not have.
        ShapeMismatch: for empty data.
        UnusableFile: if ``out`` cannot be written into.
    """
    if out is not None:
        require_room(out)
    for kind in kinds or ():
        _ = KINDS[kind]
    with preserved(posterior.model):  # loaders draw random numbers
        batches = list(_batches(inside))
        if not batches:
            raise ShapeMismatch(
                "the in-distribution data are empty: no batch was yielded; a generator that was read before is "
                "empty: give a list or a DataLoader"
            )
        chosen, left_out = _usable(posterior, batches[0], kinds, layers, samples)
        near = _inside(posterior, batches, chosen, layers, samples, seed, labelled=not isinstance(inside, Tensor))
        far = {name: _scores(posterior, data, chosen, layers, samples, seed) for name, data in outside.items()}
    found = {name: {kind: _numbers(near.scores[kind], scores[kind]) for kind in chosen} for name, scores in far.items()}
    selective = {} if near.wrong is None else _selective(near, chosen)
    tables = [_ood_table(name, rows) for name, rows in found.items()]
    pictures: list[Picture] = []
    entropies = {"in-distribution": near.entropy, **{name: scores["entropy"] for name, scores in far.items()}}
    if near.wrong is not None:
        tables.append(_selective_table(selective))
        for label, which in (("in-distribution, right", near.wrong == 0), ("in-distribution, wrong", near.wrong == 1)):
            if bool(which.any()):
                entropies[label] = near.entropy[which]
        pictures.append(
            Picture(
                "risk_coverage",
                plots.risk_coverage({kind: (near.scores[kind], near.wrong) for kind in chosen}),
                "Error rate of the in-distribution inputs that are kept when the strangest are declined, by score.",
            )
        )
    if all(bool((values >= 0).all()) for values in entropies.values()):
        caption = "Share of inputs whose predictive entropy is above a threshold; right and wrong predictions apart."
        pictures.insert(0, Picture("entropy", plots.inverse_entropy_cdf(entropies), caption))
    numbers = ", ".join(f"{name} ({len(scores[chosen[0]])})" for name, scores in far.items())
    result = Report(
        title=title,
        summary=f"{posterior!r}. In-distribution: {len(near.entropy)} examples; others: {numbers or 'none'}."
        + (f" Left out: {'; '.join(f'{kind} ({why})' for kind, why in left_out.items())}." if left_out else ""),
        seed=seed,
        config={"kinds": list(chosen), "layers": layers, "samples": samples, "left_out": left_out},
        metrics={"ood": found, "selective": selective},
        tables=tables,
        pictures=pictures,
        device=str(next(iter(posterior.mean.values())).device),
    )
    if out is not None:
        result.save(Path(out))
    return result


def _batches(data: Any) -> Iterable[Any]:
    """Batches of data, or of inputs alone."""
    return as_batches((data, torch.zeros(len(data)))) if isinstance(data, Tensor) else as_batches(data)


def _usable(
    posterior: LaplacePosterior, batch: Any, kinds: Sequence[str] | None, layers: str | None, samples: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The kinds to measure, and why others are left out."""
    if kinds is not None:
        return tuple(dict.fromkeys(("entropy", *kinds))), {}
    found: list[str] = []
    left_out: dict[str, str] = {}
    inputs = inputs_of(batch, posterior.forward)
    for kind in KINDS:
        try:
            posterior.ood_score(inputs, kind, layers=layers, samples=min(2, samples))
            found.append(kind)
        except (IncompatiblePair, NotFitted, AttributeError) as error:
            if not isinstance(error, NotFitted) or posterior.references is not None:
                left_out[kind] = str(error).split(";")[0]
            else:
                left_out[kind] = "neither tuned nor calibrated"
    return tuple(found), left_out


def _scores(
    posterior: LaplacePosterior, data: Any, kinds: Sequence[str], layers: str | None, samples: int, seed: int
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for batch in _batches(data):
        inputs = inputs_of(batch, posterior.forward)
        for kind in kinds:
            generator = torch.Generator().manual_seed(seed)
            score = posterior.ood_score(inputs, kind, layers=layers, samples=samples, generator=generator)
            parts[kind].append(score.double().cpu())
    if not any(parts.values()):
        raise ShapeMismatch(
            "out-of-distribution data are empty: no batch was yielded; a generator that was read before is empty: "
            "give a list or a DataLoader"
        )
    return {kind: torch.cat(found) for kind, found in parts.items()}


def _inside(
    posterior: LaplacePosterior,
    batches: Sequence[Any],
    kinds: Sequence[str],
    layers: str | None,
    samples: int,
    seed: int,
    labelled: bool,
) -> _Inside:
    scores = _scores(posterior, batches, kinds, layers, samples, seed)
    if not labelled:
        return _Inside(scores, scores["entropy"], None)
    device = next(iter(posterior.mean.values())).device
    wrong: list[Tensor] = []
    for batch in batches:
        batch = of_role(to_device(batch, device), "test_mask")
        with torch.no_grad():
            outputs, targets = run(posterior.model, batch, posterior.forward)
        labels = isinstance(targets, Tensor) and targets.dtype == torch.long and targets.shape == outputs.shape[:1]
        if not labels or outputs.dim() != 2 or outputs.shape[1] < 2:
            return _Inside(scores, scores["entropy"], None)
        generator = torch.Generator().manual_seed(seed)
        found = posterior.predict(inputs_of(batch, posterior.forward), samples=samples, generator=generator)
        kept = found.kept(targets)
        wrong.append(torch.where(kept, (found.probs.argmax(1) != targets).double(), torch.nan).cpu())
    joined = torch.cat(wrong)
    which = ~torch.isnan(joined)
    return _Inside({k: v[which] for k, v in scores.items()}, scores["entropy"][which], joined[which])


def _numbers(inside: Tensor, outside: Tensor) -> dict[str, float]:
    flagged = metrics.out_of_distribution(inside, outside)
    kept = metrics.out_of_distribution(-outside, -inside)
    return {
        "auroc": flagged["auroc"],
        "aupr_in": kept["aupr"],
        "aupr_out": flagged["aupr"],
        "fpr95": flagged["fpr95"],
    }


def _selective(near: _Inside, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """What declining the strangest inputs is worth, by kind."""
    assert near.wrong is not None
    wrong, found = near.wrong, {}
    for kind in kinds:
        score = near.scores[kind]
        risk = metrics.risk_coverage(score, wrong)[1]
        numbers = {f"accuracy_{share:g}": 1 - float(risk[max(1, round(share * len(wrong))) - 1]) for share in SPLITS}
        if 0 < float(wrong.sum()) < len(wrong):
            numbers["auroc_wrong"] = metrics.out_of_distribution(score[wrong == 0], score[wrong == 1])["auroc"]
        found[kind] = {"accuracy": 1 - float(wrong.mean()), **numbers, **metrics.selective_prediction(score, wrong)}
    return found


def _ood_table(name: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    return Table(
        title=f"In-distribution against {name} (%)",
        columns=["score", "AUROC", "AUPR-in", "AUPR-out", "FPR95"],
        rows=[[kind, *(f"{100 * numbers[key]:.2f}" for key in PERCENT)] for kind, numbers in rows.items()],
        note="AUROC and AUPR: higher is better; FPR95: lower.",
    )


def _selective_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    return Table(
        title="Selective prediction: accuracy (%) of the inputs that are kept, by coverage",
        columns=["score", *(f"{100 * share:g} %" for share in SPLITS), "AUROC wrong", "AURC"],
        rows=[
            [
                kind,
                *(f"{100 * numbers[f'accuracy_{share:g}']:.2f}" for share in SPLITS),
                f"{100 * numbers['auroc_wrong']:.2f}" if "auroc_wrong" in numbers else "–",
                f"{numbers['aurc']:.4f}",
            ]
            for kind, numbers in rows.items()
        ],
        note="AUROC wrong: how well the score tells wrong predictions from right ones. AURC: mean error by coverage.",
    )
