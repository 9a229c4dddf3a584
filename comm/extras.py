"""Packages that come with extras of this one, and what a user without one of them is told."""

from __future__ import annotations


class LibraryMissing(ValueError):
    """A library that the config names cannot be used by this process: which, why, and the fix, in one line."""


# Modules as they are imported, and the extra of pyproject.toml that installs them.
EXTRAS = {
    "antlr4": "rl",
    "datasketch": "quality",
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "huggingface_hub": "hub",
    "latex2sympy2_extended": "rl",
    "lm_eval": "harness",
    "math_verify": "rl",
    "mpi4py": "mpi",
    "ortools": "search",
    "reasoning_gym": "rl",
    "transformer_engine": "te",
}


def install(module: str) -> str:
    """The command that installs a module of EXTRAS."""
    return f'pip install "dryvine[{EXTRAS[module]}]"'


def lacking(error: ImportError) -> str:
    """What could not be imported and, where an extra installs it, the command."""
    module = (error.name or "").partition(".")[0]
    return f"{error}: {install(module)}" if module in EXTRAS else str(error)
