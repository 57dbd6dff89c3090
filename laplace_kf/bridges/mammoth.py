"""Mammoth: the learners of :mod:`laplace_kf.continual` as a model of it, in a file of its ``models`` folder::

    # models/laplace_kf.py, in a checkout of https://github.com/aimagelab/mammoth
    from laplace_kf.bridges.mammoth import LaplaceModel
    from models.utils.continual_model import ContinualModel

    class LaplaceKF(LaplaceModel, ContinualModel):
        NAME, COMPATIBILITY = "laplace_kf", ["class-il", "domain-il", "task-il"]

and then ``python main.py --model laplace_kf --multiplier 10 --dataset seq-mnist --lr 0.03 ...``. Mammoth is a program
and no package, so nothing of it is imported here: the class has the methods that its ``ContinualModel`` asks for.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import torch
from torch import Tensor

from laplace_kf.continual import EWC, Learner, OnlineLaplace, SynapticIntelligence
from laplace_kf.errors import IncompatiblePair
from laplace_kf.registry import Registry

__all__ = ["METHODS", "LaplaceModel"]

METHODS: Registry[type[Learner]] = Registry("continual method")
METHODS.register("online")(OnlineLaplace)
METHODS.register("ewc")(EWC)
METHODS.register("intelligence")(SynapticIntelligence)


class LaplaceModel:
    """What a model of Mammoth adds to its ``ContinualModel``, to be named before it among the bases.

    Its arguments are ``--multiplier`` (λ_c, on the curvature of every task), ``--structure``, ``--prior_precision`` and
    ``--method``, a name of :data:`METHODS`. The likelihood is ``"categorical"``: Mammoth's tasks have classes.
    """

    net: Any
    opt: Any
    loss: Any
    args: Any
    device: Any
    learner: Learner | None = None
    _count = 1

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """The arguments, added to ``parser`` where Mammoth hands one over."""
        parser = ArgumentParser(description="Laplace approximations, task after task.") if parser is None else parser
        parser.add_argument("--multiplier", type=float, default=1.0, help="on the curvature of every task")
        parser.add_argument("--structure", type=str, default="kron", help="of the curvature")
        parser.add_argument("--prior_precision", type=float, default=1.0, help="of the first task's prior")
        parser.add_argument("--method", type=str, default="online", help=", ".join(METHODS))
        return parser

    def begin_task(self, dataset: Any) -> None:
        """Before a task.

        Raises:
            IncompatiblePair: for a loss that is not a mean over examples.
            UnknownName: for another ``--method``.
        """
        how = getattr(self.loss, "reduction", "mean")
        if how != "mean":
            raise IncompatiblePair(
                f"the loss has reduction={how!r}, and the penalty is scaled for a mean over examples: set it to 'mean'"
            )
        if self.learner is None:
            self.learner = METHODS[self.args.method](
                self.net, "categorical", self.args.structure, self.args.multiplier, self.args.prior_precision
            )
        self._count = len(dataset.train_loader.dataset)

    def observe(self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor | None = None, epoch: Any = None) -> float:
        """A step on a minibatch ``inputs (N, ...)``, ``labels (N,)``; returns the loss of the task alone."""
        assert self.learner is not None
        self.opt.zero_grad()
        loss = self.learner.record(self.loss(self.net(inputs), labels))
        (loss + self.learner.penalty() / self._count).backward()
        self.opt.step()
        self.learner.after_step()
        return float(loss.detach())

    def end_task(self, dataset: Any) -> None:
        """After a task: one pass over its data."""
        assert self.learner is not None
        with torch.enable_grad():
            self.learner.after_task(_Pairs(dataset.train_loader, self.device))


class _Pairs:
    """Batches ``(x, y)`` of a loader of Mammoth, whose own have the images before augmentation too."""

    def __init__(self, loader: Any, device: Any) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Any:
        for inputs, labels, *_ in self.loader:
            yield inputs.to(self.device), labels.to(self.device, dtype=torch.long)
