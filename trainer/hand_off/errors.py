"""The error for a file or model that cannot be exported or imported."""

from __future__ import annotations


class HandOffError(ValueError):
    """One line: which file and key, or which part of the model, what is wrong, and the fix."""
