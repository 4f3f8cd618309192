"""The version of the SDK; equals the one in ``sdk/pyproject.toml`` (a test compares them)."""

__version__ = "0.1.0"
