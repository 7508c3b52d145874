"""The version, which results and caches name."""

__version__ = "0.1.0"
