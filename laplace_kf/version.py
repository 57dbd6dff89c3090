"""The version of the package; a file of its own, so that it can be read without torch."""

__all__ = ["__version__"]

__version__ = "0.1.0"
