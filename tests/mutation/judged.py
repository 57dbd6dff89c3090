"""Survivors of ``python -m tests.mutation`` that were looked at: by the mutant's key, what they are."""

JUDGED: dict[str, str] = {
    "laplace_kf/operators/nearest.py:106:10 `-1` -> `(1)`": "killed by tests/continual/test_update.py, which is among "
    "the tests of this folder since",
}
