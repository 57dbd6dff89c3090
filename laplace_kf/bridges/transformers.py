"""Hugging Face transformers: a posterior at the end of ``trainer.train``, in one line::

    laplace = lk.bridges.transformers.LaplaceCallback("categorical", parameters=["*lora*"])
    Trainer(model, args, train_dataset=train, eval_dataset=val, callbacks=[laplace]).train()
    laplace.posterior.predict(batch)

Models of peft need nothing else: the patterns of ``parameters=`` choose their adapters, and frozen weights are left out
in any case. Needs ``pip install transformers``.
"""

from __future__ import annotations

from typing import Any

from laplace_kf.bridges.after_training import AfterTraining
from laplace_kf.errors import MissingPackage

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingPackage(
        "The bridge to transformers needs the package 'transformers', which is not installed: pip install transformers",
        name=error.name,
    ) from error

__all__ = ["LaplaceCallback"]


class LaplaceCallback(AfterTraining, TrainerCallback):
    """Fits a posterior when ``trainer.train`` ends, and tunes it on the evaluation data.

    Trainers make their evaluation loader when they evaluate: with ``eval_strategy="no"`` there is none, and
    ``validation=`` brings the data. With ``load_best_model_at_end=True`` the best weights are loaded by then. Arguments
    as of :class:`~laplace_kf.bridges.after_training.AfterTraining`; batches are read as they are everywhere in this
    package (labels of causal and encoder-decoder models in their own convention).

    Attributes:
        posterior: the fitted :class:`~laplace_kf.LaplacePosterior`, after training.

    Raises:
        IncompatiblePair: at the end of training in several processes, without training data, or without validation
            data for ``tune=True``; and what :class:`~laplace_kf.LaplacePosterior` raises, before training begins.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Before training: wrong arguments are refused now."""
        self.check(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """After the last step: fits and tunes; the numbers join the trainer's ``log_history``."""
        found = self.finish(model, train_dataloader, eval_dataloader, args.world_size)
        state.log_history.append(
            {**{f"laplace/{name}": value for name, value in found.items()}, "step": state.global_step}
        )
