"""What doctor says of one thing: it is as it should be, or what to do, or why it could not be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

Verdict = Literal["ok", "note", "bad", "unknown"]


class Finding(NamedTuple):
    """A line of doctor. `bad` keeps a run from starting or makes it wrong or slow; a `note` is worth knowing. `fix` is
    what to do, of both."""

    verdict: Verdict
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        label = {"ok": "ok     ", "note": "note   ", "bad": "BAD    ", "unknown": "unknown"}[self.verdict]
        return f"{label} {self.what}: {self.found}" + (f"; {self.fix}" if self.fix else "")


Check: TypeAlias = Callable[[], Iterator[Finding]]


def judged(good: bool, what: str, found: str, fix: str, otherwise: Verdict = "bad") -> Finding:
    """`ok` if it is good, else `otherwise` with the fix."""
    return Finding("ok", what, found) if good else Finding(otherwise, what, found, fix)
