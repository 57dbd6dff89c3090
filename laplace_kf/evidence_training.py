"""Training by the evidence: prior precisions and the noise scale are learnt while a network trains.

Every few epochs a Laplace posterior is fitted at the weights of the moment, and its log evidence (methods 9.4) is
climbed in λ (one for all weights, or one for every block) and the noise scale; training goes on with them as weight
decay and noise (Immer et al. 2021, "Scalable marginal likelihood estimation for model selection in deep learning",
algorithm 1). Nothing is held out; the evidence also says when to stop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf.batches import as_batches, run, to_device
from laplace_kf.errors import IncompatiblePair, InvalidArgument, NotFitted
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood
from laplace_kf.models import lasting
from laplace_kf.posterior import LaplacePosterior
from laplace_kf.posterior.prior import by_parameter, plain, positive

__all__ = ["EvidenceTraining", "evidence_training"]

Optimizers = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


@explained
class EvidenceTraining:
    """Learns λ and the noise scale in one's own training loop: ``start``, ``loss`` or ``penalty``, ``after_epoch``.

    Args:
        model: the network; it is trained by the loop, not by this object.
        likelihood: of the targets; a Gaussian one gets the learnt noise scale in :attr:`posterior`.
        burn_in: epochs before the first update: a network that fits nothing yet looks like noise.
        every: epochs between updates.
        steps: steps up the evidence in one update; ``None`` for its maximum.
        per_block: one λ for each block of the curvature, else one for all weights.
        noise: whether to learn the noise scale; default: if the likelihood has one.
        patience: stop after so many updates without a better evidence, and go back to the best weights; ``None``:
            never.
        **settings: of :class:`LaplacePosterior` (structure, estimator, parameters, prior_precision, forward, ...).

    Attributes:
        posterior: the posterior of the last update.
        history: one dict per update: ``epoch``, ``log_evidence``, ``prior_precision`` and ``noise`` (where it has one).
        stopped: whether the evidence stopped to rise.

    Raises:
        ValueError: for counts that are not positive.
        IncompatiblePair: for ``noise=True`` with a likelihood that has no noise scale.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        burn_in: int = 10,
        every: int = 5,
        steps: int | None = None,
        per_block: bool = True,
        noise: bool | None = None,
        patience: int | None = None,
        **settings: Any,
    ) -> None:
        for name, value in (("every", every), ("steps", steps), ("patience", patience)):
            if value is not None:
                positive(name, value)
        if burn_in < 0:
            raise InvalidArgument(f"burn_in must not be negative, got {burn_in}")
        self.posterior = LaplacePosterior(model, likelihood, **settings)
        scale = self.posterior.likelihood.noise_scale
        if noise and scale is None:
            raise IncompatiblePair(f"{self.posterior.likelihood!r} has no noise scale to learn; leave noise out")
        self.noise = scale is not None if noise is None else noise
        self.burn_in, self.every, self.steps = burn_in, every, steps
        self.per_block, self.patience = per_block, patience
        self.history: list[dict[str, Any]] = []
        self.stopped = False
        self._epoch = 0
        self._best: tuple[float, dict[str, Any], LaplacePosterior] | None = None
        self._since = 0

    def start(self, data: Any) -> EvidenceTraining:
        """Counts the examples and finds the blocks: one fit; ``data`` as :meth:`LaplacePosterior.fit` takes them."""
        self.posterior.fit(data)
        return self

    def penalty(self) -> Tensor:
        """``½ Σ λ_p ‖p‖² / N``, 0-dim and differentiable: add it to the mean of ``-log p``.

        Raises:
            NotFitted: before :meth:`start`.
        """
        try:
            n = self.posterior.counted_data
        except NotFitted as error:
            raise NotFitted("the penalty needs the number of examples: call start(train_loader) first") from error
        named = dict(self.posterior.model.named_parameters())
        names = list(self.posterior.mean)
        given = by_parameter(self.posterior.prior_precision, self.posterior.curvature.layout)
        total = torch.stack(
            [(self.posterior.prior_precision if given is None else given[m]) * named[m].square().sum() for m in names]  # type: ignore[operator]
        ).sum()
        return total / (2 * n)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Mean ``-log p`` of a minibatch with outputs ``(N, C)`` at the present noise, plus the penalty; 0-dim."""
        return -self.posterior.likelihood.log_prob(outputs, targets).mean() + self.penalty()

    def after_epoch(self, data: Any, *, last: bool = False) -> bool:
        """After every epoch; updates λ and noise when it is time, and always after the ``last``.

        Returns:
            Whether to stop: the evidence has not risen for ``patience`` updates.
        """
        self._epoch += 1
        due = self._epoch >= self.burn_in and (self._epoch - self.burn_in) % self.every == 0
        if due or last:
            self._update(data)
        return self.stopped

    @lasting()
    def _update(self, data: Any) -> None:
        posterior = self.posterior.fit(data)
        model, n = posterior.evidence_model(), posterior.n_data
        by_name = by_parameter(posterior.prior_precision, posterior.curvature.layout)
        count = max(model.groups) + 1
        start = torch.ones(count if self.per_block else 1, dtype=torch.float64)
        if by_name is None:
            start = start * float(posterior.prior_precision)  # type: ignore[arg-type]
        else:
            for (block, _), group in zip(posterior.curvature.entries, model.groups, strict=True):
                start[group if self.per_block else 0] = float(by_name[block.parameters[0]])
        path = model.maximise(n, start.clamp_min(1e-12), posterior.likelihood, self.noise)
        prior, sigma, _ = path[-1 if self.steps is None else min(self.steps, len(path) - 1)]
        posterior.prior_precision = model.patterns(prior) if self.per_block else float(prior[0])
        if sigma is not None:
            posterior.likelihood = posterior.likelihood.with_noise_scale(sigma)
        value = float(posterior.log_evidence())
        row = {"epoch": self._epoch, "log_evidence": value, "prior_precision": plain(posterior.prior_precision)}
        self.history.append(row if sigma is None else {**row, "noise": sigma})
        if self.patience is None:
            return
        if self._best is None or value > self._best[0]:
            state = {name: t.detach().clone() for name, t in posterior.model.state_dict().items()}
            self._best, self._since = (value, state, copy.copy(posterior)), 0
        else:
            self._since += 1
            self.stopped = self._since >= self.patience

    def finish(self) -> LaplacePosterior:
        """The posterior; with ``patience`` at the weights of the best evidence, which the model gets back.

        Raises:
            NotFitted: before the first update.
        """
        if not self.history:
            raise NotFitted("nothing was learnt yet: call after_epoch(train_loader) after every epoch")
        if self._best is not None:
            _, state, posterior = self._best
            posterior.model.load_state_dict(state)
            self.posterior = posterior
        return self.posterior


@explained
@lasting()
@torch.enable_grad()
def evidence_training(
    model: nn.Module,
    likelihood: str | Likelihood,
    loader: Iterable[Any] | tuple[Any, Tensor],
    *,
    epochs: int,
    optimizer: Optimizers | None = None,
    after_epoch: Callable[[EvidenceTraining], Any] | None = None,
    **settings: Any,
) -> LaplacePosterior:
    """Trains a network with prior precisions and noise scale from the evidence; nothing is held out.

    Args:
        model: the network, trained in place; its mode is put back.
        likelihood: of the targets; the training loss is the mean of ``-log p`` plus the penalty of λ.
        loader: loader, iterable of batches that can be gone through again, or a pair ``(x (N, ...), y (N, ...))``.
        epochs: at most so many.
        optimizer: a torch optimiser over the model's parameters without weight decay, or a factory of one (parameters
            → optimiser); default Adam with ``lr=1e-3``.
        after_epoch: is called with the :class:`EvidenceTraining` after every epoch (a learning rate schedule).
        **settings: of :class:`EvidenceTraining` and of :class:`LaplacePosterior`.

    Returns:
        The fitted posterior, with the learnt λ (by block unless ``per_block=False``) and noise scale.

    Raises:
        ValueError: for ``epochs`` that are not positive.
        IncompatiblePair: for an optimiser with weight decay (the evidence learns it), or data that can be gone through
            only once.
    """
    if epochs < 1:
        raise InvalidArgument(f"epochs must be at least 1, got {epochs}")
    if iter(loader) is loader if not isinstance(loader, (tuple, list)) else False:
        raise IncompatiblePair(
            "evidence training goes over the data many times: pass a DataLoader or a list of batches"
        )
    made = torch.optim.Adam if optimizer is None else optimizer
    stepper = (
        made if isinstance(made, torch.optim.Optimizer) else made([p for p in model.parameters() if p.requires_grad])
    )
    if any(group.get("weight_decay", 0.0) for group in stepper.param_groups):
        raise IncompatiblePair(
            "the optimiser has a weight decay, which is what the evidence learns; set weight_decay=0"
        )
    training = EvidenceTraining(model, likelihood, **settings)
    mode = {module: module.training for module in model.modules()}
    training.start(loader)
    device = next(iter(training.posterior.mean.values())).device
    try:
        for epoch in range(1, epochs + 1):
            model.train()
            for batch in as_batches(loader, model):
                stepper.zero_grad()
                outputs, targets = run(model, to_device(batch, device), training.posterior.forward)
                training.loss(outputs, targets).backward()
                stepper.step()
            if after_epoch is not None:
                after_epoch(training)
            if training.after_epoch(loader, last=epoch == epochs):
                break
    finally:
        for module, was in mode.items():
            module.training = was
    stepper.zero_grad()
    return training.finish()
