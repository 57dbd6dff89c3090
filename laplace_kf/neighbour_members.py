"""What other libraries call the attributes and methods of what is made here, with the line to write instead.

Every line can be pasted: ``posterior``, ``model``, ``x``, ``y``, ``v``, ``val`` and loaders are the user's.

laplace-torch, scikit-learn, gpytorch, posteriors, Pyro, curvlinops, and torch's modules, tensors and distributions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["MEMBERS", "called", "member"]

_PROBS = "posterior.predict(x).probs"
_SAMPLES = "posterior.predict(x, keep_samples=True).samples"
_OUTPUTS = 'posterior.predict(x, method="linearized")'
_SCORE = "posterior.predict(x).log_prob(y).mean()"
_EVIDENCE = "posterior.log_evidence()"
_COVARIANCE = "posterior.precision.solve(torch.eye(posterior.precision.size))"
_MOVED = 'posterior.save("posterior.safetensors"); LaplacePosterior.load("posterior.safetensors", model.to(device))'
_MODE = "posterior  # nothing to do: curvature and predictions are in eval mode, whatever the model's mode"
_SKLEARN = "lk.bridges.sklearn.LaplaceClassifier(module=model)  # an estimator of scikit-learn"
_KEPT = 'posterior.save("posterior.safetensors")'

MEMBERS: dict[str, dict[str, str]] = {
    "posterior": {
        # laplace-torch
        "optimize_prior_precision": 'posterior.tune(val)  # or posterior.tune(objective="evidence")',
        "log_marginal_likelihood": f"{_EVIDENCE}  # at posterior.prior_precision",
        "log_likelihood": "posterior.evidence().fit",
        "log_prob": "posterior.predict(x).log_prob(y)  # or posterior.gaussian.log_prob(weights), flat",
        "functional_variance": "posterior.functional_covariance(x)  # takes inputs, not Jacobians",
        "functional_samples": _SAMPLES,
        "predictive_samples": _SAMPLES,
        "posterior_precision": "posterior.precision  # .dense() for the whole matrix",
        "posterior_covariance": _COVARIANCE,
        "posterior_variance": f"{_COVARIANCE}.diag()",
        "posterior_scale": f"{_COVARIANCE}.diag().sqrt()",
        "prior_precision_diag": "posterior.prior_precision",
        "prior_prec": "posterior.prior_precision",
        "log_det_posterior_precision": "posterior.precision.logdet()",
        "log_det_ratio": "posterior.evidence().log_det_ratio",
        "log_det_prior_precision": "posterior.precision.logdet() - posterior.evidence().log_det_ratio",
        "scatter": "posterior.evidence().scatter",
        "square_norm": "2 * posterior.penalty()  # at the model's current weights",
        "sigma_noise": "posterior.likelihood.scale",
        "n_params": "posterior.precision.size",
        "H": "posterior.n_data * posterior.curvature.dense()",
        "gridsearch": "posterior.tune(val)",
        "backend": "posterior.estimator",
        "reset": "posterior.fit(train_loader)  # starts anew",
        # scikit-learn
        "predict_proba": _PROBS,
        "predict_log_proba": f"{_PROBS}.log()",
        "decision_function": 'posterior.predict(x, method="map").probs',
        "score": _SCORE,
        "sample_y": _SAMPLES,
        "partial_fit": "posterior = posterior.update(loader)",
        "get_params": _SKLEARN,
        "set_params": _SKLEARN,
        "classes_": _SKLEARN,
        "coef_": "posterior.mean",
        # torch's modules and optimisers
        "eval": _MODE,
        "train": _MODE,
        "to": _MOVED,
        "cuda": _MOVED,
        "cpu": _MOVED,
        "double": _MOVED.replace("device", "torch.float64"),
        "state_dict": _KEPT,
        "load_state_dict": 'posterior = LaplacePosterior.load("posterior.safetensors", model)',
        "named_parameters": "posterior.mean.items()",
        "dump": _KEPT,
        "requires_grad_": "posterior.model.requires_grad_()",
        # Gaussian processes, Pyro, posteriors and other words for it
        "posterior": "lk.bridges.botorch.LaplaceModel(posterior)  # a model of botorch",
        "condition_on_observations": "posterior.update(loader)",
        "guide": "lk.bridges.pyro",
        "evaluate": _SCORE,
        "forward_mc": 'posterior.predict(x, method="mc")',
        "mc_predict": 'posterior.predict(x, method="mc")',
        "predictive": "posterior.predict(x)",
        "predictive_distribution": "posterior.predict(x).distribution",
        "predict_dist": "posterior.predict(x).distribution",
        "predict_f": f"{_OUTPUTS}  # .mean and .epistemic_variance",
        "predict_y": f"{_OUTPUTS}  # .mean and .variance",
        "predict_mean": f"{_OUTPUTS}.mean",
        "predict_var": f"{_OUTPUTS}.variance",
        "predict_variance": f"{_OUTPUTS}.variance",
        "predict_std": f"{_OUTPUTS}.variance.sqrt()",
        "predict_quantiles": "posterior.predict_interval(x, level=0.9)",
        "predict_logits": f"{_OUTPUTS.replace(')', ', keep_samples=True)')}.samples",
        "entropy": "posterior.predict(x).entropy",
        "mutual_information": "posterior.predict(x).mutual_information",
        "uncertainty": "posterior.predict(x).entropy  # or .epistemic_variance of numbers",
        "marglik": _EVIDENCE,
        "marginal_likelihood": _EVIDENCE,
        "log_marglik": _EVIDENCE,
        "elbo": _EVIDENCE,
        "rsample": "posterior.sample(20)",
        "sample_n": "posterior.sample(20)",
        "sample_weights": "posterior.sample(20)",
        "sample_parameters": "posterior.sample(20)",
        "sample_posterior": "posterior.sample(20)",
        "draw": "posterior.sample(20)",
        "covariance": _COVARIANCE,
        "covariance_matrix": _COVARIANCE,
        "cov": _COVARIANCE,
        "variance": f"{_COVARIANCE}.diag()",
        "std": f"{_COVARIANCE}.diag().sqrt()",
        "stddev": f"{_COVARIANCE}.diag().sqrt()",
        "loc": "posterior.mean",
        "map": "posterior.mean",
        "hessian": "posterior.curvature",
        "fisher": "posterior.curvature",
        "ggn": "posterior.curvature",
        "factors": "posterior.statistics.sums",
        "n_samples": "posterior.n_data",
        "calibrated": "posterior.calibrate(calibration_loader)",
        "temperature_scale": 'posterior.tune(val, method="temperature")',
        "optimize": "posterior.tune(val)",
        "tune_prior": "posterior.tune(val)",
    },
    "prediction": {
        "logits": "posterior.predict(x, keep_samples=True).samples  # one set of logits for each draw",
        "std": "prediction.variance.sqrt()",
        "stddev": "prediction.variance.sqrt()",
        "scale": "prediction.variance.sqrt()",
        "var": "prediction.variance",
        "loc": "prediction.mean",
        "probabilities": "prediction.probs",
        "prob": "prediction.probs",
        "proba": "prediction.probs",
        "predict_proba": "prediction.probs",
        "confidence": "prediction.probs.amax(-1)",
        "argmax": "prediction.probs.argmax(-1)",
        "max": "prediction.probs.max(-1)",
        "label": "prediction.probs.argmax(-1)",
        "labels": "prediction.probs.argmax(-1)",
        "classes": "prediction.probs.argmax(-1)",
        "log_probs": "prediction.probs.log()",
        "log_likelihood": "prediction.log_prob(y)",
        "nll": "-prediction.log_prob(y).mean()",
        "sample": "prediction.distribution.sample()",
        "rsample": "prediction.distribution.rsample()",
        "quantile": "prediction.interval(level=0.9)",
        "quantiles_": "prediction.interval(level=0.9)",
        "confidence_region": "prediction.interval(level=0.9)",
        "covariance": "posterior.functional_covariance(x)",
        "covariance_matrix": "posterior.functional_covariance(x, joint=True)",
        "aleatoric_variance": "prediction.variance - prediction.epistemic_variance",
        "aleatoric": "prediction.variance - prediction.epistemic_variance",
        "epistemic": "prediction.epistemic_variance  # prediction.mutual_information of classes",
        "bald": "prediction.mutual_information",
        "topk": "prediction.top_k(3)",
        "numpy": "prediction.probs.numpy()",
        "cpu": "prediction.probs.cpu()",
        "detach": "prediction.probs.detach()",
        "shape": "prediction.probs.shape",
    },
    "matrix": {
        "inverse": "matrix.solve(torch.eye(matrix.size))",
        "inv": "matrix.solve(torch.eye(matrix.size))",
        "inv_matmul": "matrix.solve(v)",
        "inv_quad": "matrix.quadratic(v)",
        "inv_quad_logdet": "matrix.quadratic(v), matrix.logdet()",
        "to_dense": "matrix.dense()",
        "to_matrix": "matrix.dense()",
        "evaluate": "matrix.dense()",
        "numpy": "matrix.dense().numpy()",
        "mv": "matrix.matvec(v)",
        "mm": "matrix.matvec(v)",
        "matmul": "matrix.matvec(v)",
        "dot": "matrix.matvec(v)",
        "diagonal": "matrix.diag()",
        "trace": "matrix.diag().sum()",
        "log_det": "matrix.logdet()",
        "slogdet": "matrix.logdet()",
        "det": "matrix.logdet().exp()",
        "shape": "(matrix.size, matrix.size)",
        "rsample": "matrix.sample(20)",
        "add_diag": "matrix.plus(lk.operators.Isotropic(matrix.size, 1.0))",
    },
}


def _made(structure: str, parameters: str = "all") -> str:
    return f'lk.LaplacePosterior(model, likelihood, structure="{structure}", parameters="{parameters}")'


_CLASSES = {"Full": "full", "Kron": "kron", "Diag": "diag", "LowRank": "lowrank"}
MEMBERS["package"] = {
    **dict.fromkeys(("Laplace", "BaseLaplace", "ParametricLaplace"), "lk.LaplacePosterior(model, likelihood)"),
    **{f"{name}Laplace": _made(structure) for name, structure in _CLASSES.items()},
    **{f"{name}LLLaplace": _made(structure, "last_layer") for name, structure in _CLASSES.items()},
    "LLLaplace": _made("kron", "last_layer"),
    "SubnetLaplace": "lk.LaplacePosterior(model, likelihood, parameters=lk.Subnetwork(100))",
    "FullSubnetLaplace": "lk.LaplacePosterior(model, likelihood, parameters=lk.Subnetwork(100))",
    "FunctionalLaplace": _made("full"),
    "marglik_training": "lk.evidence_training(model, likelihood, loader, epochs=2)",
    "KFAC": "lk.optim.kfac(model, likelihood)",
    "KFACOptimizer": "lk.optim.kfac(model, likelihood)",
    "HessianFree": "lk.optim.hessian_free(model, likelihood)",
    "GaussNewton": "lk.optim.GaussNewton(model, likelihood)",
    "EWC": "lk.continual.EWC(model, likelihood)",
    "SynapticIntelligence": "lk.continual.SynapticIntelligence(model, likelihood)",
    "OnlineLaplace": "lk.continual.OnlineLaplace(model, likelihood)",
    "Categorical": "lk.likelihoods.Categorical()",
    "Gaussian": "lk.likelihoods.Gaussian()",
    "Bernoulli": "lk.likelihoods.Bernoulli()",
    "Poisson": "lk.likelihoods.Poisson()",
    "FromLoss": "lk.likelihoods.FromLoss(loss)",
    "load": 'lk.LaplacePosterior.load("posterior.safetensors", model)',
    "fit": "lk.LaplacePosterior(model, likelihood).fit(train_loader)",
    "mc_dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "Dropout": "lk.predictive.mc_dropout(model, likelihood)",
    "Ensemble": "lk.Mixture([posterior])",
    "DeepEnsemble": "lk.Mixture([posterior])",
    "prune": "lk.pruning.prune(posterior, sparsity=0.5)",
}


def member(kind: str, name: str) -> str | None:
    """What to write instead of an attribute ``name`` of an object of some kind; ``None`` if not known."""
    known = MEMBERS.get(kind, {})
    return known.get(name) or known.get(name.lower())


def called(settings: Mapping[str, Any]) -> str:
    """What to write where laplace-torch's users call the posterior itself with these arguments."""
    if settings.get("joint"):
        return "posterior.functional_covariance(x, joint=True)"
    link = settings.get("link_approx", "probit")
    if settings.get("pred_type") == "nn":
        chosen = 'method="mc"'
    elif link == "mc":
        chosen = 'method="linearized"'
    elif isinstance(link, str) and link.startswith("bridge"):
        chosen = 'method="linearized", link="bridge"'
    else:
        chosen = "" if not settings else 'method="probit"'
    samples = settings.get("n_samples")
    parts = ["x", chosen, f"samples={samples}" if isinstance(samples, int) and "probit" not in chosen else ""]
    return f"posterior.predict({', '.join(filter(None, parts))})"
