"""A verifier of a user's own: the share of four characters that are digits."""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.trainer.rl.verifiers.verdict import Verdict


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    return Verdict(sum(character in "0123456789" for character in answer) / 4)
