"""The verifiers by name. One of your own is a file with `verify(answer, problem)` and a line here."""

from __future__ import annotations

VERIFIERS = {
    "format": "dryvine.trainer.rl.verifiers.format",
    "integer": "dryvine.trainer.rl.verifiers.integer",
    "countdown": "dryvine.trainer.rl.verifiers.countdown",
}
