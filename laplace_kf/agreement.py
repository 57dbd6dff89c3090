"""Whether the loss that a model computes of itself is the one that its posterior is made for.

Models of transformers, and many others, return a loss where the batch has labels. If the likelihood's negative
log-density of the same batch is another function of the outputs (labels shifted inside the model, label smoothing,
class weights, another kind of loss), curvature would be taken of something that was never trained. So at the first
minibatch the two are compared: their gradients with respect to the model's outputs must be one up to a factor (a mean
over tokens or over examples, a sum, ``num_items_in_batch``), and where the likelihood leaves out no constant, so must
the losses themselves (a router's loss, a penalty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import conventions, weighting
from laplace_kf.batches import Forward, private, run, with_labels
from laplace_kf.callers import warn_user
from laplace_kf.errors import LaplaceKFError, ShapeMismatch
from laplace_kf.graphs import check_ignored, read_by_rows
from laplace_kf.likelihoods.base import Likelihood
from laplace_kf.models import as_called
from laplace_kf.outputs.arranged import decided
from laplace_kf.outputs.weighted import bare
from laplace_kf.returned import as_tensor, own_loss

__all__ = ["as_read", "require_same_loss", "warn_of_links"]

EXACT = frozenset(["Categorical", "Bernoulli"])  # likelihoods whose log-density has no constant that a loss may drop
FINE, COARSE = 2e-4, 5e-2  # relative differences allowed: float32 and wider, half precision
FLAT = 1e-3  # gradients (in probabilities, by target) below which only the losses are compared


def require_same_loss(model: nn.Module, batch: Any, forward: Forward | None, likelihood: Likelihood) -> None:
    """Compares the model's own loss of one minibatch with the likelihood's, if the model returns one.

    One more forward pass, and only where there may be a loss: batches with labels that the model takes, or ``forward``.

    Args:
        model: in the mode in which it is to be compared (eval).
        batch: of tensors, on the model's device.
        forward: the user's ``(model, batch) -> (outputs, targets)``, or ``None``.
        likelihood: of the targets.

    Raises:
        ShapeMismatch: if the two differ; says how, where that can be found out, and the line to paste. Also for pairs
            of a causal language model whose targets are its inputs.
    """
    batch, forward = weighting.without(batch, forward)  # the model's own loss knows no weights of examples
    if forward is None and conventions.unshifted(model, batch):
        raise ShapeMismatch(
            f"{type(model).__name__} is a causal language model, and the targets of the pair (input_ids, y) are the "
            "input_ids themselves: in a pair y[:, t] belongs to the output at position t. Give a mapping, whose labels "
            'are shifted, {"input_ids": input_ids, "labels": y}, or shift them, '
            "torch.nn.functional.pad(y[:, 1:], (0, 1), value=-100); if it is meant so, say it: "
            "inputs=lambda batch: batch[0], targets=lambda batch: batch[1]"
        )
    with torch.enable_grad():
        found = _own(model, batch, forward)
        if found is None:
            return
        own, logits, outputs, targets = found
        wide = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        likelihood.check(wide.detach(), targets)
        losses = -likelihood.log_prob(wide, targets)
        if not bool(torch.isfinite(own)) or not bool(torch.isfinite(losses).all()):
            return  # whoever goes on with the batch says so
        count = max(1.0, likelihood.terms(targets))
        difference = _difference(own, losses, logits, count, type(likelihood).__name__ in EXACT)
    if difference is not None:
        beside = batch.get("labels") if isinstance(batch, Mapping) and forward is None else None
        reasons = _reasons(model, own.detach(), wide.detach(), targets, likelihood, difference, beside)
        mask = None if beside is None else batch.get("attention_mask")
        if isinstance(mask, Tensor) and isinstance(targets, Tensor) and mask.shape == targets.shape:
            counted = targets.masked_fill(mask == 0, conventions.IGNORED)
            if _is_loss_of(own.detach(), wide.detach(), counted, likelihood):
                reasons = (
                    "it leaves out the positions that attention_mask does: paste the line with targets=lambda batch: "
                    'batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)'
                )
        if beside is not None and batch.get("shift_labels") is not None:
            reasons = 'it compares with "shift_labels": paste the line with targets=lambda batch: batch["shift_labels"]'
        theirs, ours = float(own.detach()), float(losses.detach().sum()) / count
        raise ShapeMismatch(
            f"the model's own loss of the first minibatch is {theirs:.6g}, and the likelihood {likelihood!r} gives "
            f"{ours:.6g} by target, which is not the same function of the outputs: {reasons}. "
            f"To have the likelihood see other targets, say which (the model's own loss is then left out): "
            f"{_paste(batch)}"
        )


def as_read(
    likelihood: Likelihood, model: nn.Module, batch: Any, forward: Forward | None, outputs: Tensor, targets: Any
) -> Likelihood:
    """The likelihood in the layout that the targets of outputs ``(N, ...)`` show, or the model's conventions.

    Raises:
        IncompatiblePair: if it would take ignored targets of a graph for real ones.
        ShapeMismatch: if the targets fit two layouts.
    """
    batch, forward = weighting.without(batch, forward)
    check_ignored(batch, bare(targets), likelihood, forward)
    known = read_by_rows(batch, forward) or (forward is None and conventions.channels_are_last(model, batch))
    found: Likelihood = decided(likelihood, outputs, targets, known)
    return found


_MOVES = frozenset(
    f"{name}Backward0"
    for name in ("Alias", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T", "ToCopy", "Transpose",
                 "UnsafeView", "Unsqueeze", "View")
) | {"SqueezeBackward1", "SqueezeBackward2", "TransposeBackward1"}  # fmt: skip
# what keeps probabilities such: bounds, a small number added, the complement, means over members of an ensemble
_NUDGES = frozenset(["AddBackward0", "AddBackward1", "SubBackward0", "RsubBackward1", "MulBackward0", "DivBackward0",
                     "SumBackward1", "MeanBackward1", "ClampBackward0", "ClampBackward1", "ClampMinBackward0",
                     "ClampMaxBackward0", "MinimumBackward0", "MaximumBackward0"])  # fmt: skip
_JOINED = frozenset(["CatBackward0", "StackBackward0"])
WHOLE = 1e-3  # how far from 1 sums of probabilities may be, to which small numbers were added


def warn_of_links(likelihood: Likelihood, model: nn.Module, outputs: Tensor) -> None:
    """Warns of outputs ``(N, ...)`` that are parameters of the density already, such as probabilities for logits."""
    found = _linked(likelihood, outputs)
    if found is None:
        return
    function, undone, wanted = found
    *_, (path, last) = model.named_modules()
    where = f" (module {path!r})" if type(last).__name__.lower() == function else ""
    through = f"went through {function}{where}" if function else "are not negative and add up to 1, as probabilities do"
    undoing = undone.format("model(batch[0])") if "{}" in undone else f"model(batch[0]).{undone}()"
    warn_user(
        f"the model's outputs {through}, but {likelihood!r} takes {wanted}: curvature and "
        f"predictions are those of {wanted} with these values. Leave {function or 'that'} out of the model, or undo "
        f"it: forward=lambda model, batch: ({undoing}, batch[1])"
    )


def _linked(likelihood: Likelihood, outputs: Tensor) -> tuple[str, str, str] | None:
    """The function, what undoes it and what outputs should be; the function is empty where only the numbers tell."""
    links = likelihood.inverse_links
    if not links or not outputs.numel():
        return None
    node, nudged = outputs.grad_fn, False
    while node is not None and node.name() not in links:
        before = [child for child, _ in node.next_functions if child is not None]
        nudged |= node.name() in _NUDGES
        if not before or not (node.name() in _MOVES or node.name() in _NUDGES or node.name() in _JOINED):
            node = None
        else:
            node = before[-1 if likelihood.linked_last and node.name() in _JOINED else 0]
    low, high = likelihood.linked_range
    if node is not None:
        axis = 1 if outputs.dim() > 3 else outputs.dim() - 1
        values = outputs.detach().select(axis, -1) if likelihood.linked_last else outputs.detach()
        if not nudged or (float(values.min()) >= low and float(values.max()) <= high):
            return links[node.name()]
    if likelihood.linked_sum and any(map(partial(_adds_up, outputs.detach()), {1, outputs.dim() - 1})):
        _, undone, wanted = next(iter(links.values()))
        return "", undone, wanted
    return None


def _adds_up(outputs: Tensor, axis: int) -> bool:
    """Whether outputs ``(N, ...)`` are probabilities along an axis."""
    if outputs.dim() < 2 or outputs.shape[axis] < 2 or float(outputs.min()) < 0:
        return False
    return float((outputs.sum(axis, dtype=torch.float64) - 1).abs().max()) < WHOLE


def _own(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Tensor, Tensor, Any] | None:
    """The model's loss, the outputs that it returned with it, and the outputs and targets that the package takes."""
    if forward is None:
        if not isinstance(batch, Mapping):
            return None
        with suppress(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, LaplaceKFError):
            with as_called():
                returned = with_labels(model, private(batch))
            own = None if returned is None else own_loss(returned)
            if own is not None:
                logits = as_tensor(returned)
                return own, logits, logits, conventions.targets(model, batch[conventions.target_key(model, batch)])
        return None
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        outputs, targets = run(model, batch, forward)
    finally:
        handle.remove()
    for returned in seen:
        own = own_loss(returned)
        if own is not None:
            with suppress(LaplaceKFError):
                return own, as_tensor(returned), outputs, targets
    return None


def _difference(own: Tensor, losses: Tensor, logits: Tensor, count: float, exact: bool) -> str | None:
    """``"outputs"`` or ``"constant"``: in what the losses differ (own 0-dim, ours ``(N,)``); ``None`` if in nothing."""
    total = losses.sum()
    mean, whole = float(own.detach()), float(total.detach())
    allowed = FINE if logits.dtype in (torch.float32, torch.float64) else COARSE
    grads = [
        torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        for loss in (own, total)
    ]
    if logits.requires_grad and grads[0] is not None and grads[1] is not None:
        mine, ours = grads[0].double(), grads[1].double()
        if float(ours.norm()) > FLAT * math.sqrt(count):
            factor = float((mine * ours).sum() / ours.square().sum())
            gap = float((mine - factor * ours).norm())
            if factor <= 0 or gap > allowed * float(mine.norm()) + abs(factor) * 1e-6 * math.sqrt(count):
                return "outputs"
            rest = abs(mean - factor * whole)
            return "constant" if exact and rest > allowed / 10 * abs(mean) + 1e-7 else None
    values = [whole / divisor for divisor in (count, len(losses), 1.0)]
    if not exact:
        return None
    return None if any(abs(mean - v) <= 10 * allowed * abs(v) + 1e-5 for v in values) else "outputs"


def _reasons(
    model: nn.Module, own: Tensor, outputs: Tensor, targets: Any, likelihood: Likelihood, difference: str, labels: Any
) -> str:
    """What may be the reason, as far as it can be found out; ``labels`` are those of a mapping batch."""
    if labels is not None and conventions.is_causal(model) and _is_loss_of(own, outputs, labels, likelihood):
        return (
            f"{type(model).__name__} is a causal language model by its name, but compares position t with label t, "
            'without a shift; paste the line with targets=lambda batch: batch["labels"]'
        )
    if difference == "constant":
        return (
            "it has a further term that does not depend on them (the router loss of a mixture of experts, which "
            "output_router_logits=False in the batch or in model.config leaves out; a penalty), or label smoothing, "
            "Categorical(label_smoothing=)"
        )
    found = []
    if isinstance(targets, Tensor) and targets.dim() == 2 and targets.shape[1] > 1 and not targets.is_floating_point():
        for where, moved in (
            ("one position later: it shifts the labels itself", _shifted(targets, 1)),
            ("one position earlier: they are shifted already, and inside the model once more", _shifted(targets, -1)),
        ):
            if _is_loss_of(own, outputs, moved, likelihood):
                found.append(f"the model compares with the label {where}")
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    name = {"regression": "gaussian", "multi_label_classification": "bernoulli",
            "single_label_classification": "categorical"}.get(str(kind))  # fmt: skip
    if name is not None and name != type(likelihood).__name__.lower():
        found.append(f'its config has problem_type="{kind}", which is the likelihood "{name}"')
    for path, module in model.named_modules():
        smoothing, weight = getattr(module, "label_smoothing", 0.0), getattr(module, "weight", None)
        if isinstance(module, nn.modules.loss._WeightedLoss) and (smoothing or weight is not None):
            settings = [f"label_smoothing={smoothing}"] * bool(smoothing) + ["class weights"] * (weight is not None)
            what = " and ".join(settings)
            found.append(f"module {path!r} has {what}: Categorical(label_smoothing=, class_weights=) is that loss")
    return "; ".join(found) or "label smoothing, class weights, another kind of loss, or labels in another order"


def _is_loss_of(own: Tensor, outputs: Tensor, targets: Any, likelihood: Likelihood) -> bool:
    """Whether a model's loss is the likelihood's for other targets of the same outputs ``(N, ...)``."""
    with suppress(ValueError, RuntimeError):
        loss = float(-likelihood.log_prob(outputs, targets).sum())
        values = [loss / max(1.0, likelihood.terms(targets)), loss / len(outputs), loss]
        return any(abs(float(own) - v) <= 1e-3 * abs(v) + 1e-5 for v in values)
    return False


def _shifted(targets: Tensor, by: int) -> Tensor:
    rest = torch.full_like(targets[:, :1], conventions.IGNORED)
    return torch.cat([targets[:, 1:], rest] if by > 0 else [rest, targets[:, :-1]], 1)


def _paste(batch: Any) -> str:
    if not isinstance(batch, Mapping):
        return "inputs=lambda batch: batch[0], targets=lambda batch: batch[1]"
    given = [str(key) for key in batch if key not in ("labels", "label", "shift_labels")]
    key = "label" if "labels" not in batch and "label" in batch else "labels"
    keys = "".join(f'"{name}", ' for name in given).strip()
    shifted = f'torch.nn.functional.pad(batch["{key}"][:, 1:], (0, 1), value=-100)'
    return (
        f'inputs=lambda batch: {{key: batch[key] for key in ({keys})}}, targets=lambda batch: batch["{key}"] '
        f"(or, where the model shifts them, {shifted})"
    )
