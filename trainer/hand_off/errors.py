"""What a file from elsewhere, or a model for elsewhere, can be refused for."""

from __future__ import annotations


class HandOffError(ValueError):
    """One line: which file and key, or which part of the model, what is wrong, and the fix."""
