"""Third-party models and tools, at toy size: what fits, how exactly, at what cost (``python -m benchmarks.models``)."""
