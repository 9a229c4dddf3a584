"""The verdict of a verifier, and the job it is given. Imports nothing heavy, since every worker process loads it.

A verifier is a module with `verify(answer, problem) -> Verdict` and a line in `names.py`. It may also have `SECONDS`,
the wall-clock time that one answer may take before its process is killed (default 10), and `check()`, which raises
RuntimeError, with the fix, where the verifier cannot work on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RIGHT = 1.0  # the score of an answer that is right
SECONDS = 10.0  # that one answer may take, where its verifier says nothing else


@dataclass(frozen=True)
class Verdict:
    """`score` is what the answer earns, usually 0 to 1. None: it could not be scored (the verifier failed or was
    killed, the problem's record is unusable), which is no fault of the answer: leave it out of the advantage instead
    of teaching the policy that it was wrong. `why` is for people."""

    score: float | None
    why: str = ""

    @property
    def right(self) -> bool:
        """For pass@k. What could not be scored is not."""
        return (self.score or 0.0) >= RIGHT


@dataclass(frozen=True)
class Job:
    """One answer for one verifier. `problem` is the problem's record: plain values as in JSON, among them whatever
    the verifier compares with. The trainer adds `completion_tokens`, the answer's length."""

    verifier: str
    answer: str
    problem: Mapping[str, object]


def weighted(weights: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> float | None:
    """The reward of an answer from its verdicts, both by verifier: the weighted sum, or None if one is None."""
    scores = [(weights[name], verdicts[name].score) for name in weights]
    return None if any(score is None for _, score in scores) else sum(w * s for w, s in scores if s is not None)


def number(problem: Mapping[str, object], key: str) -> int:
    """A field that is an integer. Raises ValueError."""
    value = problem.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"the problem's {key!r} is {value!r}: an integer is needed")
    return value
