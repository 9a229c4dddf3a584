"""The shortest run of two chains of work on two resources: what a pair of ops costs at least.

A job shop with two jobs and two machines, small enough to be solved exactly: at each (works of a done, works of b done)
the search keeps every state that no other one dominates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

Resource = Literal["compute", "comm"]


class Work(NamedTuple):
    """A piece of a chain, which its resource serves unbroken and alone."""

    resource: Resource
    time: float


_State = tuple[float, float, float, float]  # when chain a and chain b may go on; when compute and comm are free
_FREE = {"compute": 2, "comm": 3}
EQUAL = 1e-12  # times closer than this are one, else sums in another order would multiply the states


@lru_cache(maxsize=256)
def makespan(a: tuple[Work, ...], b: tuple[Work, ...]) -> float:
    """The shortest time in which both chains end. Within a chain, each work starts when the one before has ended."""
    states: dict[tuple[int, int], set[_State]] = {(0, 0): {(0.0, 0.0, 0.0, 0.0)}}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            # The last entry is the result, and has no successor.
            for state in _best(states.pop((i, j))) if i < len(a) or j < len(b) else ():
                if i < len(a):
                    states.setdefault((i + 1, j), set()).add(_advance(state, 0, a[i]))
                if j < len(b):
                    states.setdefault((i, j + 1), set()).add(_advance(state, 1, b[j]))
    return min(max(state) for state in states[len(a), len(b)])


def _advance(state: _State, chain: int, work: Work) -> _State:
    """The state after the next work of a chain, started as soon as the chain and the resource are free."""
    resource, after = _FREE[work.resource], list(state)
    after[chain] = after[resource] = max(state[chain], state[resource]) + work.time
    return after[0], after[1], after[2], after[3]


def _best(states: set[_State]) -> list[_State]:
    """Those that no other one dominates, being no later in any time. Sorted, only an earlier one can dominate."""
    best: list[_State] = []
    for s in sorted(states):
        if not any(k[1] <= s[1] + EQUAL and k[2] <= s[2] + EQUAL and k[3] <= s[3] + EQUAL for k in best):
            best.append(s)
    return best
