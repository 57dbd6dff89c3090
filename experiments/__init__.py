"""The experiments of the papers, one module each, run by one runner: ``python -m experiments list``."""
