"""The list of experiments: what each one is about, and the module that runs it once it is written."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from laplace_kf.errors import LaplaceKFError
from laplace_kf.registry import Registry

__all__ = ["EXPERIMENTS", "Experiment", "NotYet"]


class NotYet(LaplaceKFError):
    """An experiment that is on the list but has not been written."""


@dataclass(frozen=True)
class Experiment:
    """An entry of the list.

    Args:
        id: ``E1`` to ``E35`` for claims of papers, or a word; also the name of the folder of results.
        title: one line.
        module: has ``Config`` (a dataclass of settings with defaults) and ``run(Config) -> Report``, or, in a room of
            several small experiments, ``PARTS``: id → the module that has them. Empty if the experiment has not been
            written.
        config: name of its default configuration file, without ``.yaml``.
        resumable: ``run(Config, folder)`` keeps finished parts in that folder, and uses those that are there.
    """

    id: str
    title: str
    module: str = ""
    config: str = ""
    resumable: bool = False

    def load(self) -> ModuleType:
        """The module with the experiment's ``Config`` and ``run``.

        Raises:
            NotYet: if there is none.
        """
        if not self.module:
            ready = ", ".join(entry.id for entry in EXPERIMENTS.values() if entry.module)
            raise NotYet(f"{self.id} ({self.title}) has not been written yet. Ready to run: {ready}.")
        module = importlib.import_module(self.module)
        parts: Mapping[str, str] = getattr(module, "PARTS", {})
        return importlib.import_module(parts[self.id]) if self.id in parts else module


EXPERIMENTS: Registry[Experiment] = Registry("experiment")
_CONTINUAL = "experiments.continual.run"
_AUTOENCODERS = "experiments.autoencoders.run"  # one table of runs, E14's; the others are some rows of it
for _entry in (
    Experiment("E1", "Hessian-free optimisation of deep autoencoders", _AUTOENCODERS, "autoencoders_hessian_free"),
    Experiment("E2", "Hessian-free error against time on CURVES", _AUTOENCODERS, "autoencoders_hessian_free"),
    Experiment("E3", "objective against quadratic model along conjugate gradients",
               "experiments.steps.run", "cg_run"),
    Experiment("E4", "Hessian-free optimisation of recurrent nets on long dependencies", "experiments.recurrent.run",
               "recurrent", resumable=True),
    Experiment("E5", "two-dimensional damping toy: diagonal damping over-restricts",
               "experiments.theory.run", "damping_toy"),
    Experiment("E6", "one-dimensional toy on which the empirical Fisher does not converge",
               "experiments.theory.run", "empirical_fisher_toy"),
    Experiment("E7", "exact Fisher against its Kronecker approximation", "experiments.fisher.run",
               "fisher_exact"),
    Experiment("E8", "structure of the inverse Kronecker Fisher", "experiments.fisher.run",
               "fisher_inverse"),
    Experiment("E9", "block-diagonal and block-tridiagonal Fisher and their inverses",
               "experiments.fisher.run", "fisher_approximations"),
    Experiment("E10", "rescaling and momentum of K-FAC against damping",
               "experiments.steps.run", "kfac_damping"),
    Experiment("E11", "K-FAC progress against batch size",
               "experiments.steps.run", "kfac_batches"),
    Experiment("E12", "K-FAC against Nesterov's accelerated gradient on autoencoders", _AUTOENCODERS,
               "autoencoders_kfac"),
    Experiment("E13", "loss surface of a ReLU net",
               "experiments.theory.run", "loss_slices"),
    Experiment("E14", "KFRA and KFAC against tuned Adam on autoencoders", _AUTOENCODERS, "autoencoders",
               resumable=True),
    Experiment("E15", "KFRA, KFAC and Adam: CPU timings", _AUTOENCODERS, "autoencoders"),
    Experiment("E16", "per-layer alignment of updates with the block Gauss-Newton update",
               "experiments.steps.run", "alignment_layers"),
    Experiment("E17", "alignment of whole updates with the full Gauss-Newton update",
               "experiments.steps.run", "alignment_whole"),
    Experiment("E18", "mixture classifier: Gauss-Newton against Fisher",
               "experiments.steps.run", "mixture_classifier"),
    Experiment(
        "E19",
        "toy regression: Laplace posteriors against Hamiltonian Monte Carlo",
        "experiments.toy_regression.run",
        "toy_regression",
    ),
    Experiment("E20", "predictive entropy on letters after training on digits", "experiments.ood.run", "ood_mnist",
               resumable=True),
    Experiment("E21", "untargeted adversarial attack: entropy and accuracy", "experiments.ood.untargeted",
               "attack_untargeted"),
    Experiment("E22", "targeted iterated adversarial attack", "experiments.ood.targeted",
               "attack_targeted"),
    Experiment("E23", "CIFAR-100 wide residual net: uncertainty on errors", "experiments.photographs.run",
               "wide_residual"),
    Experiment("E24", "effect of the multiplier on a two-dimensional MAP estimate",
               "experiments.theory.run", "multiplier_toy"),
    Experiment("E25", "permuted MNIST tasks one after another", _CONTINUAL, "continual_permuted", resumable=True),
    Experiment("E26", "multiplier sweep on permuted MNIST", "experiments.multiplier.run",
               "continual_multiplier", resumable=True),
    Experiment("E27", "disjoint MNIST: digits 0-4, then 5-9", _CONTINUAL, "continual_disjoint", resumable=True),
    Experiment("E28", "five vision data sets in sequence", _CONTINUAL, "continual_vision", resumable=True),
    Experiment("E29", "asymptotic error of stochastic second-order methods",
               "experiments.theory.run", "asymptotics"),
    Experiment("E30", "invariance of undamped K-FAC",
               "experiments.theory.run", "coordinates"),
    Experiment("E31", "error and cost of curvature factors: exact, sampled, projected, recursive",
               "experiments.theory.run", "factors"),
    Experiment("E32", "rank bounds of the Gauss-Newton matrix",
               "experiments.theory.run", "rank_bounds"),
    Experiment("E33", "order in which conjugate gradients find curvature clusters",
               "experiments.theory.run", "clusters"),
    Experiment("E34", "factored against exact damping in the posterior",
               "experiments.toy_regression.damping", "posterior_damping"),
    Experiment("E35", "kept against summed task factors", _CONTINUAL, "continual_terms", resumable=True),
    Experiment("rotated_mnist", "turned digits, one angle after another", _CONTINUAL, "rotated_mnist",
               resumable=True),
    Experiment("streaming_regression", "a regression table in slices, against the batch posterior",
               _CONTINUAL, "streaming_regression", resumable=True),
    Experiment("calibration", "defaults against MAP and laplace-torch on real data", "experiments.calibration.run",
               "calibration", resumable=True),
    Experiment("ood_pairs", "scores of strange inputs on pairs of image sets", "experiments.ood_pairs.run",
               "ood_pairs", resumable=True),
    Experiment("uci", "regression tables beside published figures", "experiments.uci.run", "uci", resumable=True),
    Experiment("attribution", "predicted and measured effects of training examples", "experiments.attribution.run",
               "attribution", resumable=True),
    Experiment("attribution_text", "the same in a language model", "experiments.attribution.text",
               "attribution_text", resumable=True),
    Experiment("characters", "a character model to one validation loss, by AdamW, K-FAC and EK-FAC",
               "experiments.characters.run", "characters", resumable=True),
    Experiment("labels", "labels that a network asks for, on MNIST", "experiments.labels.run", "labels",
               resumable=True),
    Experiment("shakespeare", "a tutorial: what a transformer does not know", "experiments.shakespeare.run",
               "shakespeare"),
    Experiment("demo", "known and unknown handwritten digits, in half a minute", "laplace_kf.demo", "demo"),
):  # fmt: skip
    EXPERIMENTS.register(_entry.id)(_entry)
