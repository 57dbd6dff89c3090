"""Survivors of ``python -m tests.mutation`` that were looked at: by the mutant's key, what they are."""

JUDGED: dict[str, str] = {}
