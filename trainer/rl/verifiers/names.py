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
