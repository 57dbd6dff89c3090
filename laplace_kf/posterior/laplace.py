"""``LaplacePosterior``: three lines from a trained network to uncertainty. A thin façade over the engine.

The posterior is ``N(θ*, Λ⁻¹)`` with ``Λ = N C̄ + λ I``, where ``C̄`` is the mean Gauss-Newton curvature of the
negative log-likelihood at the trained weights ``θ*`` (methods 9.1).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_kf import files, weighting
from laplace_kf.batches import Forward
from laplace_kf.curvature import make_pair
from laplace_kf.distributed import Ranks, decomposed, refuse_checkpoint, require_one_job, require_one_network
from laplace_kf.engine import collect
from laplace_kf.errors import IncompatiblePair, InvalidArgument, InvalidType
from laplace_kf.estimators import Estimator
from laplace_kf.keywords import explained
from laplace_kf.likelihoods import Likelihood, get_likelihood
from laplace_kf.linalg import typed
from laplace_kf.models import lasting, usable
from laplace_kf.operators import DAMPINGS, fresh_generator
from laplace_kf.posterior import header as header_of
from laplace_kf.posterior import store
from laplace_kf.posterior.answers import Answers
from laplace_kf.posterior.calibration import Calibration, Seen, calibrate
from laplace_kf.posterior.fitted import Fitted, flat_weights
from laplace_kf.posterior.kept_scores import KeptScores
from laplace_kf.posterior.objectives import Objective
from laplace_kf.posterior.prior import (
    PriorPrecision,
    by_parameter,
    positive,
)
from laplace_kf.posterior.shared_validation import SharedValidation
from laplace_kf.posterior.surroundings import Surroundings
from laplace_kf.posterior.task_chain import TaskChain
from laplace_kf.posterior.tuning import Options, Settings, TuningResult, searched, tune
from laplace_kf.posterior.validation import Validation
from laplace_kf.reading import Part, one_argument, paired, reading
from laplace_kf.registry import AUTO
from laplace_kf.replica import stage
from laplace_kf.resuming import Journal, journal
from laplace_kf.shards import Shard
from laplace_kf.structures import Structure
from laplace_kf.structures.base import Statistics
from laplace_kf.subnetwork import Selection, Subnetwork, covered
from laplace_kf.tape import UNUSED, EntryLayout, patterns, select
from laplace_kf.weighting import Weights

__all__ = ["LaplacePosterior"]


@explained
class LaplacePosterior(Answers):
    """A Gaussian posterior over the weights of a trained network.

    Args:
        model: trained module; never changed.
        likelihood: registered name or likelihood object.
        structure: ``"kron"``, ``"diag"``, ``"ekfac"``, ``"lowrank"`` (``rank=``), ``"layer"``, ``"full"``,
            ``"isotropic"``, ``"auto"`` (``memory=``; :attr:`structure` is the chosen one after ``fit``), or a structure
            object. ``"ekfac"`` and ``"lowrank"`` go over the data twice.
        estimator: ``"exact"``, ``"auto"`` (as many columns as an error needs, ``tolerance=0.01``), ``"importance"``
            (``columns=``), ``"sampled"`` or ``"projection"`` (``samples=``), ``"recursive"``, ``"empirical"`` (not the
            Gauss-Newton matrix), or an estimator object.
        parameters: ``"all"`` trainable parameters, ``"last_layer"``, a list of ``fnmatch`` patterns over names, or a
            :class:`Subnetwork` of single weights, whose posterior is dense (structure ``"full"``).
        prior_precision: λ ≥ 0: a number, a 0-dim tensor, or ``{name pattern: number}`` (the first match counts).
        damping: how Kronecker blocks take λ: ``"exact"`` (eigenbasis), ``"factored"`` or ``"balanced"``
            (methods 5.2, 5.3, 9.2).
        inputs, targets: for batches that are neither ``(x, y)`` nor a mapping with ``"labels"``: two functions of a
            batch, with ``outputs = model(*inputs(batch))`` (``inputs=lambda batch: batch[0], targets=lambda batch:
            batch[1]`` for batches of three); ``predict`` takes what the model takes, or a whole batch.
        forward: instead of them, ``(model, batch) -> (outputs, targets)``, for outputs that have to be picked or put
            together; ``predict`` calls it with what it was given, a whole batch, and uses the outputs.
        dtype: floating type of the curvature; default: the model's, float32 at least.
        weights: batches of ``fit`` and ``tune`` are ``(x, y, w)``, or mappings with ``"weights"`` (``forward=`` then
            returns ``(outputs, targets, weights)``; beside ``inputs=`` and ``targets=`` it is a function of a batch,
            too): ``w (N,)`` ≥ 0 multiplies each example's ``-log p`` and curvature. N counts the examples, of weight 0
            excepted; ``tune`` minimises the weighted mean of its objective (methods 17.11).
        layout: where the channel of the outputs stands (``likelihood.with_layout``): ``"channels_first"`` or
            ``"channels_last"``; default: as the targets show at ``fit``.
        unused: what becomes of selected parameters that take no part in any forward pass of ``fit`` (an expert that no
            example reached): ``"error"`` refuses and names them, ``"prior"`` keeps their prior: their curvature is 0.
        prior: a fitted posterior over the same parameters instead of the isotropic Gaussian at 0: ``fit`` then gives
            what :meth:`update` of it would. λ is the prior's and stays settable; ``prior_precision`` must be left out.
        multiplier, terms, forgetting, max_terms: with ``prior``, as in :meth:`update`.
        **options: options of the estimator and of the structure (``samples``, ``columns``, ``noise``,
            ``vector_blocks``).

    Raises:
        UnknownName: for a name that is not registered.
        UnsupportedLayer: if no selected parameter requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        structure: str | Structure = "kron",
        estimator: str | Estimator = "exact",
        parameters: Selection = "all",
        prior_precision: PriorPrecision = 1.0,
        damping: str = "exact",
        forward: Forward | None = None,
        *,
        inputs: Part | None = None,
        targets: Part | None = None,
        dtype: torch.dtype | None = None,
        weights: Weights = False,
        layout: str | None = None,
        unused: str = "error",
        prior: LaplacePosterior | None = None,
        multiplier: float = 1.0,
        terms: str = "keep",
        forgetting: float = 1.0,
        max_terms: int | None = None,
        **options: Any,
    ) -> None:
        self.model = model = usable(model)
        self.likelihood = get_likelihood(likelihood)
        if layout is not None:
            self.likelihood = self.likelihood.with_layout(layout)
        self.structure, self.estimator = make_pair(structure, estimator, dict(options))
        self._asked = self.structure
        self.parameters = parameters if isinstance(parameters, (str, Subnetwork)) else patterns(model, parameters)
        single = isinstance(self.parameters, Subnetwork)
        within = self.parameters.within if isinstance(self.parameters, Subnetwork) else self.parameters
        if single:
            self.structure.of_entries(EntryLayout((), (), ()))  # refuses early what fit would refuse
        if within != "last_layer":
            select(model, within)  # as well
        _ = DAMPINGS[damping]
        if damping != "exact" and (single or not self.structure.takes_damping):
            what = "a subnetwork" if single else f"structure {self.structure.name!r}"
            raise IncompatiblePair(
                f"{what} has no Kronecker blocks, so damping={damping!r} would have no effect; leave damping out, or "
                'use structure="kron" over whole parameters'
            )
        self.damping = damping
        self.forward = reading(forward, inputs, targets)
        self.weights = weights if callable(weights) else bool(weights)
        _ = weighting.reader(self.forward, self.weights)  # refuses
        self.dtype = dtype
        self._method = self._temperature = None
        _ = UNUSED[unused]
        self.unused = unused
        self._n_data = None
        self._prior = 1.0
        self._state = None
        self._calibration = None
        self.prior_precision = prior_precision
        self._chain: TaskChain | None = None
        if prior is not None:
            left = prior._fitted("a chained posterior").left
            self._chain = left(prior.n_data, self.damping, multiplier, terms, forgetting, max_terms)
            if not (self._prior == 1.0 or self._prior == prior._prior):
                raise IncompatiblePair(
                    "prior= brings its own prior_precision; leave prior_precision out, and set it afterwards to "
                    "change it"
                )
            self._prior = prior._prior
        elif (multiplier, terms, forgetting, max_terms) != (1.0, "keep", 1.0, None):
            raise InvalidType("multiplier, terms, forgetting and max_terms go with prior=, a fitted posterior")

    def __repr__(self) -> str:
        state = "not fitted" if self._state is None else f"n_data={self.n_data:g}, P={self._state.mean.shape[0]}"
        return (
            f"LaplacePosterior({type(self.model).__name__}, {self.likelihood!r}, structure={self.structure.name!r}, "
            f"estimator={self.estimator.name!r}, damping={self.damping!r}, prior_precision={self._prior!r}; {state})"
        )

    # -- fitting -------------------------------------------------------------------------------------------------------

    @typed
    def fit(
        self,
        train_loader: Iterable[Any] | tuple[Any, Tensor],
        y: Any = None,
        *,
        progress: bool = False,
        n_data: float | None = None,
        passes: int = 1,
        generator: torch.Generator | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
        process_group: Any = None,
    ) -> LaplacePosterior:
        """Estimates the curvature at the model's current weights.

        Args:
            train_loader: loader, iterable of batches, or a pair of tensors or arrays ``(x (N, ...), y (N, ...))``.
            y: targets ``(N, ...)``, where the first argument is the inputs alone.
            progress: show a bar.
            n_data: N; default: the number of examples seen in one pass. With ``prior=``, that of this task.
            passes: how often to go through the data (for random augmentation); the curvature is the mean over all.
            generator: random numbers of the estimator; a fresh private one by default. One number is taken from it;
                what is drawn for an example hangs on that and on its index in the loader's data set, else its place.
            checkpoint: file in which the fit keeps what it has, so that the same call goes on after the last writing if
                it was interrupted, and ends with the same numbers bit for bit (:mod:`laplace_kf.resuming`); it is
                removed at the end. The data have to come in the same order when the random states are the same.
            every: minibatches between two writings.
            process_group: a ``torch.distributed`` group whose processes all call this, each with its own share of the
                data; all then have the same posterior, of all shares together (:mod:`laplace_kf.distributed`).

        Returns:
            The posterior itself.

        Raises:
            DistributedFailure: if another process fails or is lost; nothing is changed then.
            CorruptFile: if ``checkpoint`` is damaged, or another kind of file.
            ShapeMismatch: if it was made for another model, other data or settings; nothing is overwritten. Also
                for an empty loader, a batch of another form, or targets that do not fit the outputs.
            NonFinite: for NaN or infinity, with the number of the batch.
            UnsupportedLayer: for a parameter that cannot be handled; names module and way out.
        """
        if passes < 1 or int(passes) != passes:
            raise InvalidArgument(f"passes must be a positive integer, got {passes}")
        if n_data is not None:
            n_data = positive("n_data", n_data)
        seeded, generator = generator is not None, generator if generator is not None else fresh_generator()
        ranks = Ranks.of(process_group)
        with nullcontext() if ranks is None else ranks.together("the fit"):
            shard = Shard(paired(train_loader, y), self.estimator.draws)
            data = weighting.batches(shard.data, self.weights, self.model)
            if ranks is None:
                shard.warn_alone()
            else:
                refuse_checkpoint(checkpoint)
                require_one_job(ranks, "fit", {**self._described(), "n_data": n_data, "passes": passes})
                require_one_network(ranks, self.model)
                shard.settle(ranks.exchange("the shares", shard.description(data)), ranks.rank)
            single = [self._prior, n_data] if isinstance(self.parameters, Subnetwork) else None
            kept = journal(
                checkpoint, every, self.model, data, generator, seeded, (self.likelihood, self.estimator, self._asked),
                parameters=self.parameters, passes=passes, dtype=self.dtype, unused=self.unused, weights=self.weights,
                forward=self.forward, choice=single,
            )  # fmt: skip
            with kept.running():
                statistics = self._gathered(data, shard, ranks, n_data, passes, generator, progress, kept)
                found = self._found(statistics, n_data)
            if ranks is not None:
                decomposed(ranks, found.curvature)
        return self._adopted(found, n_data)

    def _gathered(
        self,
        data: Iterable[Any],
        shard: Shard,
        ranks: Ranks | None,
        n_data: float | None,
        passes: int,
        generator: torch.Generator,
        progress: bool,
        kept: Journal,
    ) -> Statistics:
        """The sums over the data of one pass, of all processes together."""
        job = (self.model, data, self.likelihood, self.estimator)
        settings: dict[str, Any] = {
            "forward": weighting.reader(self.forward, self.weights), "generator": generator, "dtype": self.dtype,
            "unused": self.unused, "shard": shard, "ranks": ranks,
        }  # fmt: skip
        names, structure = (
            covered(
                self.parameters,
                self._asked,
                *job,
                prior=lambda layout: by_parameter(self._prior, layout),
                n_data=n_data,
                **settings,
            )
            if self._chain is None
            else self._covered_by_chain(self._chain)
        )
        statistics = collect(
            *job, structure, parameters=names, passes=passes, progress=progress, journal=kept, **settings
        )
        return statistics.scale(1 / passes) if passes > 1 else statistics

    def _described(self) -> dict[str, Any]:
        """What has to be the same in all processes of a group."""
        asked, estimator = self._asked, self.estimator
        return {
            "likelihood": self.likelihood,
            "structure": (asked.name, asked.options()),
            "estimator": (estimator.name, estimator.options()),
            "parameters": self.parameters,
            "damping": self.damping,
            "prior_precision": self._prior,
            "dtype": self.dtype,
            "weights": self.weights is not False,
            "unused": self.unused,
            "prior": self._chain is not None,
        }

    def refit(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        y: Any = None,
        *,
        train: Callable[[nn.Module, Any], Any] | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
        process_group: Any = None,
    ) -> LaplacePosterior:
        """After :meth:`tune`: the curvature of all rows, with the settings kept (N, λ, noise scale, method).

        Args:
            data, y: as :meth:`fit` takes them: a loader, a pair ``(x (N, ...), y (N, ...))``, or the two of them.
            train: ``(model, data)``, trains the model on them first; without it the weights stay as they are.
            generator, progress, checkpoint, every, process_group: as of :meth:`fit`.

        Returns:
            The posterior itself, at the model's current weights.

        Raises:
            NotFitted: before ``fit``.
            IncompatiblePair: for a chained posterior, whose N is that of all its tasks.
        """
        self._fitted("refit")
        if self._chain is not None:
            raise IncompatiblePair("a chained posterior has no data of its own to refit; use update for another task")
        n = self.n_data
        if train is not None:
            train(self.model, data if y is None else (data, y))
        return self.fit(
            data, y, n_data=n, generator=generator, progress=progress, checkpoint=checkpoint, every=every,
            process_group=process_group,
        )  # fmt: skip

    @lasting()
    def adopt(self, statistics: Statistics, n_data: float | None = None) -> LaplacePosterior:
        """Takes curvature that was measured elsewhere, at the model's current weights, in place of :meth:`fit`.

        Args:
            statistics: of this posterior's parameters (from ``lk.curvature.estimate`` or an optimiser); its structure
                becomes theirs.
            n_data: N; default: the statistics' count.
        """
        return self._adopted(self._found(statistics, n_data), n_data)

    @lasting()
    def _found(self, statistics: Statistics, n_data: float | None) -> Fitted:
        """What a posterior of these statistics is, set by nobody yet."""
        mean, rest = flat_weights(self.model, statistics.layout)
        found = Fitted(
            self.model, self.forward, self.weights, self.likelihood, self.damping, statistics, statistics.mean(), mean,
            self.likelihood.parameters(), rest, self._chain,
        )  # fmt: skip
        return found.joined(n_data)

    def _adopted(self, found: Fitted, n_data: float | None) -> LaplacePosterior:
        self._accept(found, n_data)
        if found.statistics.outputs is not None:
            self.likelihood = self.likelihood.with_layout(found.statistics.outputs)
        return self

    def _accept(self, found: Fitted, n_data: float | None) -> None:
        by_parameter(self._prior, found.layout)  # has to cover every parameter
        self._state, self._around = found, Surroundings.of(self.model, found.layout.names)
        self.structure = found.statistics.structure.first()
        self._n_data = found.count if n_data is None or found.reference is not None else float(n_data)
        self._calibration = None

    def _covered_by_chain(self, chain: TaskChain) -> tuple[str | Sequence[str], Structure]:
        """What a chained posterior covers: of a subnetwork, the weights that were chosen for the first task."""
        layout = chain.curvature.layout
        if not isinstance(self.parameters, Subnetwork) or not isinstance(layout, EntryLayout):
            return self.parameters, self._asked  # type: ignore[return-value]
        return [glob.escape(name) for name in layout.names], self._asked.of_entries(layout)

    @typed
    @lasting()
    def update(
        self,
        task_loader: Iterable[Any] | tuple[Any, Tensor],
        multiplier: float = 1.0,
        terms: str = "keep",
        *,
        forgetting: float = 1.0,
        max_terms: int | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        n_data: float | None = None,
        passes: int = 1,
        generator: torch.Generator | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
        process_group: Any = None,
    ) -> LaplacePosterior:
        """The posterior after another task, with this one as its prior (methods 11.1): a new object, this one stays.

        Train the model with :meth:`penalty` first. The mean of the new posterior is the model's current weights, its
        precision ``forgetting · (Λ_prev − λ I) + multiplier · N_t C̄_t + λ I``. Its ``n_data`` is ``forgetting ·
        N_prev + multiplier · N_t`` and its ``curvature`` the mean over all of that, so that ``Λ = n_data · C̄ + λ I``
        holds as for any posterior: setting ``n_data`` afterwards rescales the curvature of all tasks alike, and setting
        ``prior_precision`` replaces the one λ. :meth:`log_evidence` is that of the newest task given the earlier ones.

        Args:
            task_loader: the new task's data, as for :meth:`fit`: a loader or a pair ``(x (N, ...), y (N, ...))``.
            multiplier: λ_c, on the new task's curvature.
            terms: what becomes of the curvature terms of Kronecker and eigenvalue-corrected blocks. ``"keep"``: all
                kept, exact, growing. ``"sum"``: factors added (methods 11.2; over-estimates). ``"project"``: the
                nearest single product in Frobenius norm. ``"project_kl"``: the nearest in Kullback-Leibler divergence.
                Diagonal and dense blocks add exactly under every name; low-rank ones are cut back to their rank under
                all but ``"keep"``.
                :attr:`chain_errors` reports the error by block.
            forgetting: factor in (0, 1] on the previous curvature.
            max_terms: with ``terms="keep"``: at most so many terms of a block, so that memory and cost stay as they are
                from then on. Where there would be more, the two that lose least in Frobenius norm become their nearest
                single term; 1 is ``"project"``. Low-rank blocks keep the vectors of so many tasks.
            forward, inputs, targets: as in the constructor, if the task needs others (its own head, for instance).
            n_data, passes, generator, progress, checkpoint, every, process_group: as for :meth:`fit`; ``n_data`` is the
                N of the new task.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for any other ``terms``.
            IncompatiblePair: if the task covers other parameters, for a damping other than ``"exact"``, for a
                structure whose blocks cannot be chained in that way, or for ``max_terms`` with terms that are one.
            TypeError: for ``max_terms`` that is no integer.
            ValueError: for a multiplier that is not positive, ``forgetting`` outside (0, 1], or ``max_terms`` below 1.
        """
        self._in_model("update")
        one_argument("update", multiplier)
        own = reading(forward, inputs, targets)
        following = LaplacePosterior(
            self.model,
            self.likelihood,
            self.structure,
            self.estimator,
            self.parameters,
            damping=self.damping,
            forward=own if own is not None else self.forward,
            dtype=self.dtype,
            weights=self.weights,
            unused=self.unused,
            prior=self,
            multiplier=multiplier,
            terms=terms,
            forgetting=forgetting,
            max_terms=max_terms,
        )
        return following.fit(
            task_loader, n_data=n_data, passes=passes, generator=generator, progress=progress, checkpoint=checkpoint,
            every=every, process_group=process_group,
        )  # fmt: skip

    # -- tuning and calibration ----------------------------------------------------------------------------------------

    @typed
    def tune(
        self,
        val: Iterable[Any] | tuple[Any, Tensor] | None = None,
        objective: str | Objective = "nll",
        method: str = "auto",
        n_data: Sequence[float] | None = None,
        prior_precision: Sequence[float] | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        budget: float | None = 10.0,
        extend: int = 0,
        progress: bool = False,
        noise: bool | None = None,
        per_block: bool = False,
        ood: Iterable[Any] | None = None,
        max_examples: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        process_group: Any = None,
    ) -> TuningResult:
        """Finds how to predict, (N, λ), and the noise scale of a regression, on validation data; sets them.

        Without grids the predictives compete: the trained weights alone (MAP), those with a temperature on their logits
        or predicted noise, the linearised network through the probit approximation or in full, and Monte Carlo, each at
        its own best setting and within a ``budget`` (:mod:`laplace_kf.posterior.candidates`). The winner, which has to
        beat the others beyond the noise of the validation data, becomes :attr:`method`. Settings are searched from
        coarse to fine in coordinates that do not trade off (:mod:`laplace_kf.posterior.search`), and the result is
        never worse than MAP on the validation data: if no posterior beats the trained weights by more than one standard
        error of the paired difference, (N, λ) is set to a finite point that is MAP in effect, and the result says so
        (``map_wins``). With a grid for N or λ every pair is measured with one method and the smallest objective wins
        (methods 9.3).

        Args:
            val: loader, iterable of batches, or a pair ``(x (N, ...), y (N, ...))``; ``objective="evidence"`` needs
                none.
            objective: ``"nll"``, ``"brier"``, ``"ece"``, ``"ood"`` (with ``ood=``), ``"evidence"``, an ``OODContrast``,
                a ``WithinTolerance`` (the largest variance that costs no more than its tolerance; with or without a
                grid for λ) or a callable ``(prediction, targets) -> mean score or (N,) scores``; lower is better.
            method: ``"auto"`` for a competition; a name of :meth:`predict`'s methods to tune that one alone (beside
                MAP and the temperature, as references) and to set :attr:`method` to it. With grids ``"auto"`` is the
                method that the posterior has.
            n_data: grid for N; if only the other is given ``N · 10^{-1 … 4}`` in half decades.
            prior_precision: grid for λ; if only the other is given ``10^{-4 … 4}`` in half decades.
            samples: weight draws per point, the same for all of them. Default: 20, or 40 or 100 (as many as
                :meth:`predict` uses) where the budget lets the search look around with them on all examples, 10 where
                it is too small for 20. Scores of fewer than 100 are extrapolated to 100
                (:mod:`laplace_kf.posterior.jackknife`), and the default search measures its best setting once more
                with up to as many others.
            generator: random numbers; with one, the search is reproducible.
            budget: training epochs of the validation examples that the search may take, all work included, by count of
                multiply-adds; None for no limit. A grid is measured in full whatever it takes.
            extend: how often to extend the grid where the best value lies on its edge.
            progress: show a bar.
            noise: whether to tune the noise scale σ of a Gaussian likelihood too, by the same objective. Default: if
                there are no grids and σ was left at its default 1.0 when the curvature was fitted. The posterior gets
                a likelihood of its own with the new σ; the one that was handed over keeps its scale. With grids σ is
                first set to MAP's best.
            per_block: with the evidence, one λ for each block; ``prior_precision`` becomes ``{name: λ}``.
            ood: loader or tensor of out-of-distribution inputs for ``objective="ood"``.
            max_examples: look at the first batches of ``val`` only, until there are so many examples; default all.
            checkpoint: file in which the search keeps what it has measured, so that the same call, made again after an
                interruption, does not measure it again and ends with the same numbers bit for bit
                (:mod:`laplace_kf.posterior.kept_scores`); it is removed at the end. The evidence needs none.
            process_group: a ``torch.distributed`` group whose processes all call this, each with its own share of
                ``val``; every example is scored once, and all processes make the same choice. The references of
                :meth:`ood_score` then need :meth:`calibrate`.

        Returns:
            Everything measured, every candidate with its gain over MAP and standard error, the best, what the search
            cost, and whether the best lies on the edge (which is also warned about, as is a win of MAP). Prints as a
            few lines.

        Raises:
            NotFitted: before ``fit``.
            UnknownName: for an unknown objective or method.
            IncompatiblePair: for options that do not go together; for one method that the budget is too small for.
            NonFinite: if the objective is finite at no point, or the data are not finite.
            CorruptFile: if ``checkpoint`` is damaged, or another kind of file.
            ShapeMismatch: if it was made for another posterior, other data or settings; nothing is overwritten.
            DistributedFailure: if another process fails or is lost; nothing is changed then.
        """
        self._as_fitted("tune")
        one_argument("tune", objective)
        options = Options(
            objective, method, samples, generator, extend, progress, noise, per_block, ood, max_examples, budget
        )
        ranks = Ranks.of(process_group)
        with nullcontext() if ranks is None else ranks.together("the tuning"):
            shard = Shard(val)
            if ranks is None:
                shard.warn_alone()
            else:
                refuse_checkpoint(checkpoint)
                asked = (self.n_data, self._prior, self.method, self._fitted("tune").count, n_data, prior_precision)
                require_one_job(ranks, "tune", {"options": replace(options, generator=None), "settings": asked})
                require_one_network(ranks, self.model)
                shard.settle(ranks.exchange("the shares", shard.description(shard.data)), ranks.rank)
            if checkpoint is not None:
                made_for = searched(self._fitted("tune"), self.n_data, self._prior, n_data, prior_precision, options)
                options = replace(options, kept=KeptScores(checkpoint, made_for))
            data = None if val is None else weighting.batches(shard.data, self.weights, self.model)
            keeping = nullcontext() if options.kept is None else options.kept.running(generator)
            with lasting(), keeping, stage(self.model, self.forward) as (model, forward):
                seen = (
                    None if data is None else Seen(data, self.forward, partial(self.require_as_fitted, model, forward))
                )
                fitted = replace(self._fitted("tune"), model=model, forward=forward)
                now = Settings(self.n_data, self._prior, None, self.method, self._temperature)
                validate = Validation if ranks is None else partial(SharedValidation, ranks)
                found, settings = tune(fitted, now, seen, n_data, prior_precision, options, validate)
            if ranks is not None:
                settings = ranks.exchange("the choice", settings)[0]
        found.warn()  # first: where warnings are errors, the call fails and nothing is set
        self._n_data, self._prior = settings.n_data, settings.prior_precision
        if settings.noise is not None:
            self.likelihood = self.likelihood.with_noise_scale(settings.noise)
        if settings.method is not None:
            self._method = settings.method
        if settings.temperature is not None:
            self._temperature = settings.temperature
        kept = seen is not None and ranks is None  # other processes have seen other inputs
        self._calibration = Calibration(pending=tuple(seen.taken)) if kept and seen is not None else None
        return found

    @typed
    @lasting()
    def calibrate(
        self,
        data: Iterable[Any] | tuple[Any, Tensor],
        method: str = "auto",
        samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> LaplacePosterior:
        """Split-conformal calibration on data that were not trained on; saved with the posterior.

        From then on ``interval`` and ``prediction_set`` of predictions by the same method cover new examples that are
        exchangeable with these with the probability asked for (:mod:`laplace_kf.outputs.conformal`), and
        :meth:`ood_score` has its references. Setting N or λ, ``fit`` and ``tune`` drop it: tune first, on other data.
        The guarantee is exact for the methods in closed form; with drawn weights it holds up to their noise.

        Args:
            data: loader, iterable of batches, or a pair ``(x (n, ...), y (n, ...))``.
            method: how to predict; ``"auto"`` for what :meth:`predict` does by itself.
            samples, generator: as in :meth:`predict`.

        Returns:
            The posterior itself.

        Raises:
            NotFitted: before ``fit``.
            ShapeMismatch: if the data are empty or do not fit.
            IncompatiblePair: for outputs with several positions, whose coverage is not defined.
            NonFinite: for NaN or infinity.
        """
        self._as_fitted("calibrate")
        one_argument("calibrate", method)
        chosen = self.method if method == AUTO else method
        self._calibration = calibrate(self, data, chosen, samples, generator)
        return self

    # -- keeping it ----------------------------------------------------------------------------------------------------

    @typed
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (no pickle) with a checksum; :meth:`load` needs the same architecture.

        Raises:
            NotFitted: before ``fit``.
        """
        self._fitted("save")
        files.write(path, *self.packed(), files.POSTERIOR)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`save` writes: tensors (any shapes, by name) and JSON-able values; for checkpoints.

        Raises:
            NotFitted: before ``fit``.
        """
        fitted = self._fitted("packed")
        if self._calibration is not None:
            self._calibration = self._calibration.with_references(self)
        return header_of.packed(self, fitted)

    @classmethod
    @typed
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        weights: Weights | None = None,
    ) -> LaplacePosterior:
        """Reads a posterior for a model of the same architecture; its mean is the file's, not the model's weights.

        Args:
            path: file written by :meth:`save`.
            model: module whose parameters have the file's names and shapes; frozen or not.
            likelihood: needed only if the file's one was an object that cannot be written down (``FromDistribution``).
            forward, inputs, targets, weights: as in the constructor (functions are not saved).

        Raises:
            CorruptFile: if the file is truncated, altered or not one of ours.
            ShapeMismatch: if the model's parameters do not have the file's names and shapes, or the selection covers
                others in this model.
            IncompatiblePair: if the likelihood is needed and missing.
        """
        own = reading(forward, inputs, targets)
        model = usable(model)
        found = files.read(path, files.POSTERIOR)
        with store.consistent(path):
            return cls.unpacked(*found, model, likelihood=likelihood, forward=own, weights=weights)

    @classmethod
    def unpacked(
        cls,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, Any],
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        forward: Forward | None = None,
        inputs: Part | None = None,
        targets: Part | None = None,
        weights: Weights | None = None,
    ) -> LaplacePosterior:
        """The inverse of :meth:`packed` (tensors of any shapes, by name); arguments and errors as of :meth:`load`."""
        model, own = usable(model), reading(forward, inputs, targets)
        given = header_of.arguments(header, model, likelihood, weights)
        chosen = given.pop(
            "parameters"
        )  # may be frozen here, which the constructor refuses: only a fit needs gradients
        posterior = cls(model, forward=own, parameters="last_layer", **given)
        posterior.parameters = tuple(chosen) if isinstance(chosen, list) else chosen
        found = header_of.unpacked(tensors, header, posterior)
        posterior._chain = found.chain
        posterior._accept(found, header["n_data"])
        posterior._around = Surroundings.from_json(header.get("surroundings"), found.layout.names, header.get("ties"))
        posterior._around.ties.require(model)
        posterior._n_data = positive("n_data", header["n_data"])
        posterior.method, posterior.temperature = header.get("method") or AUTO, header.get("temperature")
        posterior._calibration = Calibration.unpacked(tensors, header.get("calibration"))
        posterior.structure.reason = header.get("reason", "")
        return posterior
