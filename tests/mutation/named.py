"""Details of the papers that a change of one line takes away: file, what stands there (once), what instead, tests."""

from __future__ import annotations

Named = tuple[str, str, str, list[str]]
GUARDS = ["tests/optim/test_guards.py"]
OPTIM = ["tests/optim/test_guards.py", "tests/optim/test_steps.py", "tests/optim/test_settings.py"]

NAMED: list[Named] = [
    ("laplace_kf/estimators/projection.py", "return normal(shape,", "return 2 * normal(shape,", GUARDS),
    ("laplace_kf/operators/kronecker.py", "omega.clamp(1e-6, 1e6)", "omega", GUARDS),
    ("laplace_kf/operators/tridiagonal.py", ".clamp_min(floor)", "", GUARDS),
    ("laplace_kf/optim/gauss_newton.py", "torch.neg(gradient, out=directions[k])", "...", GUARDS),
    ("laplace_kf/optim/presets.py", '(1 / 8, 1 / 4)', '(1 / 4, 1 / 4)', OPTIM),
    ("laplace_kf/optim/presets.py", '(1 / 8, 1 / 4)', '(1 / 8, 1 / 2)', OPTIM),
    ("laplace_kf/optim/presets.py", '"refresh": 20', '"refresh": 10', OPTIM),
    ("laplace_kf/optim/running.py", "WARM_UP = 3", "WARM_UP = 0", OPTIM),
    ("laplace_kf/optim/presets.py", "low=0.25", "low=0.75", OPTIM),
    ("laplace_kf/optim/presets.py", 'scaling="gamma"', 'scaling="zeta"', OPTIM),
    ("laplace_kf/optim/presets.py", '"ema": 0.95,\n    "refresh"', '"ema": 0.9,\n    "refresh"', OPTIM),
    ("laplace_kf/optim/base.py", "BOOST = 10.0", "BOOST = 2.0", [*OPTIM, "tests/optim/test_refused_steps.py"]),
    ("laplace_kf/optim/stepsize.py", "DEGENERATE = 1e-12", "DEGENERATE = 0.0", OPTIM),
]  # fmt: skip
