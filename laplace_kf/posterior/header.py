"""What a posterior's file says beside what the fit found: the settings, as JSON-able values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.errors import IncompatiblePair, ShapeMismatch
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import parameters_of
from laplace_kf.posterior import store
from laplace_kf.posterior.answers import Answers
from laplace_kf.posterior.fitted import Fitted
from laplace_kf.posterior.prior import plain
from laplace_kf.subnetwork import Subnetwork
from laplace_kf.tape import select
from laplace_kf.weighting import Weights

__all__ = ["arguments", "packed", "unpacked"]


def packed(posterior: Answers, fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (any shapes, by name) and the whole header of a posterior: its settings and what its fit found."""
    try:
        likelihood: dict[str, Any] | None = posterior.likelihood.to_config()
    except IncompatiblePair:
        likelihood = None  # it cannot be written down; load(likelihood=) has to bring it
    chosen = posterior.parameters
    header = {
        "likelihood": likelihood,
        "structure": posterior.structure.name,
        "estimator": posterior.estimator.name,
        "options": {**posterior.structure.options(), **posterior.estimator.options()},
        "reason": posterior.structure.reason,
        "parameters": chosen.to_json() if isinstance(chosen, Subnetwork) else chosen,
        "damping": posterior.damping,
        "prior_precision": plain(posterior._prior),
        "n_data": posterior._n_data,
        "weights": posterior.weights is not False,
        "method": posterior._method,
        "temperature": posterior._temperature,
        "dtype": None if posterior.dtype is None else str(posterior.dtype).removeprefix("torch."),
        "unused": posterior.unused,
        "surroundings": posterior._around.to_json(),
        "ties": posterior._around.ties.names,
    }
    tensors, described = store.packed_fitted(fitted)
    if posterior._calibration is not None:
        kept, header["calibration"] = posterior._calibration.packed()
        tensors.update(kept)
    return tensors, {**header, **described}


def arguments(
    header: Mapping[str, Any], model: nn.Module, likelihood: str | Likelihood | None, weights: Weights | None
) -> dict[str, Any]:
    """Keyword arguments that make the header's posterior over ``model``, not fitted yet.

    Args:
        header: as packed.
        model: module whose parameters have the header's names and shapes.
        likelihood: in place of the header's.
        weights: in place of the header's, which says only whether there were any.

    Raises:
        ShapeMismatch: if the model's parameters do not have the header's names and shapes, or the selection covers
            others in this model.
        IncompatiblePair: if the likelihood is needed and missing.
    """
    layout = store.layout_of(header["statistics"])
    parameters_of(model, layout.names, layout.shapes, "the file")  # refuses
    chosen = header["parameters"]
    single = isinstance(chosen, Mapping)
    # to predict, nothing has to be trainable: models (and adapters) are often loaded frozen
    found = [] if chosen == "last_layer" or single else select(model, chosen, frozen=layout.names)
    if chosen != "last_layer" and not single and found != list(layout.names):
        raise ShapeMismatch(
            f"the file covers {len(layout.names)} parameters, but parameters={chosen!r} selects "
            f"{len(found)} of this model: it is not the architecture the file was saved for; load it "
            "into that one"
        )
    if likelihood is None and header["likelihood"] is None:
        raise IncompatiblePair("the file's likelihood could not be written down; pass it as load(likelihood=...)")
    return {
        "likelihood": likelihood if likelihood is not None else Likelihood.from_config(header["likelihood"]),
        "structure": header["structure"],
        "estimator": header["estimator"],
        "parameters": Subnetwork(**chosen) if single else chosen,
        "prior_precision": header["prior_precision"],
        "damping": header["damping"],
        "weights": weights if weights is not None else header.get("weights", False),
        "dtype": getattr(torch, header["dtype"]) if header.get("dtype") else None,
        "unused": header.get("unused", "error"),
        **header["options"],
    }


def unpacked(tensors: Mapping[str, Tensor], header: Mapping[str, Any], posterior: Answers) -> Fitted:
    """What the packed posterior's fit found (tensors of any shapes, by name), for one made by :func:`arguments`."""
    return store.unpacked_fitted(
        tensors, header, posterior.structure, model=posterior.model, forward=posterior.forward,
        weights=posterior.weights, likelihood=posterior.likelihood, damping=posterior.damping,
    )  # fmt: skip
