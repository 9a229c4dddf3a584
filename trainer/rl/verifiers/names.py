"""The verifiers by name. One of your own is a file with `verify(answer, problem)` and a line here."""

from __future__ import annotations

VERIFIERS = {
    "code": "dryvine.trainer.rl.verifiers.code",
    "countdown": "dryvine.trainer.rl.verifiers.countdown",
    "format": "dryvine.trainer.rl.verifiers.format",
    "instructions": "dryvine.trainer.rl.verifiers.instructions",
    "integer": "dryvine.trainer.rl.verifiers.integer",
    "language": "dryvine.trainer.rl.verifiers.language",
    "length": "dryvine.trainer.rl.verifiers.length",
    "math": "dryvine.trainer.rl.verifiers.math",
    "reasoning_gym": "dryvine.trainer.rl.verifiers.gym",
}

# Of those that know, while an answer is being written, that nothing behind it can matter: modules with
# `ended(answer, problem) -> bool`, asked after every token. It runs on every rank of the trainer, and must be a
# function of its arguments. None of ours has one: what comes behind an answer is what format and length score.
STOPS: dict[str, str] = {}
