"""The version of the package, which emitted files name."""

__version__ = "0.1.0"
