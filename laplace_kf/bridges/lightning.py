"""Lightning: a posterior at the end of ``trainer.fit``, in one line::

    laplace = lk.bridges.lightning.LaplaceCallback("categorical", structure="kron")
    Trainer(callbacks=[laplace]).fit(module, train_loader, val_loader)
    laplace.posterior.predict(x)

Works with ``lightning`` and ``pytorch_lightning``. Penalties of earlier tasks have a callback of their own,
:class:`laplace_kf.continual.Callback`. Needs one of the two packages: ``pip install lightning``.
"""

from __future__ import annotations

from typing import Any

from laplace_kf.bridges.after_training import AfterTraining
from laplace_kf.trainers import TrainerCallback

__all__ = ["LaplaceCallback"]


class LaplaceCallback(AfterTraining, TrainerCallback):
    """Fits a posterior when ``trainer.fit`` ends, tunes it on the validation loader, and logs what was chosen.

    The posterior wraps the ``LightningModule`` itself: ``forward`` gives the outputs (logits), and batches are
    ``(x, y)`` or mappings with ``"labels"``, else ``inputs=`` and ``targets=`` say how to read them. It is fitted at
    the weights that training ended with; for those of a checkpoint, fit by hand after loading it. Arguments as of
    :class:`~laplace_kf.bridges.after_training.AfterTraining`. Numbers are logged as ``laplace/n_data``,
    ``laplace/prior_precision`` and ``laplace/objective``.

    Attributes:
        posterior: the fitted :class:`~laplace_kf.LaplacePosterior`, after training.

    Raises:
        IncompatiblePair: at the end of training in several processes, without training data, or without validation
            data for ``tune=True``; and what :class:`~laplace_kf.LaplacePosterior` raises, before training begins.
    """

    def on_fit_start(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        """Before training: wrong arguments are refused now."""
        self.check(module)

    def on_train_end(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        """After the last epoch: fits and tunes."""
        train = trainer.train_dataloader
        validation = trainer.val_dataloaders
        if isinstance(validation, (list, tuple)):
            validation = validation[0] if validation else None
        found = self.finish(module, train, validation, trainer.world_size)
        for logger in trainer.loggers:
            logger.log_metrics({f"laplace/{name}": value for name, value in found.items()}, step=trainer.global_step)
