"""What other libraries call the same things: names of choices, and names of arguments with the line to use instead.

laplace-torch, BackPACK, curvlinops, posteriors, kfac-jax, asdl, kfac-pytorch, and torch itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["ARGUMENTS", "ELSEWHERE", "NAMES", "instead", "meanings", "number_instead", "of_loss"]

# What neighbours and torch call the same things.
NAMES: dict[str, str | tuple[str, ...]] = {  # several, where that depends on what is chosen
    "classification": "categorical",
    "multiclass": "categorical",
    "softmax": "categorical",
    "cross_entropy": "categorical",
    "crossentropy": "categorical",
    "ce": "categorical",
    "categorical_crossentropy": "categorical",
    "crossentropyloss": "categorical",
    "nllloss": "categorical",
    "nll": "categorical",
    "nll_loss": "categorical",
    "binary": "bernoulli",
    "binary_classification": "bernoulli",
    "multilabel": "bernoulli",
    "bce": "bernoulli",
    "bceloss": "bernoulli",
    "bcewithlogitsloss": "bernoulli",
    "binary_cross_entropy_with_logits": "bernoulli",
    "regression": "gaussian",
    "mse": ("gaussian", "squared"),
    "mseloss": "gaussian",
    "mse_loss": "gaussian",
    "normal": "gaussian",
    "squared_error": ("gaussian", "squared"),
    "count": "poisson",
    "counts": "poisson",
    "heteroscedastic_regression": "heteroscedastic_gaussian",
    "poissonnllloss": "poisson",
    "poisson_nll_loss": "poisson",
    "kfac": ("kron", "kronecker"),
    "kronecker": "kron",
    "diagonal": "diag",
    "dense": "full",
    "gp": "full",
    "block": "layer",
    "blockdiag": "layer",
    "block_diag": "layer",
    "block_diagonal": "layer",
    "low_rank": "lowrank",
    "scalar": "isotropic",
    "ggn": ("exact", "curvature"),
    "fisher": ("sampled", "curvature"),
    "mc": "sampled",
    "ef": "empirical",
    "empirical_fisher": ("empirical", "diagonal"),
    "emp_fisher": "empirical",
    "glm": "linearized",
    "nn": "mc",
    "sampling": "mc",
    "sample": "mc",
    "samples": "mc",
    "mean": "map",
    "monte_carlo": "mc",
    "marglik": "evidence",
    "gridsearch": "nll",
    "last": "last_layer",
    "l2": "squared",
    "quadratic": "squared",
    "euclidean": "squared",
    "kl": "cross_entropy",
    "matching": "cross_entropy",
    "matching_loss": "cross_entropy",
    "jacobi": "diagonal",
    "martens": ("diagonal", "original"),
    "martens2010": "original",
    "sutskever": "recurrent",
    "tikhonov": ("factored", "identity"),
    "levenberg": "identity",
    "levenberg_marquardt": "identity",
    "marquardt": "diagonal",
    "gauss_newton": ("exact", "curvature"),
    "pi": "balanced",
}
# Names of what is chosen by another argument, or is a function of its own.
ELSEWHERE = {
    "last_layer": 'parameters="last_layer"',
    "subnetwork": "parameters=lk.Subnetwork(size)",
    "bridge": 'method="linearized", link="bridge"',
    "dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "mc_dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "ensemble": "lk.Mixture([posterior, ...])",
    "marglik": 'posterior.tune(objective="evidence")',
    "gridsearch": "posterior.tune(val)",
    "cv": "posterior.tune(val)",
}


@dataclass(frozen=True)
class _Argument:
    """What is used instead of an argument.

    Attributes:
        name: the argument of ours that means the same, or ``""``.
        line: what is written where that is not taken, or there is none; ``{}`` stands for the value.
    """

    name: str
    line: str


def _setting(name: str) -> _Argument:
    return _Argument(name, f"LaplacePosterior(model, likelihood, {name}={{}})")


_PRIOR = _Argument("prior_precision", "posterior.prior_precision = {}")
_SAMPLES = _Argument("samples", 'posterior.predict(x, method="mc", samples={})')
_PREDICT = _Argument("method", "posterior.predict(x, method={})")
_NOISE = _Argument("scale", "lk.likelihoods.Gaussian(scale={}) as the likelihood")
_N_DATA = _Argument("n_data", "posterior.n_data = {}")
_COLD = _Argument("", "posterior.n_data = posterior.n_data / {}")
_ESTIMATOR = _Argument("estimator", "LaplacePosterior(model, likelihood, estimator={})")
_EMA = _Argument("ema", "lk.optim.kfac(model, likelihood, ema={})")
_REFRESH = _Argument("refresh", "lk.optim.kfac(model, likelihood, refresh={})")
_DAMP = _Argument("zeta", "lk.optim.kfac(model, likelihood, zeta={})")
_L2 = _Argument("l2", "posterior.prior_precision = n_data * {} (training: lk.optim.kfac(model, likelihood, l2={}))")
_GRID = _Argument("prior_precision", "posterior.tune(val, prior_precision=[...])")

ARGUMENTS: dict[str, _Argument] = {
    # laplace-torch
    "hessian_structure": _setting("structure"),
    "subset_of_weights": _setting("parameters"),
    "prior_prec": _PRIOR,
    "prior_precision_diag": _PRIOR,
    "prior_prec_init": _PRIOR,
    "init_prior_prec": _PRIOR,
    "prior_mean": _Argument("", "prior=posterior: the prior is around 0, or an earlier posterior"),
    "sigma_noise": _NOISE,
    "sigma_noise_init": _NOISE,
    "observation_noise": _NOISE,
    "n_samples": _SAMPLES,
    "num_samples": _SAMPLES,
    "mc_samples": _SAMPLES,
    "n_draws": _SAMPLES,
    "pred_type": _PREDICT,
    "link_approx": _Argument("", 'posterior.predict(x, method="linearized", link={})'),
    "joint": _Argument("", "posterior.functional_covariance(x, joint=True)"),
    "diagonal_output": _Argument("", "posterior.functional_covariance(x, diagonal_only={})"),
    "num_data": _N_DATA,
    "dataset_size": _N_DATA,
    "backend": _ESTIMATOR,
    "backend_kwargs": _ESTIMATOR,
    "asdl_fisher_kwargs": _ESTIMATOR,
    "last_layer_name": _Argument("parameters", 'LaplacePosterior(model, likelihood, parameters=[{} + ".*"])'),
    "subnetwork_indices": _Argument("", "parameters=lk.Subnetwork(size)"),
    "temperature": _COLD,
    "progress_bar": _Argument("progress", "progress={}"),
    "seed": _Argument("", "generator=torch.Generator().manual_seed({})"),
    "random_state": _Argument("", "generator=torch.Generator().manual_seed({})"),
    "rng": _Argument("generator", "generator=torch.Generator().manual_seed(0)"),
    "verbose": _Argument("progress", "progress={}"),
    "override": _Argument("", "posterior.refit(data) or a new LaplacePosterior"),
    "enable_backprop": _Argument("", "nothing: predictions are differentiable in x"),
    "dict_key_x": _Argument("inputs", "inputs=lambda batch: (batch[{}],)"),
    "dict_key_y": _Argument("targets", "targets=lambda batch: batch[{}]"),
    "feature_reduction": _Argument("forward", "forward=lambda model, batch: (outputs, targets)"),
    "val_loader": _Argument("val", "posterior.tune(val)"),
    "log_prior_prec_min": _GRID,
    "log_prior_prec_max": _GRID,
    "grid_size": _GRID,
    "n_steps": _GRID,
    # posteriors, curvlinops, BackPACK
    "init_prec_diag": _PRIOR,
    "fisher_type": _ESTIMATOR,
    "kfac_approx": _Argument("sharing", "LaplacePosterior(model, likelihood, sharing={})"),
    "estimation_mode": _ESTIMATOR,
    "curvature_type": _ESTIMATOR,
    # continual learning: avalanche and its like
    "ewc_lambda": _Argument("multiplier", "lk.continual.EWC(model, likelihood, multiplier={})"),
    "si_lambda": _Argument("c", "lk.continual.SynapticIntelligence(model, likelihood, c={})"),
    "decay_factor": _Argument("forgetting", "lk.continual.OnlineLaplace(model, likelihood, forgetting={})"),
    # torch's losses
    "weight": _Argument("class_weights", "lk.likelihoods.Categorical(class_weights={}) as the likelihood"),
    "pos_weight": _Argument("", "weights=True and batches (x, y, w), or lk.likelihoods.FromLoss(loss)"),
    "reduction": _Argument("", "no reduction: a likelihood is that of one example"),
    # optimisers: kfac-jax, asdl, kfac-pytorch and their like, torch.optim
    "curvature_ema": _EMA,
    "stat_decay": _EMA,
    "ema_decay": _EMA,
    "factor_decay": _EMA,
    "cov_ema_decay": _EMA,
    "update_freq": _REFRESH,
    "inverse_update_period": _REFRESH,
    "inv_update_steps": _REFRESH,
    "inv_update_freq": _REFRESH,
    "factor_update_steps": _REFRESH,
    "fac_update_freq": _REFRESH,
    "curvature_upd_interval": _REFRESH,
    "preconditioner_upd_interval": _REFRESH,
    "tcov": _REFRESH,
    "tinv": _REFRESH,
    "initial_damping": _DAMP,
    "kl_clip": _Argument("", "rescale=True, which makes the step as long as the quadratic model says"),
    "norm_constraint": _Argument("trust_radius", "lk.optim.hessian_free(model, likelihood, trust_radius={})"),
    "learning_rate": _Argument("lr", "lk.optim.kfac(model, likelihood, lr={})"),
    "l2_reg": _L2,
    "weight_decay": _L2,
    "use_adaptive_damping": _Argument("adapt_tau", "lk.optim.kfac(model, likelihood, adapt_tau={})"),
    "use_adaptive_momentum": _Argument("momentum", "lk.optim.kfac(model, likelihood, momentum={})"),
}
NUMBERS = {
    "damping": "prior_precision={} for a posterior, zeta={} for an optimiser; damping= says how it is added",
}
# what values of these arguments are here
_VALUES: dict[str, dict[object, str]] = {
    "subset_of_weights": {"subnetwork": "lk.Subnetwork(size)"},
    "link_approx": {"probit": '"probit"', "mc": '"mc"', "bridge": '"bridge"', "bridge_norm": '"bridge"'},
    "fisher_type": {
        "type-2": '"exact"', "mc": '"sampled"', "empirical": '"empirical"', "forward-only": '"exact"',
        "fisher_exact": '"exact"', "fisher_mc": '"sampled"', "fisher_emp": '"empirical"',
    },
    "estimation_mode": {
        "fisher_gradients": '"sampled"', "fisher_empirical": '"empirical"', "fisher_exact": '"exact"',
        "ggn_exact": '"exact"', "ggn_curvature_prop": '"projection"', "fisher_curvature_prop": '"projection"',
    },
}  # fmt: skip


def meanings(word: str) -> tuple[str, ...]:
    """What a word of other libraries may mean here."""
    found = NAMES.get(word.lower().replace("-", "_").replace(" ", "_"), ())
    return (found,) if isinstance(found, str) else found


def number_instead(kind: str, value: object) -> str | None:
    """What to write where a number was given for a name of some kind; ``None`` if not known."""
    if kind not in NUMBERS or isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return NUMBERS[kind].replace("{}", repr(value))


def instead(name: str, value: object, allowed: Collection[str]) -> str | None:
    """What to write instead of ``name=value`` where the arguments ``allowed`` are taken; ``None`` if not known."""
    found = ARGUMENTS.get(name.lower())
    if found is None:
        return None
    shown = _shown(name.lower(), value)
    if found.name in allowed and "{}" in found.line:
        return f"{found.name}={shown}"
    return found.line.replace("{}", shown)


def _shown(name: str, value: object) -> str:
    """A value as it is written here; ``...`` for what has no short form."""
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, str):
        if word in _VALUES.get(name, {}):
            return _VALUES[name][word]
        return repr((*meanings(word), value)[0]).replace("'", '"')
    return repr(value) if isinstance(value, (bool, int, float)) else "..."


_LOG_VARIANCE = (
    '"heteroscedastic_gaussian", whose outputs are a mean and a log-variance: torch.cat([mean, variance.log()], 1)'
)
_LOGITS = '"bernoulli", whose outputs are logits: leave the sigmoid out of the model'
_OTHER_OUTPUTS = {  # losses of what a likelihood's outputs are the logarithms or logits of
    "GaussianNLLLoss": _LOG_VARIANCE,
    "gaussian_nll_loss": _LOG_VARIANCE,
    "BCELoss": _LOGITS,
    "binary_cross_entropy": _LOGITS,
    "PoissonNLLLoss": '"poisson", whose outputs are log rates: leave exp or softplus out of the model',
}


def of_loss(loss: object) -> str:
    """The line for a loss whose likelihood's name alone would drop settings or take other outputs; else ``""``."""
    kind = getattr(loss, "__name__", type(loss).__name__)
    weighted = getattr(loss, "weight", None) is not None
    if kind in ("CrossEntropyLoss", "NLLLoss"):
        told = {"class_weights": "loss.weight"} if weighted else {}
        smoothing, ignored = getattr(loss, "label_smoothing", 0.0), getattr(loss, "ignore_index", -100)
        told.update({"label_smoothing": str(smoothing)} if smoothing else {})
        told.update({"ignore_index": str(ignored)} if ignored != -100 else {})
        return f"lk.likelihoods.Categorical({', '.join(f'{k}={v}' for k, v in told.items())})" if told else ""
    if kind == "BCEWithLogitsLoss" and (weighted or getattr(loss, "pos_weight", None) is not None):
        return (
            "lk.likelihoods.FromLoss(lambda z, y: F.binary_cross_entropy_with_logits(z, y, loss.weight, "
            'pos_weight=loss.pos_weight, reduction="none").sum(-1))'
        )
    if kind in _OTHER_OUTPUTS and (kind != "PoissonNLLLoss" or not getattr(loss, "log_input", True)):
        return _OTHER_OUTPUTS[kind]
    if callable(loss) and not meanings(kind) and (not isinstance(loss, type) or kind.endswith("Loss")):
        return "lk.likelihoods.FromLoss(f), where f(outputs, targets) is the loss of every example, (N,), not reduced"
    return ""
