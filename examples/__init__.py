"""Longer examples, each a module that can be run: ``python -m examples.marglik --out DIR``."""
