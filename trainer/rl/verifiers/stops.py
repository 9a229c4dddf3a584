"""What ends answers while they are being written: `ended` of the verifiers in `names.STOPS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module

from dryvine.trainer.rl.verifiers.names import STOPS
from dryvine.trainer.rl.verifiers.pool import VerifierError

Ended = Callable[[str, Mapping[str, object]], bool]  # the answer so far, and the question's record


def stops_of(verifiers: Iterable[str]) -> dict[str, Ended]:
    """By name, for those of `verifiers` that have one. Raises VerifierError."""
    found: dict[str, Ended] = {}
    for name in sorted(STOPS.keys() & set(verifiers)):
        try:
            found[name] = import_module(STOPS[name]).ended
        except Exception as error:  # a user's file may raise anything
            raise VerifierError(f"verifier {name}: ended of {STOPS[name]}: {type(error).__name__}: {error}") from None
    return found
