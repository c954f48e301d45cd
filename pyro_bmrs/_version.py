"""The version of the library, its one home."""

__version__ = "0.1.0"
