"""A finding of doctor: ok, a fault with its fix, or unknown with the reason."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verdict = Literal["ok", "note", "bad", "unknown"]

# The sum of the tasks too: inside a job srun takes it from SLURM_NTASKS, and ignores another number for each node.
ONE_PER_NODE = "srun --ntasks=NODES --ntasks-per-node=1"


class Finding(NamedTuple):
    """One line of doctor's output. `bad`: stops a run, or makes it wrong or slow; `note`: worth knowing. `fix` is
    what to do about either."""

    verdict: Verdict
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        label = {"ok": "ok     ", "note": "note   ", "bad": "BAD    ", "unknown": "unknown"}[self.verdict]
        return f"{label} {self.what}: {self.found}" + (f"; {self.fix}" if self.fix else "")


def judged(good: bool, what: str, found: str, fix: str, otherwise: Verdict = "bad") -> Finding:
    """`ok` if `good`, else the verdict `otherwise`, with the fix."""
    return Finding("ok", what, found) if good else Finding(otherwise, what, found, fix)
