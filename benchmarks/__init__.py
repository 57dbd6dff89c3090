"""Benchmarks: ratios measured in one process run, one thread, written to ``benchmarks/results``."""
