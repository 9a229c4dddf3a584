"""Simulated annealing over folded rows: one small change to one rank, kept if better, or sometimes if worse.

A step costs what it changes. Nothing before the change can move, so the evaluation starts at the time of the change
with the arrivals of the last accepted rows; and the threshold is drawn first, so that the evaluation stops as soon as
some rank cannot finish in time. The search is as good as the number of its steps, and `simulate` would leave it a
twentieth of them.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from typing import NamedTuple

from dryvine.parallel.schedule.search.fold import NOTHING, Pipe, Row, pairs_itself
from dryvine.parallel.schedule.search.moves import propose
from dryvine.parallel.schedule.search.read import Task, read

HOT, COLD = 0.15, 0.005  # the first and the last temperature, in forwards
MEAN = 0.4  # weight of the mean finish beside the last one, so that progress on ranks that are not last counts


class Trial(NamedTuple):
    """A change that can be run in time, and the times after it."""

    rows: dict[int, Row]  # rank -> its new row
    score: float
    since: list[int]  # per rank, the first slot that ran again
    starts: list[list[float]]  # of those slots
    arrivals: list[float]


class TimedRows:
    """Rows with their times. `attempt` evaluates a change; `accept` applies it.

    Raises ValueError for rows that cannot be run within the memory limit, or stop at a cyclic wait.
    """

    def __init__(self, pipe: Pipe, rows: list[Row]) -> None:
        self.pipe, self.rows = pipe, [list(row) for row in rows]
        readings = [read(pipe, rank, row) for rank, row in enumerate(rows)]
        possible = [reading for reading in readings if reading is not None]
        if len(possible) < len(rows):
            raise ValueError("these rows cannot be run within the memory limit")
        self.tasks, self.counts = [tasks for tasks, _ in possible], [counts for _, counts in possible]
        self.starts: list[list[float]] = [[] for _ in rows]
        self.arrivals = [0.0] * pipe.arrivals
        self.score = 0.0
        first_run = self._run({}, [0] * len(rows), self.tasks, math.inf)
        if first_run is None:
            raise ValueError("these rows stop at a cyclic wait")
        self._record(first_run)

    @property
    def span(self) -> float:
        return max(starts[-1] + tasks[-1][0] for starts, tasks in zip(self.starts, self.tasks, strict=True))

    def attempt(self, rows: dict[int, Row], limit: float) -> Trial | None:
        """The times with these rows; None where they cannot be run or score above `limit`."""
        # `begun`: the earliest time at which a changed rank may start a slot that differs.
        tasks, begun = self.tasks[:], math.inf
        for rank, row in rows.items():
            changed = self._changed(rank, row)
            if changed is None:
                return None
            first, tasks[rank] = changed
            begun = min(begun, self.starts[rank][first - 1] + self.tasks[rank][first - 1][0] if first else 0.0)
        # All ranks run again from there on: what they started before cannot have waited for the change.
        since = [bisect_left(starts, begun) for starts in self.starts]
        return self._run(rows, since, tasks, limit)

    def _changed(self, rank: int, row: Row) -> tuple[int, list[Task]] | None:
        """The first slot that differs, and the row's tasks. Only the slots from there to the last that differs are read
        again: between them stand the same letters as before."""
        old, tasks = self.rows[rank], self.tasks[rank]
        first = next((i for i, (a, b) in enumerate(zip(row, old, strict=False)) if a != b), len(row))
        if first == len(row) == len(old):
            return None
        most = min(len(row), len(old)) - first
        tail = next((i for i in range(most) if row[-1 - i] != old[-1 - i]), most)
        after = tasks[len(old) - tail :]
        window, rest = row[first : len(row) - tail], after[0][1] if after else 0.0
        reading = read(self.pipe, rank, window, self.counts[rank][first], rest)
        return None if reading is None else (first, tasks[:first] + reading[0] + after)

    def _run(self, new: dict[int, Row], since: list[int], rows: list[list[Task]], limit: float) -> Trial | None:
        """Forget what `since` and later made, then run that part. One loop, because it is where the time goes."""
        # A negative arrival has not been made yet.
        arrivals = self.arrivals[:]
        for tasks, i in zip(self.tasks, since, strict=True):
            for task in tasks[i:]:
                arrivals[task[4]] = arrivals[task[5]] = -1.0
        arrivals[NOTHING] = 0.0
        now = [self.starts[r][i - 1] + rows[r][i - 1][0] if i else 0.0 for r, i in enumerate(since)]
        at, starts = since[:], [list[float]() for _ in since]
        # Each rank in turn runs as far as it can, until no rank moves.
        left, moved = sum(map(len, rows)) - sum(at), True
        while moved:
            moved = False
            for r, tasks in enumerate(rows):
                i, t, count, log = at[r], now[r], len(tasks), starts[r].append
                begun = i
                while i < count:
                    duration, rest, a, b, x, y, p, q = tasks[i]
                    u, v = arrivals[a], arrivals[b]
                    if u < 0 or v < 0:
                        break
                    if u > t:
                        t = u
                    if v > t:
                        t = v
                    # `rest` is what the rank has yet to do at least, so it cannot end within the limit.
                    if t + rest > limit:
                        return None
                    log(t)
                    t += duration
                    arrivals[x], arrivals[y] = t + p, t + q
                    i += 1
                if i > begun:
                    left -= i - begun
                    at[r], now[r], moved = i, t, True
        if left:
            return None
        return Trial(new, max(now) + MEAN * sum(now) / len(now), since, starts, arrivals)

    def accept(self, trial: Trial) -> bool:
        """Apply it; False if a V would pair a microbatch with itself, which only the numbers show."""
        if not self.pipe.mirrored and any(pairs_itself(self.pipe, row) for row in trial.rows.values()):
            return False
        for rank, row in trial.rows.items():
            reading = read(self.pipe, rank, row)
            assert reading is not None
            self.rows[rank] = row
            self.tasks[rank], self.counts[rank] = reading
        self._record(trial)
        return True

    def _record(self, trial: Trial) -> None:
        self.score, self.arrivals = trial.score, trial.arrivals
        for starts, since, new in zip(self.starts, trial.since, trial.starts, strict=True):
            starts[since:] = new


def anneal(pipe: Pipe, rows: list[Row], steps: int, seed: int) -> list[Row]:
    """The best rows found in so many steps from `rows`; the same for the same seed."""
    rng = random.Random(seed)
    timed = TimedRows(pipe, rows)
    best, best_rows = timed.span, [list(row) for row in timed.rows]
    for step in range(steps):
        # Metropolis: a worse score passes with probability exp(-difference / temperature).
        temperature = pipe.costs.F * HOT * (COLD / HOT) ** (step / steps)
        limit = timed.score - temperature * math.log(1 - rng.random())
        changes = propose(timed.rows, rng)
        trial = timed.attempt(changes, limit) if changes else None
        if trial and trial.score <= limit and timed.accept(trial) and timed.span < best - 1e-9:
            best, best_rows = timed.span, [list(r) for r in timed.rows]
    return best_rows
