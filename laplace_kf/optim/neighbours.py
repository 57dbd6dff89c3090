"""What other packages call the options of these optimisers, for the hints of refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from laplace_kf.curvature import SETTINGS
from laplace_kf.errors import UnknownOption
from laplace_kf.neighbours import ARGUMENTS

__all__ = ["hinted"]

_TOLERANCE = "termination=lk.optim.cg.Progress(tolerance=...)"
_LIMIT = "recipe=lk.optim.Recipe(limit=...)"
_SEARCH = "recipe=, whose choice of the iterate is followed by a line search"
_LENGTH = "rescale=True, which takes the length of the step from the exact quadratic model"
_BY_MEANING: dict[str, str] = {
    "ema=": "curvature_ema cov_ema_decay factor_decay stat_decay ema_decay decay beta betas beta1 beta2 rho alpha",
    "refresh=": "inverse_update_period inv_update_freq tinv preconditioner_update_period update_freq "
    "update_freq_inv precondition_frequency",
    "factors_every=": "curvature_update_period factor_update_freq factor_update_steps tcov",
    "estimator=": "estimation_mode fisher_type fisher_approx curvature_opt curvature_type",
    "tau=": "levenberg levenberg_marquardt damp lambda lambda_ lam lambd damping_coefficient initial_damping tikhonov "
    "marquardt init_damping",
    "zeta=": "gamma eps epsilon",
    "adapt_tau=": "adaptive_damping use_adaptive_damping adapt_damping damping_adaptation",
    "tau_rule=lk.optim.LevenbergMarquardt(...)": "damping_schedule min_damping max_damping damping_adaptation_interval "
    "damping_adaptation_decay damping_lower_threshold damping_upper_threshold increase_factor decrease_factor",
    "l2=": "weight_decay l2_reg l2_regularization l2_penalty wd",
    "lr=": "learning_rate step_size stepsize learning_rate_schedule",
    "momentum=": "nesterov use_adaptive_momentum delta_decay cg_decay warm_start use_momentum",
    "curvature_fraction=": "batch_size curvature_batch_size cg_batch_size subsample sample_size",
    "sharing=": "kfac_approx kfac_type weight_sharing",
    "samples=": "mc_samples n_samples num_samples",
    "structural_damping=": "struc_damping mu structural",
    "distance=": "hidden_loss damping_distance",
    "trust_radius=": "radius trust_region delta trust_region_radius norm_constraint kl_clip kl_norm max_norm clip",
    _LENGTH: "use_adaptive_learning_rate adaptive_lr",
    _TOLERANCE: "cg_tol tol tolerance cg_eps cg_tolerance eps_cg termination_tolerance progress_tolerance",
    _LIMIT: "cg_iters max_cg_iters cg_max_iter cg_max_iters max_iter cg_steps cg_iterations max_cg max_cg_iterations",
    _SEARCH: "line_search backtracking use_line_search linesearch cg_backtracking",
}
_WORDS = {word: meaning for meaning, words in _BY_MEANING.items() for word in words.split()}


@contextmanager
def hinted(*groups: type[Any]) -> Iterator[None]:
    """Around what refuses options: the error names an option of these settings, also by what neighbours call it.

    Raises:
        UnknownOption: in place of the one that was raised.
    """
    try:
        yield
    except UnknownOption as error:
        own = [entry.name for group in groups for entry in dataclasses.fields(group)]
        options = [name for name in error.allowed if name not in SETTINGS]
        taken = (*own, *options)
        hint, known = _WORDS.get(error.name.lower()), ARGUMENTS.get(error.name.lower())
        if hint is not None and hint.endswith("="):
            if hint[:-1] not in (*taken, "estimator"):
                hint = {"zeta=": "tau=", "trust_radius=": _LENGTH}.get(hint)
            if hint is not None and hint.endswith("="):
                hint += repr(error.value) if isinstance(error.value, (bool, int, float)) else "..."
        elif hint == _LENGTH and "rescale" not in own:
            hint = None
        if known is not None and known.name in taken:
            hint = None  # said by laplace_kf.neighbours, with the value
        raise UnknownOption(error.name, error.taken, [*own, *options], error.value, hint) from None
