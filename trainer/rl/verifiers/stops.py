"""What ends answers while they are being written: `ended` of the verifiers in `names.STOPS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module

from dryvine.trainer.rl.verifiers.names import STOPS
from dryvine.trainer.rl.verifiers.pool import VerifierError

Ended = Callable[[str, Mapping[str, object]], bool]  # the answer so far, and the question's record


def stops_of(verifiers: Iterable[str]) -> dict[str, Ended]:
    """By name, for those of `verifiers` that have one. Raises VerifierError."""
    return {name: _loaded(name, STOPS[name]) for name in sorted(STOPS.keys() & set(verifiers))}


def _loaded(name: str, file: str) -> Ended:
    """Raises VerifierError. This is the trainer's own process, which a user's file must not end, whatever it raises."""
    try:
        ended: Ended | None = getattr(import_module(file), "ended", None)
    except (Exception, SystemExit) as error:
        raise VerifierError(f"verifier {name}: {file} raises {type(error).__name__}: {error}") from None
    if not callable(ended):
        raise VerifierError(f"verifier {name}: {file} has no function ended(answer, problem)")
    return ended
